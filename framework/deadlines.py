"""Deadlines of many runs at once, on one timer of the loop.

`asyncio.timeout` costs about 4 µs a use, most of it a timer of the loop that is nearly always cancelled (measured). Here a
deadline costs an entry in a set and its removal; the timer is set for the earliest, and what it finds by then is all there is.
"""

from __future__ import annotations

import asyncio
import time

import msgspec

TICK_S = 0.05
"""A run may go on for so much longer than its deadline: those that end within one tick share a look."""


class Deadline(msgspec.Struct, eq=False, gc=False):
    """One deadline of one task: `expired` says whether it was this that cancelled it."""

    task: asyncio.Task[object]
    cancelling: int
    """The task's pending cancellations before this one."""
    at: float
    expired: bool = False
    taken_back: bool = False
    """Whether its cancellation was taken back, so that the task goes on."""


class Deadlines:
    """The deadlines of one loop's tasks."""

    def __init__(self) -> None:
        self._entries: set[Deadline] = set()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._look_at = float("inf")

    def set(self, deadline: float) -> Deadline:
        """Cancel the current task at `deadline` (`time.monotonic`), up to 50 ms late, unless `clear` comes before."""
        task = asyncio.current_task(self._loop)
        assert task is not None
        entry = Deadline(task, task.cancelling(), deadline)
        self._entries.add(entry)
        if deadline < self._look_at - TICK_S:
            self._look(deadline)
        return entry

    def clear(self, entry: Deadline) -> None:
        """Forget it. What it cancelled and went on all the same is no longer being cancelled."""
        if not entry.expired:
            self._entries.discard(entry)
        elif not entry.taken_back:
            entry.task.uncancel()

    def was_it(self, entry: Deadline) -> bool:
        """Whether a CancelledError that arrived is this deadline's alone; then the task is no longer being cancelled."""
        if not entry.expired:
            return False
        entry.taken_back = True
        return entry.task.uncancel() <= entry.cancelling

    def _look(self, deadline: float) -> None:
        """Look at all of them at the end of the tick that `deadline` is in."""
        if self._timer is not None:
            self._timer.cancel()
        self._look_at = (int(deadline / TICK_S) + 1) * TICK_S
        self._timer = self._loop.call_later(max(0.0, self._look_at - time.monotonic()), self._expire)

    def _expire(self) -> None:
        now, self._timer, self._look_at = time.monotonic(), None, float("inf")
        for entry in [entry for entry in self._entries if entry.at <= now]:
            self._entries.discard(entry)
            entry.expired = True
            entry.task.cancel()
        if self._entries:
            self._look(min(entry.at for entry in self._entries))


_of_loop: tuple[asyncio.AbstractEventLoop, Deadlines] | None = None


def deadlines() -> Deadlines:
    """Return those of the running loop: a process that works has one loop; another one (a test's) gets its own."""
    global _of_loop  # noqa: PLW0603 - looked up for each run, so one comparison is all that it may cost
    loop = asyncio.get_running_loop()
    known = _of_loop
    if known is None or known[0] is not loop:
        known = _of_loop = (loop, Deadlines())
    return known[1]
