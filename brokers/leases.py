"""A lease: a worker's entry in a store, and the jobs that are claimed under it.

Each worker has an entry, and the jobs that it holds have the id of that entry. A lease lasts `LEASE_S`, without any shared
clock: each worker raises the beat of its entry every `BEAT_S`, and reads the other entries in the same transaction. A worker whose
beat stood still over `LEASE_S / BEAT_S` beats of the observer counts as dead, and its jobs are free again. So a living worker
keeps its jobs through a jump of the wall clock, a suspended laptop, or a lock that stops everybody.

If the store can tell that a worker is dead, its jobs are free within `LOOK_S`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import final

LEASE_S = 15.0
"""A worker that sends no beat for this long loses its jobs, seconds."""
BEAT_S = 5.0
"""How often a worker sends a beat, seconds; LEASE_S is a multiple of BEAT_S."""
LOOK_S = 1.0
"""How often a worker looks for workers that are known to be dead, seconds."""


@final
class Lease:
    """One entry of a worker: its jobs belong to this process while the lease is `alive`."""

    __slots__ = ("alive", "id")

    def __init__(self) -> None:
        self.id: int | None = None
        self.alive = True


@final
class Beats:
    """The beats of one observer, and its counts of the other workers' beats."""

    def __init__(self) -> None:
        self.next = 0.0
        """When the next beat is due, `time.monotonic()` seconds."""
        self._others: dict[int, tuple[int, int]] = {}
        """By worker: the last beat that was read, and how many reads in a row found it unchanged."""

    def counted(self, beats: Iterable[tuple[int, int]], mine: Collection[int | None]) -> Count:
        """Return the result of reading all workers' beats; it counts only after `keep`, since the transaction may fail."""
        count = Count()
        for worker, beat in beats:
            if worker in mine:
                continue
            before, missed = self._others.get(worker, (beat - 1, 0))
            missed = missed + 1 if before == beat else 0
            if missed * BEAT_S >= LEASE_S:
                count.silent.append(worker)
            else:
                count.others[worker] = (beat, missed)
        return count

    def keep(self, count: Count, now: float) -> None:
        """Take over `count`, after its transaction was committed at `now`, `time.monotonic()` seconds."""
        self._others = count.others
        self.next = now + BEAT_S


@final
class Count:
    """The result of one read of the other workers' beats."""

    __slots__ = ("others", "silent")

    def __init__(self) -> None:
        self.others: dict[int, tuple[int, int]] = {}
        self.silent: list[int] = []
        """Workers without a beat for `LEASE_S`, whose jobs are free again."""
