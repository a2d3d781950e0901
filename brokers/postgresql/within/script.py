"""A script yields statements, and an adapter executes them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any, Final, Protocol, TypeAlias

Script: TypeAlias = Generator[tuple[str, Sequence[Any]], Any, Any]
"""Yields statements, and is sent the first value of what each selects."""


class Write(Protocol):
    """Returns the statements."""

    def __call__(self, *, numbered: bool, joined: bool) -> Script:
        """With `numbered`, places are $1 and so on instead of %s; with `joined`, statements without values come together."""
        ...


ANSWER_S: Final = 1.0
"""How long an answer is waited for once the server must have given it. A server that is gone or frozen gives none."""


def run(script: Script, execute: Callable[[str, Sequence[Any]], object]) -> Any:
    """Execute the statements of a script, and return what it returns."""
    try:
        step = next(script)
        while True:
            try:
                value = execute(*step)
            except BaseException as error:  # noqa: BLE001 - the script raises what it means
                step = script.throw(error)
            else:
                step = script.send(value)
    except StopIteration as ended:
        return ended.value


async def run_async(script: Script, execute: Callable[[str, Sequence[Any]], Awaitable[object]], deadline: float) -> Any:
    """As `run`, with an end for each statement a while after the deadline."""
    try:
        step = next(script)
        while True:
            try:
                limit_s = None if deadline == math.inf else max(0.0, deadline - time.monotonic()) + ANSWER_S
                async with asyncio.timeout(limit_s):
                    value = await execute(*step)
            except BaseException as error:  # noqa: BLE001 - the script raises what it means
                step = script.throw(error)
            else:
                step = script.send(value)
    except StopIteration as ended:
        return ended.value
