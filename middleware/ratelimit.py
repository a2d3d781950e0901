"""A rate limit over all processes of one `leveret work`."""

from __future__ import annotations

import logging
import math
from typing import final

from leveret.attempt import Attempt
from leveret.clock import SystemClock
from leveret.layer import Consume
from leveret.outcome import Outcome, Snooze
from leveret.runtime import Runtime

from .buckets import ALMOST_S, BUSY_S, IN_SLOT_S, Bucket, SharedBucket

logger = logging.getLogger("leveret.ratelimit")

_LATE_S = 0.01
"""Seconds by which an event loop may wake up late without losing a start."""
_NEAR_S = 5.0
_LONGEST_S = 86_400.0
_FAR, _NEAR = 0, 1


@final
class RateLimit:
    """Allows at most `limit` starts per `every_s`, and at most `burst` at once, over all processes of one `leveret work`.

    In the first `every_s` after a quiet time, up to `limit + burst - 1` jobs may start. Give `burst=1` if somebody else
    enforces the limit.

    All processes draw from one bucket, so the limit holds and is reached in whichever process the jobs are. A start may come
    up to 10 ms after a process drew it. A process that is killed takes at most `burst` unused starts with it, besides those
    of the jobs that wait in its slots.

    If every handler of a queue has the same instance, the consumer starts no job of the queue before the limit allows a
    start. Otherwise, a job waits in its slot for up to 0.25 s. For a longer wait, the job is snoozed, which costs no attempt;
    snoozed jobs are spread out over the next starts.

    Args:
        limit: Starts per `every_s`, above 0; a fraction is allowed.
        every_s: The period in seconds, above 0.
        burst: Starts that may come at once, above 0. Default: the starts that fall into 10 ms, at least 1. An event loop may
            wake up some milliseconds late; without a burst, a limit of 1000 per second would be about 800.

    Raises:
        TypeError, ValueError: An argument isn't a number, or isn't above 0 and finite.

    Source: the token bucket as GCRA, the "virtual scheduling algorithm" of ITU-T I.371, whose whole state is one time.
    """

    def __init__(self, limit: float, *, every_s: float = 1.0, burst: int | None = None) -> None:
        for name, value in (("limit", limit), ("every_s", every_s), ("burst", 1 if burst is None else burst)):
            if isinstance(value, bool) or not isinstance(value, int if name == "burst" else (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
                msg = f"RateLimit: {name} must be {'an int' if name == 'burst' else 'a number'}, not {value!r}"
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
        """Take clock, chance, the number of processes to share with, and their memory.

        A second runtime on the system's clock, such as a publisher's in this process, resets nothing unless it has more
        processes. A clock of another kind resets the limit.
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
        interval_s = self.every_s / self.limit
        self._share_s = interval_s * runtime.processes
        shared = self._shared_bucket(runtime, interval_s)
        self._bucket = shared or Bucket(self._clock, self._share_s, self.burst / runtime.processes)
        self._place_apart_s = interval_s if shared else self._share_s

    def _shared_bucket(self, runtime: Runtime, interval_s: float) -> SharedBucket | None:
        """Return the bucket of all processes; None without shared memory."""
        if runtime.shared is None:
            return None
        region = runtime.shared.region()
        why = "this app has too many rate limits"
        if region is not None:
            try:
                return SharedBucket(self._clock, interval_s, self.burst, region)
            except ValueError:
                why = "another process of this `leveret work` has another rate limit in this place; restart `leveret work`"
        logger.warning("%r: this process starts at most %g jobs per second: %s", self, self.starts_per_s, why)
        return None

    @property
    def starts_per_s(self) -> float:
        """This process's share when all processes have jobs, in starts per second; bounds its prefetch."""
        return 1.0 / self._share_s

    def ready_in_s(self) -> float:
        """Return the seconds until a start is allowed, 0 for now. Asking twice takes no more than asking once."""
        return self._bucket.ready_in_s()

    def starts_now(self) -> int:
        """Return how many starts are allowed now, so that the consumer asks once for all of them."""
        return self._bucket.starts_now()

    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        """Run the job now, after a short wait in its slot, or after a snooze."""
        while (wait_s := self._bucket.take()) is None:
            await self._clock.sleep(BUSY_S)
        if wait_s > IN_SLOT_S:
            return Snooze(self._place_s(wait_s, came_back=attempt.envelope.passes > 0))
        if wait_s > ALMOST_S:
            await self._clock.sleep(wait_s)
        return await proceed(attempt)

    def _place_s(self, wait_s: float, *, came_back: bool) -> float:
        """Return the snooze of a job in seconds, which leads to a separate place among the snoozed jobs.

        A place is a time, not a reserved start: the job may come back in another process. First snoozes get consecutive
        places. The broker rounds long delays up, so that these jobs come back in clumps while later places stay unused.
        A job that came back therefore gets a place within the next few seconds, in rotation.
        """
        now = self._clock.monotonic()
        first = now + wait_s
        places, apart_s = self._bucket.places, self._place_apart_s
        if came_back:
            place = max(places[_NEAR] + apart_s, first)
            places[_NEAR] = place = place if place - now <= max(_NEAR_S, wait_s) else first
        else:
            places[_FAR] = place = max(places[_FAR] + apart_s, first)
        return min(place - now + self._rng.uniform(0.0, 0.1 * apart_s), _LONGEST_S)
