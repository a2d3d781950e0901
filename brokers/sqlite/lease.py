"""A lease: a worker's row in the file, and the jobs that are claimed under it.

Each worker has a row in `workers`, and the jobs that it holds have the id of that row. A lease lasts `LEASE_S`, without any shared
clock: each worker raises the `beat` of its row every `BEAT_S`, and reads the other rows in the same transaction. A worker whose
beat stood still over `LEASE_S / BEAT_S` beats of the observer counts as dead, and its jobs are free again. So a living worker
keeps its jobs through a jump of the wall clock, a suspended laptop, or a lock that stops everybody.

If the process of a row is known to be dead, its jobs are free within `LOOK_S`. It is known to be dead if boot and process namespace are
the same, and no process, or a different one, has its number.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from typing import final

LEASE_S = 15.0
"""A worker that sends no beat for this long loses its jobs, seconds."""
BEAT_S = 5.0
"""How often a worker sends a beat, seconds; LEASE_S is a multiple of BEAT_S."""
LOOK_S = 1.0
"""How often a worker looks for dead processes of this machine, seconds."""


@final
class Lease:
    """One row of `workers`: its jobs belong to this process while the lease is `alive`."""

    __slots__ = ("alive", "id")

    def __init__(self) -> None:
        self.id: int | None = None
        self.alive = True


@final
class Beats:
    """The beats of one observer, and its counts of the other workers' beats; independent of the database and of a shared clock."""

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

    def keep(self, count: Count) -> None:
        """Take over `count`, after its transaction was committed."""
        self._others = count.others
        self.next = time.monotonic() + BEAT_S


@final
class Count:
    """The result of one read of the other workers' beats."""

    __slots__ = ("others", "silent")

    def __init__(self) -> None:
        self.others: dict[int, tuple[int, int]] = {}
        self.silent: list[int] = []
        """Workers without a beat for `LEASE_S`, whose jobs are free again."""
