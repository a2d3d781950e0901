"""Hearing of ends, and asking until a store answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final, TypeVar

from leveret.errors import StoreUnavailable
from leveret.store import Key

PATIENCE_S: Final = 30.0

_T = TypeVar("_T")


class Ends:
    """The ends that a store has told."""

    def __init__(self) -> None:
        self.keys: set[Key] = set()
        self._news = asyncio.Event()

    def __call__(self, ended: Sequence[Key], /) -> None:
        self.keys.update(ended)
        self._news.set()

    async def has(self, keys: set[Key]) -> None:
        """Wait until all of these were told."""
        async with asyncio.timeout(PATIENCE_S):
            while not keys <= self.keys:
                self._news.clear()
                await self._news.wait()


async def answered(ask: Callable[[], Awaitable[_T]]) -> _T:
    """Ask until the store answers."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with suppress(StoreUnavailable):
                return await ask()
            await asyncio.sleep(0.02)
