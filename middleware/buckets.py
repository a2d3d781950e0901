"""The token buckets behind `RateLimit`: one for a process alone, one for all processes of a `leveret work`.

Both are GCRA, the "virtual scheduling algorithm" of ITU-T I.371: one time is the whole state of a bucket.
"""

from __future__ import annotations

from leveret.clock import Clock
from leveret.runtime import Region

IN_SLOT_S = 0.25
"""The longest wait that a job spends in its slot; for a longer one it goes back to the broker."""
# Sums of floats: a start that is due but for the last bits is due, or a clock moved by exactly that wait never gets there.
ALMOST_S = 1e-6
_FRESH_S = 0.01
BUSY_S = 0.001
"""How long to wait for the lock of a region before the next try."""

# Where a region keeps what. All times are CLOCK_MONOTONIC, which all processes of a machine share.
_CHECK, _NEXT, _BEGAN, _PLACES = 0, 1, 2, slice(3, 5)


class Bucket:
    """The bucket of one process.

    Args:
        clock: The clock.
        interval_s: Seconds between two starts.
        burst: Starts that may come at once.
    """

    def __init__(self, clock: Clock, interval_s: float, burst: float) -> None:
        self._clock = clock
        self._interval_s = interval_s
        self._ahead_s = (max(1.0, burst) - 1.0) * interval_s
        self._next = float("-inf")  # GCRA's "theoretical arrival time"
        self.places: list[float] | memoryview[float] = [float("-inf")] * 2
        """The last places that were given to snoozed jobs: to first snoozes, and to jobs that came back."""

    def ready_in_s(self) -> float:
        """Return the seconds until a start is allowed, 0 for now."""
        wait_s = self._next - self._ahead_s - self._clock.monotonic()
        return wait_s if wait_s > ALMOST_S else 0.0

    def starts_now(self) -> int:
        """Return how many starts are allowed now, at once."""
        if self.ready_in_s() > 0:
            return 0
        left_s = self._ahead_s - max(0.0, self._next - self._clock.monotonic())
        return int(max(0.0, left_s + ALMOST_S) / self._interval_s) + 1

    def take(self) -> float | None:
        """Take a start; return the seconds until it. Take nothing if they are more than IN_SLOT_S. None: ask again in a moment."""
        now = self._clock.monotonic()
        wait_s = self._next - self._ahead_s - now
        if wait_s <= IN_SLOT_S:  # taken before the wait, so that a job that comes meanwhile waits behind this one
            self._next = max(self._next, now) + self._interval_s
        return wait_s


class SharedBucket:
    """The bucket of all processes of one `leveret work`, in a region of their shared memory.

    A process draws starts in blocks, so that few jobs need the region's lock. Drawn starts that stay unused for 10 ms go back
    with the next draw. A block is as large as the last one was used, doubled while the process starts without a pause, and at
    most `burst`: a process with few jobs keeps no starts from the others.

    Raises:
        ValueError: the region has another rate limit.
    """

    def __init__(self, clock: Clock, interval_s: float, burst: int, region: Region) -> None:
        self._clock = clock
        self._interval_s = interval_s
        self._ahead_s = (burst - 1) * interval_s
        self._burst = burst
        self._region = region
        self._numbers = numbers = region.numbers
        # One number, written at once: processes that start at the same time write the same.
        check = float(hash((interval_s, burst)) or 1)
        if not numbers[_CHECK]:
            numbers[_CHECK] = check
        if numbers[_CHECK] != check:
            msg = "the region has another rate limit"
            raise ValueError(msg)
        self.places: list[float] | memoryview[float] = numbers[_PLACES]
        """As in `Bucket`. Written without the lock: two processes at the same moment give the same place, which does no harm."""
        self._left = 0
        """Starts that are drawn and not used."""
        self._block = 1
        self._drawn = self._fresh_until = float("-inf")
        self._busy_since: float | None = None

    def ready_in_s(self) -> float:
        """Return the seconds until a start is allowed. If 0, starts are drawn, and no other process can take them meanwhile."""
        now = self._clock.monotonic()
        if self._left and now < self._fresh_until:
            return 0.0
        wait_s = self._draw(now, wait_at_most_s=0.0)
        return min(BUSY_S, self._interval_s) if wait_s is None else wait_s

    def starts_now(self) -> int:
        """Return how many starts are drawn."""
        return self._left

    def take(self) -> float | None:
        """Take a start; return the seconds until it. Take nothing if they are more than IN_SLOT_S. None: ask again in a moment."""
        now = self._clock.monotonic()
        if not self._left or now >= self._fresh_until:
            wait_s = self._draw(now, wait_at_most_s=IN_SLOT_S)
            if wait_s != 0.0:
                return wait_s
        self._left -= 1
        return 0.0

    def _draw(self, now: float, wait_at_most_s: float) -> float | None:
        """Give back what is left, and draw the next block; return the seconds until a start, None while the lock is busy.

        Without a start now, draw the next start alone, unless it is further than `wait_at_most_s`.
        """
        locked = self._region.lock()
        if not locked and self._still_busy(now):
            return None
        try:
            self._busy_since = None if locked else self._busy_since
            numbers, interval_s = self._numbers, self._interval_s
            used = self._block - self._left
            coming, began = numbers[_NEXT], numbers[_BEGAN]
            # A bucket that was full since then has regained these starts by itself.
            if self._left and began <= self._drawn:
                coming -= self._left * interval_s
            if coming <= now:
                coming = began = now
            wait_s = coming - self._ahead_s - now
            self._left = count = 0
            if wait_s <= ALMOST_S:
                hot = now < self._fresh_until
                allowed = int((ALMOST_S - wait_s) / interval_s) + 1
                self._left = count = self._block = max(1, min(self._burst, allowed, used * 2 if hot else used))
                self._drawn, self._fresh_until = now, now + _FRESH_S
                wait_s = 0.0
            else:
                self._block = max(1, used)
                count = 1 if wait_s <= wait_at_most_s else 0
            numbers[_NEXT] = coming + count * interval_s
            numbers[_BEGAN] = began
        finally:
            if locked:
                self._region.unlock()
        return wait_s

    def _still_busy(self, now: float) -> bool:
        """Whether to wait for the lock. A holder keeps it for microseconds, unless it was stopped: then go on without the lock.

        A stopped holder writes an old time when it goes on. Such a time is past, so at most a burst starts too early.
        """
        if self._busy_since is None:
            self._busy_since = now
        return now - self._busy_since < min(self._interval_s, IN_SLOT_S)
