"""A turn: one transaction, its work and its results."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, final

from ..leases import Count, Lease
from ..rows import Row
from .claimed import Claimed
from .takers import Taker, Window
from .writes import Again, Begin, Bury, Close, End, Publish, Run, Write

if TYPE_CHECKING:
    from leveret.store import Change, Progress


@final
class Turn:
    """One transaction: its work, sorted by kind over all writes, and then its results."""

    def __init__(self, writes: list[Write], done: list[Claimed], back: list[Claimed]) -> None:
        self.writes = writes
        self.done = done
        """Deliveries that were acknowledged."""
        self.back = back
        """Deliveries that were given back."""
        self.jobs: list[Row] = []
        """Rows of jobs to add."""
        self.letters: list[Row] = []
        """Rows of dead letters to add."""
        self.changes: list[Change | Progress] = []
        """What to enter into the job store, as `Store.write` does; only of a broker that has it."""
        self.gone: defaultdict[Lease, list[Claimed]] = defaultdict(list)
        """The deliveries whose rows are deleted, by lease."""
        self.given_back: defaultdict[Lease, list[Claimed]] = defaultdict(list)
        """The deliveries whose rows are freed, by lease."""
        self.settled: list[Claimed] = []
        """Deliveries that the writes settle; marked as settled after the commit."""
        self.closing: list[Taker] = []
        """Takers to release, after all other work."""
        self.begins: list[Begin] = []
        self.calls: list[Run] = []
        self.names: set[str] = set()
        """Queues that this transaction adds; the driver finds them."""
        self.freed: Counter[Window] = Counter()
        """The number of places that this transaction frees, by window."""
        self.claimed: defaultdict[Taker, list[Claimed]] = defaultdict(list)
        """New deliveries, by taker; told after the commit."""
        self.too_late = 0
        """The number of finished jobs whose lease was lost."""
        self.lost: list[Taker] = []
        """Takers whose leases were lost."""
        self.ready: list[Taker] = []
        """Takers that this transaction registered, or the first after a failure."""
        self.beats: Count | None = None
        self.added = False
        """Whether other workers may find jobs to claim."""

    def _settle(self, delivery: Claimed) -> bool:
        """Delete the row of `delivery`; return False if its lease is lost, or an earlier attempt, committed late, settled it."""
        if not delivery.unsettled:
            return False
        self.gone[delivery.lease].append(delivery)
        self.freed[delivery.window] += 1
        self.settled.append(delivery)
        return True

    def gather(self) -> None:
        """Sort the work by kind; called once the leases of all takers are checked."""
        ended: list[Claimed] = []
        for write in self.writes:
            if isinstance(write, Publish):
                self.jobs.append(write.row)
            elif isinstance(write, Again):
                if self._settle(write.delivery):
                    self.jobs.append(write.row)
                    self.changes += write.changes
            elif isinstance(write, Bury):
                if self._settle(write.delivery):
                    self.letters.append(write.row)
                    self.changes += write.changes
            elif isinstance(write, End):
                ended.append(write.delivery)
                if write.delivery.lease.alive:
                    self.changes += write.changes
                else:
                    write.late = True
            elif isinstance(write, Begin):
                self.begins.append(write)
            elif isinstance(write, Close):
                self.closing.append(write.taker)
            elif isinstance(write, Run):
                self.calls.append(write)
        for delivery in chain(self.done, ended):
            if delivery.lease.alive:
                self.gone[delivery.lease].append(delivery)
                self.freed[delivery.window] += 1
            else:
                self.too_late += 1
        for delivery in self.back:
            if delivery.lease.alive:
                self.given_back[delivery.lease].append(delivery)
                self.freed[delivery.window] += 1
        self.added = bool(self.jobs or self.given_back or self.closing)

    def wanted(self, taker: Taker) -> Iterator[tuple[Window, int]]:
        """Yield the windows of `taker` that may find jobs, and how many jobs each can `claim`."""
        if taker.taking and taker not in self.closing:
            for window in taker.windows:
                free = window.prefetch - window.held + self.freed[window]
                if window.maybe and free > 0:
                    yield window, free

    def claim(self, taker: Taker, window: Window, free: int, rows: Collection[Sequence[Any]]) -> None:
        """Deliver the claimed `rows` after the commit; fewer than `free` mean that no more jobs wait."""
        window.maybe = len(rows) == free
        if rows:
            self.claimed[taker] += [Claimed(window, taker.lease, row) for row in rows]
