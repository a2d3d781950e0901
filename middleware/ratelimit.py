"""At most so many starts in a time, over all processes of one `leveret work`."""

from __future__ import annotations

import math
from typing import final

from leveret.attempt import Attempt
from leveret.clock import SystemClock
from leveret.layer import Consume
from leveret.outcome import Outcome, Snooze
from leveret.runtime import Runtime

_LATE_S = 0.01
"""How late a loop may wake without a start being lost."""
_IN_SLOT_S = 0.25
"""The longest wait that a job spends in its slot; for a longer one it goes back to the broker."""
_NEAR_S = 5.0
_LONGEST_S = 86_400.0
# Sums of floats: what is ready but for the last bits is ready, or a clock moved by exactly that wait never gets there.
_ALMOST_S = 1e-6


@final
class RateLimit:
    """At most `limit` starts in `every_s`, over all processes of one `leveret work`, and `burst` at once. ValueError unless all are > 0.

    Within one `every_s` after a quiet time it may be `limit + burst - 1`: give `burst=1` where a limit is somebody else's law.

    Each process gets an equal share, and one start of its own at once at least. Where every handler of a queue has
    this very instance, the consumer starts nothing of the queue before it may. On some jobs of a queue it waits in the
    slot for up to 0.25 s, and otherwise snoozes the job, spread out over the starts to come: that costs no attempt.

    Args:
        limit: Starts in `every_s`; a fraction is allowed.
        every_s: Seconds.
        burst: Starts that may come at once, at the most. By default as many as fall into 10 ms, and one at least: an event loop
            wakes up to some milliseconds late, and a limit of 1000 a second would be 800 if those starts were lost.

    Source: the token bucket as GCRA, the "virtual scheduling algorithm" of ITU-T I.371: one time is its whole state.
    """

    def __init__(self, limit: float, *, every_s: float = 1.0, burst: int | None = None) -> None:
        for name, value in (("limit", limit), ("every_s", every_s), ("burst", 1 if burst is None else burst)):
            if isinstance(value, bool) or not isinstance(value, int if name == "burst" else (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
                msg = f"RateLimit: {name} is a {'whole number' if name == 'burst' else 'number'}, not {value!r}"
                raise TypeError(msg)
            if not 0 < value < float("inf"):
                msg = f"RateLimit: {name} must be above 0 and finite, not {value}"
                raise ValueError(msg)
        self.limit = limit
        self.every_s = every_s
        self.burst = math.ceil(limit / every_s * _LATE_S) if burst is None else burst
        self._begin(Runtime(app=""))

    def __repr__(self) -> str:
        return f"RateLimit({self.limit:g}, every_s={self.every_s:g}{f', burst={self.burst}' if self.burst > 1 else ''})"

    def bind(self, runtime: Runtime) -> None:
        """Take clock, chance and the number of processes to share with.

        A second runtime on the system's clock (a publisher's in this process) changes neither what is used up nor the
        share; a clock of another kind begins anew.
        """
        if not isinstance(runtime.clock, SystemClock) or not isinstance(self._clock, SystemClock):
            if runtime.clock is not self._clock:
                self._begin(runtime)
        elif runtime.processes > self._processes:
            self._begin(runtime)

    def _begin(self, runtime: Runtime) -> None:
        self._clock = runtime.clock
        self._rng = runtime.rng
        self._processes = runtime.processes
        self._interval_s = self.every_s / self.limit * runtime.processes
        self._ahead_s = (max(1.0, self.burst / runtime.processes) - 1.0) * self._interval_s
        self._next = float("-inf")  # GCRA's "theoretical arrival time" on `clock.monotonic`
        self._far = self._near = float("-inf")  # the last places given to snoozed jobs

    @property
    def starts_per_s(self) -> float:
        """How many starts a second this process may make; bounds its prefetch."""
        return 1.0 / self._interval_s

    def ready_in_s(self) -> float:
        """Return the seconds until a start is allowed, 0 for now; reserves nothing."""
        wait_s = self._next - self._ahead_s - self._clock.monotonic()
        return wait_s if wait_s > _ALMOST_S else 0.0

    def starts_now(self) -> int:
        """Return how many starts are allowed now, at once; the consumer asks so that it needn't go round for each."""
        if self.ready_in_s() > 0:
            return 0
        left_s = self._ahead_s - max(0.0, self._next - self._clock.monotonic())
        return int(max(0.0, left_s + _ALMOST_S) / self._interval_s) + 1

    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        """Run it when it may start: now, in a moment, or after a snooze."""
        now = self._clock.monotonic()
        wait_s = self._next - self._ahead_s - now
        if wait_s > _IN_SLOT_S:
            return Snooze(self._place_s(wait_s, came_back=attempt.envelope.passes > 0))
        # taken before the wait, so that who comes meanwhile waits behind this one
        self._next = max(self._next, now) + self._interval_s
        if wait_s > _ALMOST_S:
            await self._clock.sleep(wait_s)
        return await proceed(attempt)

    def _place_s(self, wait_s: float, *, came_back: bool) -> float:
        """Return how long a job is to be snoozed, with a place of its own among those that are.

        A place is a time, not a start that is kept free: the job may come back in another process. First snoozes get
        one place after the other. The broker rounds long delays up, so those come back in clumps, finding the places
        after theirs unused: a job that came back gets one of the next few seconds, round and round.
        """
        now = self._clock.monotonic()
        first = now + wait_s
        if came_back:
            place = max(self._near + self._interval_s, first)
            self._near = place = place if place - now <= max(_NEAR_S, wait_s) else first
        else:
            self._far = place = max(self._far + self._interval_s, first)
        return min(place - now + self._rng.uniform(0.0, 0.1 * self._interval_s), _LONGEST_S)
