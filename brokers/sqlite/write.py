"""A write: one thing to do in the next transaction. Each kind adds its part to a `Turn`, which is done in few statements.

Only `Run` and `Look` know SQLite.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, TypeAlias, final

from .delivery import SqliteDelivery, Window
from .lease import Count, Lease
from .rows import BODY, JOB_ID, Row
from .taker import Taker

PENDING, TAKEN, OVER = range(3)
"""States of a `Write`: it can be called back; it is in a transaction; its future is done."""

Call: TypeAlias = Callable[[sqlite3.Connection], Any]


@final
class Turn:
    """One transaction: first what it is to do, by kind and not by write, then what came of it."""

    def __init__(self, writes: list[Write]) -> None:
        self.writes = writes
        self.jobs: list[Row] = []
        """Rows to add to `jobs`."""
        self.letters: list[Row] = []
        """Rows to add to `dead`."""
        self.gone: defaultdict[Lease, list[int]] = defaultdict(list)
        """By lease: rows of `jobs` to delete."""
        self.settled: list[SqliteDelivery] = []
        """Deliveries that writes settle: they are settled once it is committed."""
        self.closing: list[Taker] = []
        """Takers to release, after all else."""
        self.calls: list[Run] = []
        self.names: set[str] = set()
        """Queues that are new by it."""
        self.freed: Counter[Window] = Counter()
        """How many places it frees in each window."""
        self.claimed: list[tuple[Taker, list[SqliteDelivery]]] = []
        self.lost: list[Taker] = []
        """Takers whose lease is lost."""
        self.beats: Count | None = None
        self.added = False
        """Whether others may find something to claim."""

    def settle(self, delivery: SqliteDelivery) -> bool:
        """Delete the row of `delivery`. False where nothing is left to do: its lease is lost, or a try that was committed late settled it."""
        if not delivery.unsettled:
            return False
        self.gone[delivery.lease].append(delivery.seq)
        self.freed[delivery.window] += 1
        self.settled.append(delivery)
        return True


class Write:
    """One thing to do, all or nothing, and the future that hears how it went."""

    __slots__ = ("about", "deadline", "future", "job_id", "result", "size", "state")

    def __init__(self, about: str, *, deadline: float = float("inf"), job_id: str | None = None, size: int = 0) -> None:
        self.about = about
        """For messages: "job … for queue 'emails'"."""
        self.deadline = deadline
        self.job_id = job_id
        self.size = size
        """Bytes of its body."""
        self.future: asyncio.Future[Any] | None = None
        self.result: Any = None
        """What the future returns, after the commit."""
        self.state = PENDING

    def apply(self, turn: Turn) -> None:
        """Add to `turn` what is to be done."""
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


@final
class Again(Write):
    """Settles a delivery and adds the job of its next attempt."""

    __slots__ = ("delivery", "row")

    def __init__(self, about: str, delivery: SqliteDelivery, row: Row, deadline: float) -> None:
        super().__init__(about, deadline=deadline, job_id=row[JOB_ID], size=len(row[BODY]))
        self.delivery = delivery
        self.row = row

    def apply(self, turn: Turn) -> None:
        """As `Write.apply`."""
        if turn.settle(self.delivery):
            turn.jobs.append(self.row)


@final
class Bury(Write):
    """Settles a delivery and adds a dead letter."""

    __slots__ = ("delivery", "row")

    def __init__(self, about: str, delivery: SqliteDelivery, row: Row, deadline: float) -> None:
        super().__init__(about, deadline=deadline, job_id=row[JOB_ID], size=len(row[BODY]))
        self.delivery = delivery
        self.row = row

    def apply(self, turn: Turn) -> None:
        """As `Write.apply`."""
        if turn.settle(self.delivery):
            turn.letters.append(self.row)


@final
class Open(Write):
    """Gets a lease for a taker."""

    __slots__ = ("taker",)

    def __init__(self, about: str, taker: Taker, deadline: float = float("inf")) -> None:
        super().__init__(about, deadline=deadline)
        self.taker = taker

    def apply(self, turn: Turn) -> None:
        """Nothing: a taker that waits to be opened gets its lease before all else, as one that lost its lease does."""


@final
class Close(Write):
    """Gives back what a taker holds, and its lease."""

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
    """Runs any statements; the future returns what `call` returned."""

    __slots__ = ("call",)

    def __init__(self, about: str, call: Call, deadline: float = float("inf")) -> None:
        super().__init__(about, deadline=deadline)
        self.call = call

    def apply(self, turn: Turn) -> None:
        """As `Write.apply`."""
        turn.calls.append(self)


@final
class Look(Write):
    """Reads: in a transaction for itself that writes nothing and that no lock stops, so that it is part of no turn."""

    __slots__ = ("call",)

    def __init__(self, about: str, call: Call, deadline: float = float("inf")) -> None:
        super().__init__(about, deadline=deadline)
        self.call = call
