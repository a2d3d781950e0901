"""A write: one thing to do in the next transaction. Each kind of write adds its part to a `Turn`, which takes few statements.

Only `Run` and `Look` use SQLite directly.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeAlias, final

from ..leases import Count, Lease
from ..rows import BODY, JOB_ID, Row
from .delivery import SqliteDelivery, Window
from .taker import Taker

PENDING, TAKEN, OVER = range(3)
"""The states of a `Write`: it can still be cancelled; it is in a transaction; its future has ended."""

Call: TypeAlias = Callable[[sqlite3.Connection], Any]


@final
class Turn:
    """One transaction: its work, sorted by kind over all writes, and then its results."""

    def __init__(self, writes: list[Write], done: list[SqliteDelivery], back: list[SqliteDelivery]) -> None:
        self.writes = writes
        self.done = done
        """Deliveries that were acknowledged."""
        self.back = back
        """Deliveries that were given back."""
        self.jobs: list[Row] = []
        """Rows to add to `jobs`."""
        self.letters: list[Row] = []
        """Rows to add to `dead`."""
        self.gone: defaultdict[Lease, list[SqliteDelivery]] = defaultdict(list)
        """The deliveries whose rows are deleted from `jobs`, by lease."""
        self.given_back: defaultdict[Lease, list[SqliteDelivery]] = defaultdict(list)
        """The deliveries whose rows are freed, by lease."""
        self.settled: list[SqliteDelivery] = []
        """Deliveries that the writes settle; marked as settled after the commit."""
        self.closing: list[Taker] = []
        """Takers to release, after all other work."""
        self.begins: list[Begin] = []
        self.calls: list[Run] = []
        self.names: set[str] = set()
        """Queues that this transaction adds."""
        self.freed: Counter[Window] = Counter()
        """The number of places that this transaction frees, by window."""
        self.claimed: defaultdict[Taker, list[SqliteDelivery]] = defaultdict(list)
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

    def settle(self, delivery: SqliteDelivery) -> bool:
        """Delete the row of `delivery`; return False if its lease is lost, or an earlier attempt, committed late, settled it."""
        if not delivery.unsettled:
            return False
        self.gone[delivery.lease].append(delivery)
        self.freed[delivery.window] += 1
        self.settled.append(delivery)
        return True

    def gather(self) -> None:
        """Sort the work by kind; called once the leases of all takers are checked."""
        for write in self.writes:
            write.apply(self)
        for delivery in self.done:
            if delivery.lease.alive:
                self.gone[delivery.lease].append(delivery)
                self.freed[delivery.window] += 1
            else:
                self.too_late += 1
        for delivery in self.back:
            if delivery.lease.alive:
                self.given_back[delivery.lease].append(delivery)
                self.freed[delivery.window] += 1
        if self.jobs or self.given_back:
            self.added = True

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
            self.claimed[taker] += [SqliteDelivery(window, taker.lease, row) for row in rows]


class Write:
    """One thing to do, all or nothing, and the future for its result."""

    __slots__ = ("about", "deadline", "future", "job_id", "result", "size", "state")

    def __init__(self, about: str, *, deadline: float = float("inf"), job_id: str | None = None, size: int = 0) -> None:
        self.about = about
        """What is written, for messages: "job … for queue 'emails'"."""
        self.deadline = deadline
        self.job_id = job_id
        self.size = size
        """The size of the body, in bytes."""
        self.future: asyncio.Future[Any] | None = None
        self.result: Any = None
        """The result of the future, after the commit."""
        self.state = PENDING

    def apply(self, turn: Turn) -> None:
        """Add the work to `turn`."""
        raise NotImplementedError


@final
class Publish(Write):
    """Adds a job."""

    __slots__ = ("row",)

    def __init__(self, about: str, row: Row, deadline: float) -> None:
        super().__init__(about, deadline=deadline, job_id=row[JOB_ID], size=len(row[BODY]))
        self.row = row

    def apply(self, turn: Turn) -> None:
        """As `Write.apply`."""
        turn.jobs.append(self.row)


class Replacement(Write):
    """Settles a delivery and adds a row in its place."""

    __slots__ = ("delivery", "row")

    def __init__(self, about: str, delivery: SqliteDelivery, row: Row, deadline: float) -> None:
        super().__init__(about, deadline=deadline, job_id=row[JOB_ID], size=len(row[BODY]))
        self.delivery = delivery
        self.row = row


@final
class Again(Replacement):
    """Settles a delivery and adds the job of its next attempt."""

    __slots__ = ()

    def apply(self, turn: Turn) -> None:
        """As `Write.apply`."""
        if turn.settle(self.delivery):
            turn.jobs.append(self.row)


@final
class Bury(Replacement):
    """Settles a delivery and adds a dead letter."""

    __slots__ = ()

    def apply(self, turn: Turn) -> None:
        """As `Write.apply`."""
        if turn.settle(self.delivery):
            turn.letters.append(self.row)


@final
class Begin(Write):
    """Notes that the job of a delivery begins; the future returns whether its row is still claimed under the delivery's lease."""

    __slots__ = ("delivery",)

    def __init__(self, about: str, delivery: SqliteDelivery) -> None:
        super().__init__(about)
        self.delivery = delivery

    def apply(self, turn: Turn) -> None:
        """As `Write.apply`."""
        turn.begins.append(self)


@final
class Open(Write):
    """Gets a lease for a taker."""

    __slots__ = ("taker",)

    def __init__(self, about: str, taker: Taker, deadline: float = float("inf")) -> None:
        super().__init__(about, deadline=deadline)
        self.taker = taker

    def apply(self, turn: Turn) -> None:
        """Do nothing: every transaction first gets a lease for each taker that has none."""


@final
class Close(Write):
    """Frees the jobs that a taker holds, and deletes its lease."""

    __slots__ = ("taker",)

    def __init__(self, about: str, taker: Taker, deadline: float = float("inf")) -> None:
        super().__init__(about, deadline=deadline)
        self.taker = taker

    def apply(self, turn: Turn) -> None:
        """As `Write.apply`."""
        turn.closing.append(self.taker)
        turn.added = True


@final
class Run(Write):
    """Runs any statements; the future returns the result of `call`."""

    __slots__ = ("call",)

    def __init__(self, about: str, call: Call, deadline: float = float("inf")) -> None:
        super().__init__(about, deadline=deadline)
        self.call = call

    def apply(self, turn: Turn) -> None:
        """As `Write.apply`."""
        turn.calls.append(self)


@final
class Look(Write):
    """Reads in a separate transaction, which no lock of a writer stops; it isn't part of a turn."""

    __slots__ = ("call",)

    def __init__(self, about: str, call: Call, deadline: float = float("inf")) -> None:
        super().__init__(about, deadline=deadline)
        self.call = call
