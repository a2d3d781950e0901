"""Which delayed jobs are due. A store notices when its wall clock is set back, and keeps the old clock for the old rows.

`due_ms` is a moment of the wall clock. The wall clock minus the monotonic clock changes only when somebody sets the wall clock, or
when the machine was suspended. The time between two such steps is an `_Era`; the rows that were seen in it were written by its
clock. A row is due by the clock of its era or by the present clock, whichever is ahead. So a clock that is set back holds up no
row and hastens none; a clock that is set forward makes rows due, as a machine that wakes up must.

A store forgets its eras when it ends. Rows that it didn't see before a step are due by the present clock.
"""

from __future__ import annotations

import logging
import sqlite3
from typing import final

from leveret.clock import Clock

log = logging.getLogger("leveret.sqlite")

STEP_S = 1.0
"""A change of the wall clock by more than this is a step, seconds."""
_PAUSE_S = 0.05
"""Two reads of the clocks that are further apart than this say nothing: the process stood still between them."""


@final
class _Era:
    """The time between two steps of the wall clock, and the rows that were written in it: above `first`, up to `last`."""

    __slots__ = ("first", "last", "next_ms", "offset_s")

    def __init__(self, first: int, last: int, offset_s: float) -> None:
        self.first = first
        self.last = last
        self.offset_s = offset_s
        """The era's wall clock minus the monotonic clock."""
        self.next_ms: float | None = None
        """When the era's next row is due; None: not known."""


@final
class Due:
    """Decides which rows are due, by the present wall clock and by those before it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset_s = clock.now() - clock.monotonic()
        self._first = 0
        self._last = 0
        """The present era has seen the rows above `_first`, up to `_last`."""
        self._past: list[_Era] = []
        self._next_ms: float | None = None
        self._unseen = True

    def changed(self) -> None:
        """Forget what is known of the rows, since there may be others."""
        self._unseen = True
        self._next_ms = None
        for era in self._past:
            era.next_ms = None

    def look(self, connection: sqlite3.Connection) -> None:
        """See which rows are there, then whether the wall clock was set: the rows were written before the step."""
        last = self._last
        if self._unseen:
            last = max(last, connection.execute("SELECT max(seq) FROM jobs").fetchone()[0] or 0)
        before = self._clock.monotonic()
        offset_s = self._clock.now() - before
        if self._clock.monotonic() - before > _PAUSE_S:
            return
        if abs(ahead_s := offset_s - self._offset_s) > STEP_S:
            if self._last > self._first:
                self._past.append(_Era(self._first, self._last, self._offset_s))
            if ahead_s < 0:
                log.warning(
                    "the clock was set back by %.1f s; earlier delayed jobs are due by the clock before", -ahead_s
                )
            self._first, self._offset_s = self._last, offset_s
        self._last = last
        self._unseen = False

    def any(self, connection: sqlite3.Connection) -> bool:
        """Whether a row is due."""
        if self._next_ms is None:
            self._next_ms = _or_never(connection.execute("SELECT min(due_ms) FROM jobs WHERE due_ms IS NOT NULL"))
        if self._next_ms <= self._clock.now() * 1000:
            return True
        return bool(self._past) and self._any_of_the_past(connection)

    def _any_of_the_past(self, connection: sqlite3.Connection) -> bool:
        for era in self._past:
            if era.next_ms is None:
                query = "SELECT min(due_ms) FROM jobs WHERE due_ms IS NOT NULL AND seq > ? AND seq <= ?"
                era.next_ms = _or_never(connection.execute(query, (era.first, era.last)))
        self._past = [era for era in self._past if era.next_ms != float("inf")]
        now = self._clock.monotonic()
        return any(era.next_ms is not None and era.next_ms <= (now + era.offset_s) * 1000 for era in self._past)

    def rows(self, connection: sqlite3.Connection, limit: int) -> str:
        """Return the `seq` of at most `limit` rows that are due, as a JSON array."""
        now = self._clock.monotonic()
        due = ["due_ms <= ?"] + ["due_ms <= ? AND seq > ? AND seq <= ?"] * len(self._past)
        values = [self._clock.now() * 1000]
        for era in self._past:
            values += [(now + era.offset_s) * 1000, era.first, era.last]
        query = f"SELECT seq FROM jobs WHERE {' OR '.join(due)} ORDER BY due_ms, seq LIMIT ?"  # noqa: S608 - no values in it
        found: str = connection.execute(f"SELECT json_group_array(seq) FROM ({query})", (*values, limit)).fetchone()[0]  # noqa: S608
        return found


def _or_never(found: sqlite3.Cursor) -> float:
    due_ms: int | None = found.fetchone()[0]
    return float("inf") if due_ms is None else float(due_ms)
