"""The deadlines of many runs on one timer of the runtime's clock.

`asyncio.timeout` costs about 4 µs per use (measured), most of it for a loop timer that is nearly always cancelled. A deadline
here costs adding an entry to a set and removing it. One timer, set for the earliest deadline, looks at all entries.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from types import FrameType, TracebackType
from typing import Any

import msgspec

from .attempt import Attempt
from .attemptlog import warn_of
from .clock import Clock, Timer
from .tracebacks import at, is_users

TICK_S = 0.05
"""How far a run may exceed its deadline, and the least time between two looks."""

IGNORED_S = 30.0
"""A run that goes on after its cancellation is named each time that so many seconds have passed."""
_CONSUMING = os.path.join(os.path.dirname(__file__), "consuming", "")  # noqa: PTH118, PTH120 - pathlib drops the separator


class Deadline(msgspec.Struct, eq=False, gc=False):
    """One deadline of one task."""

    task: asyncio.Task[object]
    cancelling: int
    """How many cancellations of the task were pending when the deadline was set."""
    at: float
    """Seconds of the clock's `monotonic`."""
    attempt: Attempt[Any]
    """The run of the task."""
    expired: bool = False
    """Whether the deadline has cancelled the task."""
    taken_back: bool = False
    """Whether the deadline's cancellation was taken back, so that the task goes on."""
    where: TracebackType | None = None
    """Where the run was when its task was cancelled; None for a handler in a thread."""
    naming: Timer | None = None
    """Names the run if the run ignores its cancellation."""


class Deadlines:
    """The deadlines of one loop's tasks, by one clock."""

    def __init__(self, clock: Clock) -> None:
        self._entries: set[Deadline] = set()
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._timer: Timer | None = None
        self._look_at = float("inf")

    def set(self, deadline: float, attempt: Attempt) -> Deadline:
        """Cancel the current task at `deadline` (the clock's `monotonic`), at most 50 ms late, unless `clear` is called before."""
        task = asyncio.current_task(self._loop)
        assert task is not None
        entry = Deadline(task, task.cancelling(), deadline, attempt)
        self._entries.add(entry)
        if deadline < self._look_at - TICK_S:
            self._look(deadline)
        return entry

    def clear(self, entry: Deadline) -> None:
        """Remove the deadline. If the deadline cancelled its task and the task ran on, take the cancellation back."""
        if not entry.expired:
            self._entries.discard(entry)
            return
        if entry.naming is not None:
            entry.naming.cancel()
        if not entry.taken_back:
            entry.task.uncancel()

    def was_it(self, entry: Deadline) -> bool:
        """Return whether a CancelledError that arrived came from this deadline alone, and take its cancellation back."""
        if not entry.expired:
            return False
        entry.taken_back = True
        return entry.task.uncancel() <= entry.cancelling

    def _look(self, at: float) -> None:
        """Look at all deadlines at the time `at`."""
        if self._timer is not None:
            self._timer.cancel()
        self._look_at = at
        self._timer = self._clock.call_later(max(0.0, at - self._clock.monotonic()), self._expire, limit=True)

    def _expire(self) -> None:
        now, self._timer, self._look_at = self._clock.monotonic(), None, float("inf")
        for entry in [entry for entry in self._entries if entry.at <= now]:
            self._entries.discard(entry)
            entry.expired = True
            entry.where = at(_users_frames(entry.task))
            entry.task.cancel()
            self._name_later(entry)
        if self._entries:
            self._look(max(now + TICK_S, min(entry.at for entry in self._entries)))

    def _name_later(self, entry: Deadline) -> None:
        entry.naming = self._clock.call_later(IGNORED_S, partial(self._name, entry), limit=True)

    def _name(self, entry: Deadline) -> None:
        """Log where a run is that ignores its cancellation. A thread can't be cancelled, which was logged when it was tried."""
        if frames := _users_frames(entry.task):
            frame = frames[-1]
            warn_of(
                entry.attempt,
                "ignores its cancellation: its Timeout was over %.0f s ago, it keeps its slot, and it is at %s",
                self._clock.monotonic() - entry.at,
                f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}",
            )
        self._name_later(entry)


def _users_frames(task: asyncio.Task[object]) -> list[FrameType]:
    """Return the frames of a user's in which the handler in `task` waits, outermost first; none for a handler in a thread."""
    frames: list[FrameType] = []
    step: Any = task.get_coro()
    while step is not None:
        frame: FrameType | None = getattr(step, "cr_frame", None) or getattr(step, "gi_frame", None)
        if frame is not None:
            if frame.f_code.co_filename.startswith(_CONSUMING):
                frames.clear()  # so far only middleware
            elif is_users(frame):
                frames.append(frame)
        step = getattr(step, "cr_await", None) or getattr(step, "gi_yieldfrom", None)
    return frames


_latest: tuple[asyncio.AbstractEventLoop, Clock, Deadlines] | None = None


def deadlines(clock: Clock) -> Deadlines:
    """Return the deadlines of the running loop by `clock`. Only the latest pair is kept: a worker process has just one."""
    global _latest  # noqa: PLW0603 - called for each run, so the look-up must cost no more than two comparisons
    loop = asyncio.get_running_loop()
    known = _latest
    if known is None or known[0] is not loop or known[1] is not clock:
        known = _latest = (loop, clock, Deadlines(clock))
    return known[2]
