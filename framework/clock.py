"""Time as a dependency: the system's clock, and a clock that a test moves by hand."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections.abc import Callable
from typing import Protocol, TypeAlias


def moment_ms(seconds: float) -> int:
    """Return Unix seconds as whole milliseconds, rounded up so that no job is due early."""
    return math.ceil(seconds * 1000 - 1e-3)  # today's Unix time as a float is exact to a quarter of a microsecond


class Timer(Protocol):
    """A pending call, as `Clock.call_later` returns it."""

    def cancel(self) -> None:
        """Cancel the call; without effect after the call."""
        ...


class Clock(Protocol):
    """Two times and two ways to wait, all in seconds."""

    def now(self) -> float:
        """Return the Unix time, UTC, for timestamps that others read. This time may jump."""
        ...

    def monotonic(self) -> float:
        """Return a time that never goes back, for waits and deadlines."""
        ...

    def call_later(self, delay_s: float, function: Callable[[], object], /, *, limit: bool = False) -> Timer:
        """Call `function` on the running loop after `delay_s`.

        `limit` marks a call that only ends something which takes too long; `ManualClock.next_due_in_s` leaves it out.
        """
        ...

    async def sleep(self, delay_s: float, /) -> None:
        """Return after `delay_s`."""
        ...


class SystemClock:
    """The machine's clock and the running loop's timers."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)

    def call_later(self, delay_s: float, function: Callable[[], object], /, *, limit: bool = False) -> Timer:  # noqa: ARG002
        """Call `function` on the running loop after `delay_s`."""
        return asyncio.get_running_loop().call_later(delay_s, function)

    async def sleep(self, delay_s: float, /) -> None:
        """Return after `delay_s`."""
        await asyncio.sleep(delay_s)


class _ManualTimer:
    def __init__(self, due: float, function: Callable[[], object]) -> None:
        self.due = due
        self.function: Callable[[], object] | None = function

    def cancel(self) -> None:
        self.function = None


_Timers: TypeAlias = list[tuple[float, int, _ManualTimer]]


def _next_due(timers: _Timers) -> float:
    """Return the time of the first timer that isn't cancelled; inf without such a timer."""
    while timers and timers[0][2].function is None:
        heapq.heappop(timers)
    return timers[0][0] if timers else math.inf


class ManualClock:
    """A clock for tests that stands still until `advance`.

    Timers fire inside `advance`, in the order of their times. Tasks that a timer wakes run in the next turn of the loop.
    """

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self._start = now
        self._elapsed = 0.0
        self._timers: _Timers = []
        self._limits: _Timers = []
        self._order = itertools.count()
        self.sleepers = 0
        """How many coroutines are in `sleep` now."""

    def now(self) -> float:
        """Return the Unix time: the start of the clock plus all advances."""
        return self._start + self._elapsed

    def monotonic(self) -> float:
        """Return the sum of all advances."""
        return self._elapsed

    def call_later(self, delay_s: float, function: Callable[[], object], /, *, limit: bool = False) -> Timer:
        """Call `function` when the clock has advanced by `delay_s`."""
        timer = _ManualTimer(self._elapsed + max(0.0, delay_s), function)
        heapq.heappush(self._limits if limit else self._timers, (timer.due, next(self._order), timer))
        return timer

    async def sleep(self, delay_s: float, /) -> None:
        """Return when the clock has advanced by `delay_s`."""
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        timer = self.call_later(delay_s, wake)
        self.sleepers += 1
        try:
            await woken
        finally:
            self.sleepers -= 1
            timer.cancel()

    def next_due_in_s(self) -> float | None:
        """Return the seconds until the next timer that isn't a limit; None without such a timer."""
        due = _next_due(self._timers)
        return None if due == math.inf else due - self._elapsed

    def advance(self, seconds: float, /) -> None:
        """Move the clock forward, and fire the timers that fall due on the way."""
        if not seconds >= 0:
            msg = f"a clock can't be advanced by {seconds} s"
            raise ValueError(msg)
        self.advance_to(self._elapsed + seconds)

    def advance_to(self, until: float, /) -> None:
        """Move the clock forward until `monotonic` is `until`, as `advance` does; without effect if it is already further."""
        while (due := _next_due(timers := min(self._timers, self._limits, key=_next_due))) <= until:
            _, _, timer = heapq.heappop(timers)
            self._elapsed = max(self._elapsed, due)
            function, timer.function = timer.function, None
            if function is not None:
                function()
        self._elapsed = max(self._elapsed, until)
