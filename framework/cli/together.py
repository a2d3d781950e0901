"""Run many short tasks at once: a bounded number, with a bounded number of bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from types import TracebackType
from typing import Any, Self


class Together:
    """Tasks that run at once; the end of the block waits for all, even if it is left by an error or a Ctrl-C.

    A replay that was published is thus removed from the dead letters, instead of being in both places. A second Ctrl-C ends the wait.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._bytes = 0
        self._tasks = set[asyncio.Task[None]]()
        self._ended = asyncio.Event()
        self._bug: BaseException | None = None

    async def __aenter__(self) -> Self:
        return self

    async def start(self, work: Coroutine[Any, Any, None], size: int) -> None:
        """Start `work`, which holds `size` bytes, once there is room; a task that is alone has room whatever its size."""
        try:
            while self._tasks and (len(self._tasks) >= self._most or self._bytes + size > self._most_bytes):
                self._ended.clear()
                await self._ended.wait()
            if self._bug is not None:
                raise self._bug
        except BaseException:
            work.close()
            raise
        task = asyncio.create_task(work)
        self._tasks.add(task)
        self._bytes += size
        task.add_done_callback(partial(self._end, size))

    def _end(self, size: int, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._bytes -= size
        self._ended.set()
        if not task.cancelled():
            self._bug = self._bug or task.exception()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*self._tasks)
        if self._bug is not None:
            raise self._bug
