"""One thing to do in a transaction, and what a transaction did."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias, final

from .delivery import SqliteDelivery, Window
from .lease import Count
from .rows import Row
from .taker import Taker

PENDING, TAKEN, OVER = range(3)
"""States of a `Write`: it can be called back; it is in a transaction; it was told how it went."""


Call: TypeAlias = Callable[[sqlite3.Connection], Any]


@final
class Write:
    """One thing to do in the next transaction, all or nothing, and the future that hears how it went."""

    __slots__ = (
        "about",
        "call",
        "closes",
        "deadline",
        "delivery",
        "future",
        "job",
        "job_id",
        "letter",
        "opens",
        "reads",
        "state",
    )

    def __init__(
        self, about: str, *, deadline: float = float("inf"), job_id: str | None = None, job: Row | None = None, letter: Row | None = None,
        delivery: SqliteDelivery | None = None, opens: Taker | None = None, closes: Taker | None = None, call: Call | None = None,
        reads: Call | None = None,
    ) -> None:  # fmt: skip
        self.about = about
        """For messages: "job … for queue 'emails'"."""
        self.deadline = deadline
        self.job_id = job_id
        self.job = job
        """A row for `jobs`."""
        self.letter = letter
        """A row for `dead`."""
        self.delivery = delivery
        """Is settled by it."""
        self.opens = opens
        self.closes = closes
        self.call = call
        """Anything else; what it returns is the future's result."""
        self.reads = reads
        """As `call`, but in a transaction that only reads, and that no lock stops."""
        self.future: asyncio.Future[Any] | None = None
        self.state = PENDING


@final
class Turn:
    """What one transaction did, to be told once it is committed."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[Write, Any]] = []
        self.claimed: list[tuple[Taker, list[SqliteDelivery]]] = []
        self.lost: list[Taker] = []
        self.closed: list[Taker] = []
        self.freed: Counter[Window] = Counter()
        self.settled: list[SqliteDelivery] = []
        self.names: set[str] = set()
        self.beats: Count | None = None
        self.added = False
