"""The takers of a store: who holds rows, under which lease, and how many more it may claim."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, final

from leveret.errors import LeveretError
from leveret.job import Queue

from .. import leases
from ..leases import Beats, Lease

if TYPE_CHECKING:
    from .claimed import Claimed
    from .turn import Turn
    from .turns import Turns


@final
class Window:
    """One level of one queue: the number of held jobs, and whether more may wait in the store. Only the driver changes it."""

    __slots__ = ("held", "level", "maybe", "prefetch", "queue", "turns")

    def __init__(self, queue: Queue, level: str, prefetch: int, turns: Turns) -> None:
        self.queue = queue
        self.level = level
        self.prefetch = prefetch
        self.turns = turns
        self.held = 0
        self.maybe = True


class Taker:
    """Holds rows under a lease: a consumption, or a reader of dead letters, which has no windows and hears of nothing."""

    def __init__(self, windows: Iterable[Window] = ()) -> None:
        self.lease = Lease()
        self.windows = list(windows)
        self.taking = bool(self.windows)
        self.ready = False
        """Whether the store has registered the taker, and can be written."""

    @property
    def holds(self) -> bool:
        """Whether it holds jobs."""
        return any(window.held for window in self.windows)

    def arrived(self, deliveries: Sequence[Claimed], /) -> None:
        """Take newly claimed deliveries. This method and the following are called on the loop."""

    def lost(self) -> None:
        """Hear that the lease was lost."""

    def changed(self) -> None:
        """Hear that the taker's queues are consumed, or aren't any more."""

    def cannot(self, error: LeveretError, /) -> None:
        """Hear that the store can't be used, and isn't tried again."""


@final
class Takers:
    """The takers of one store: their leases, windows and beats. Only the driver calls the methods."""

    def __init__(self, where: str, log: logging.Logger) -> None:
        self.all: list[Taker] = []
        self._where = where
        self._log = log
        self._beats = Beats()
        self._opened: list[Lease] = []
        self._lost: list[Taker] = []

    @property
    def taking(self) -> bool:
        """Whether a consumption takes jobs."""
        return any(taker.taking for taker in self.all)

    @property
    def ids(self) -> list[int | None]:
        """The ids of the leases."""
        return [taker.lease.id for taker in self.all]

    @property
    def next_beat(self) -> float:
        """When the next beat is due, `time.monotonic()` seconds."""
        return self._beats.next

    def due(self, now: float) -> bool:
        """Whether a transaction is due for a beat, or for a taker without a lease."""
        return now >= self._beats.next or any(taker.lease.id is None for taker in self.all)

    def may_find_jobs(self) -> None:
        """Let every window look for jobs again."""
        for taker in self.all:
            for window in taker.windows:
                window.maybe = True

    def lease(self, taker: Taker, id: int) -> None:
        """Give `taker` the lease that has got the `id` in the present transaction."""
        taker.lease.id = id
        self._opened.append(taker.lease)

    def lose(self, taker: Taker) -> None:
        """End the lease of `taker`; its deliveries are lost, and it needs a new lease."""
        taker.lease.alive = False
        taker.lease = Lease()
        for window in taker.windows:
            window.held = 0
            window.maybe = True
        self._lost.append(taker)

    def expired(self, taker: Taker) -> None:
        """As `lose`: another worker ended the lease."""
        self._log.warning(
            "the lease on %s was lost: this process sent no beat for %g s; the jobs that it held are delivered again",
            self._where,
            leases.LEASE_S,
        )
        self.lose(taker)

    def silent(self, turn: Turn, beats: Iterable[tuple[int, int]]) -> list[int]:
        """Return which of all workers, given with their `beats`, are silent and lose their jobs."""
        turn.beats = self._beats.counted(beats, self.ids)
        for _ in turn.beats.silent:
            self._log.warning(
                "a worker on %s sent no beat for %g s; the jobs that it held are delivered again",
                self._where,
                leases.LEASE_S,
            )
        return turn.beats.silent

    def rolled_back(self) -> None:
        """Undo what a transaction that failed has noted here."""
        self.may_find_jobs()
        for lease in self._opened:
            lease.id = None
        self._opened.clear()

    def committed(self, turn: Turn) -> None:
        """Take over the results of `turn`, which was committed."""
        self._opened.clear()
        turn.lost, self._lost = self._lost, []
        if turn.beats is not None:
            self._beats.keep(turn.beats, time.monotonic())
        for delivery in turn.settled:
            delivery.settled = True
        for window, count in turn.freed.items():
            window.held -= count
        for deliveries in turn.claimed.values():
            for delivery in deliveries:
                delivery.window.held += 1
        for taker in turn.closing:
            taker.lease.alive = taker.ready = False
            if taker in self.all:
                self.all.remove(taker)
        turn.ready = [taker for taker in self.all if not taker.ready]
        for taker in turn.ready:
            taker.ready = True

    def end(self) -> list[Taker]:
        """End all leases, and return the takers that had them."""
        takers, self.all = self.all, []
        for taker in takers:
            taker.lease.alive = taker.ready = False
        return takers
