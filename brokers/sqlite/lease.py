"""A lease: a worker's row in the file, and what is claimed under it.

A worker is a row in `workers`, and what it holds bears that row's id. Its lease is `LEASE_S` long, and no clock is shared for it:
each worker raises its row's `beat` every `BEAT_S` and looks at the others' in the same transaction; one that stood still over
`LEASE_S / BEAT_S` of the observer's own beats is dead, and what it held is free again. So neither a jump of the wall clock, nor a
suspended laptop, nor a lock that stops everybody makes a living worker lose what it holds. Where a row's process is known to be gone
(same boot, same process namespace, no such process or another one of that number) its jobs are free within `LOOK_S`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from typing import final

LEASE_S = 15.0
"""A worker that showed no life for so long has lost what it holds."""
BEAT_S = 5.0
"""How often a worker shows life; LEASE_S is a multiple of it."""
LOOK_S = 1.0
"""How often a worker looks for processes of this machine that are gone."""


@final
class Lease:
    """One row of `workers`: what is claimed under it is this process's own while it is `alive`."""

    __slots__ = ("alive", "id")

    def __init__(self) -> None:
        self.id: int | None = None
        self.alive = True


@final
class Beats:
    """The beats of one observer, and what it counted of the others'. It knows neither a database nor a shared clock."""

    def __init__(self) -> None:
        self.next = 0.0
        """When the next one is due, `time.monotonic()` seconds."""
        self._others: dict[int, tuple[int, int]] = {}
        """By worker: its beat when it was last looked at, and how often in a row it had stood still by then."""

    def counted(self, beats: Iterable[tuple[int, int]], mine: Collection[int | None]) -> Count:
        """Return what follows from one look at all workers' beats; it isn't known before it is `keep`-ed: a transaction may fail."""
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
        """Take over what was counted, after its transaction was committed."""
        self._others = count.others
        self.next = time.monotonic() + BEAT_S


@final
class Count:
    """One look at the others' beats."""

    __slots__ = ("others", "silent")

    def __init__(self) -> None:
        self.others: dict[int, tuple[int, int]] = {}
        self.silent: list[int] = []
        """Those that showed no life for `LEASE_S`: what they hold is free again."""
