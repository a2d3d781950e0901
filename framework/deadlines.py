"""Deadlines of many runs at once: one timer of the loop for all that end within the same 50 ms.

`asyncio.timeout` costs about 4 µs a use, most of it a timer of the loop that is nearly always cancelled (measured). Here a
deadline costs an entry in a dict and its removal.
"""

from __future__ import annotations

import asyncio
import time

import msgspec

TICK_S = 0.05
"""A run may go on for so much longer than its deadline."""


class Deadline(msgspec.Struct, eq=False, gc=False):
    """One deadline of one task: `expired` says whether it was this that cancelled it."""

    task: asyncio.Task[object]
    cancelling: int
    """The task's pending cancellations before this one."""
    tick: int
    expired: bool = False
    taken_back: bool = False
    """Whether its cancellation was taken back, so that the task goes on."""


class Deadlines:
    """The deadlines of one loop's tasks."""

    def __init__(self) -> None:
        self._ticks: dict[int, dict[int, Deadline]] = {}
        self._loop = asyncio.get_running_loop()

    def set(self, deadline: float) -> Deadline:
        """Cancel the current task at `deadline` (`time.monotonic`), up to 50 ms late, unless `clear` comes before."""
        task = asyncio.current_task(self._loop)
        assert task is not None
        tick = int(deadline / TICK_S) + 1
        entry = Deadline(task, task.cancelling(), tick)
        entries = self._ticks.get(tick)
        if entries is None:
            entries = self._ticks[tick] = {}
            self._loop.call_later(max(0.0, tick * TICK_S - time.monotonic()), self._expire, tick)
        entries[id(entry)] = entry
        return entry

    def clear(self, entry: Deadline) -> None:
        """Forget it. What it cancelled and went on all the same is no longer being cancelled."""
        if entry.expired:
            if not entry.taken_back:
                entry.task.uncancel()
            return
        entries = self._ticks.get(entry.tick)
        if entries is not None:
            entries.pop(id(entry), None)

    def was_it(self, entry: Deadline) -> bool:
        """Whether a CancelledError that arrived is this deadline's alone; then the task is no longer being cancelled."""
        if not entry.expired:
            return False
        entry.taken_back = True
        return entry.task.uncancel() <= entry.cancelling

    def _expire(self, tick: int) -> None:
        for entry in self._ticks.pop(tick).values():
            entry.expired = True
            entry.task.cancel()


_of_loop: tuple[asyncio.AbstractEventLoop, Deadlines] | None = None


def deadlines() -> Deadlines:
    """Return those of the running loop: a process that works has one loop; another one (a test's) gets its own."""
    global _of_loop  # noqa: PLW0603 - looked up for each run, so one comparison is all that it may cost
    loop = asyncio.get_running_loop()
    known = _of_loop
    if known is None or known[0] is not loop:
        known = _of_loop = (loop, Deadlines())
    return known[1]
