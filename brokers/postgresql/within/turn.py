"""The publishes on one connection take turns: each has its savepoint, and the savepoints of two mustn't cross."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final


class _Turns:
    """Those who use one connection, or wait for it."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0


_turns: Final[dict[int, _Turns]] = {}
"""By the connection's id, while it is in use: not every library's connection can be referred to weakly."""


@asynccontextmanager
async def turn(connection: object) -> AsyncGenerator[None]:
    """Use the connection alone."""
    turns = _turns.setdefault(id(connection), _Turns())
    turns.users += 1
    try:
        async with turns.lock:
            yield
    finally:
        turns.users -= 1
        if not turns.users:
            del _turns[id(connection)]


def is_used(connection: object) -> bool:
    """Whether somebody has a turn on the connection."""
    return id(connection) in _turns
