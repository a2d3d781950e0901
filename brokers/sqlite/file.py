"""One connection to the SQLite file: the statements of a transaction, and what is remembered between transactions."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from contextlib import suppress
from typing import final

from leveret.clock import Clock

from ..leases import LOOK_S
from ..rows import COLUMNS
from ..turns import Claimed, Taker, Takers, Turn
from .due import Due
from .identity import known_dead, my_identity
from .schema import open_file
from .statements import INSERTS, READ, text_or_bytes

log = logging.getLogger("leveret.sqlite")

_PROMOTED_AT_ONCE = 1000
_FREE_PAGES = 1000

# `+column` prevents the use of an index: the rowids are selective enough.
_CLAIM = (
    "UPDATE jobs SET claimed_by = ?, deliveries = deliveries + 1 WHERE seq IN ("  # noqa: S608 - columns of ours
    "SELECT seq FROM jobs WHERE queue = ? AND level = ? AND claimed_by IS NULL AND due_ms IS NULL ORDER BY seq LIMIT ?)"
    f" RETURNING seq, deliveries, crashes, {READ}"
)
_SETTLE = "DELETE FROM jobs WHERE seq IN (SELECT value FROM json_each(?)) AND +claimed_by = ?"
_ANY = "SELECT 1 FROM jobs WHERE queue = ? AND level = ? AND claimed_by IS NULL AND due_ms IS NULL LIMIT 1"
_BEGIN = "UPDATE jobs SET begun = 1 WHERE seq = ? AND claimed_by = ?"
_RELEASE = "UPDATE jobs SET claimed_by = NULL, begun = 0 WHERE claimed_by = ?"
_BEREAVE = (
    "UPDATE jobs SET claimed_by = NULL, begun = 0, crashes = crashes + (begun OR crashes = 0) WHERE claimed_by = ?"
)
_GIVE_BACK = "UPDATE jobs SET claimed_by = NULL, deliveries = deliveries - 1 WHERE seq IN (SELECT value FROM json_each(?)) AND +claimed_by = ?"
_FIELDS = ", ".join(COLUMNS[2:])
_PROMOTED = (
    f"INSERT INTO jobs (queue, level, {_FIELDS}) SELECT queue, level, {_FIELDS} FROM jobs"  # noqa: S608 - columns of ours
    " WHERE seq IN (SELECT value FROM json_each(?)) ORDER BY due_ms, seq"
)


@final
class File:
    """The file at `path`, through one connection; only the store's thread uses it."""

    def __init__(self, path: str, clock: Clock, takers: Takers, *, create: bool) -> None:
        self.path = path
        self._takers = takers
        self._clock = clock
        self._create = create
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._version = -1
        self._names: set[str] = set()
        self._due = Due(clock)
        self._next_look = 0.0
        self._dead: list[int] = []

    def connect(self) -> sqlite3.Connection:
        """Return the connection to the file that is at `path` now; ConfigurationError if it can't be used."""
        if self._connection is not None:
            with suppress(OSError):
                found = os.stat(self.path)  # noqa: PTH116 - each turn: a Path costs more than the call
                if (found.st_dev, found.st_ino) == self._inode:
                    return self._connection
            log.warning("%s was deleted or replaced while in use; opening the file that is there now", self.path)
            self.disconnect()
            self._due = Due(self._clock)
            for taker in self._takers.all:
                if taker.lease.id is not None:
                    self._takers.lose(taker)  # in the new file the lease's id may be another worker's
        self._connection = open_file(self.path, create=self._create)
        found = os.stat(self.path)  # noqa: PTH116
        self._inode = (found.st_dev, found.st_ino)
        self._version = -1
        self._names = set()
        return self._connection

    def reads_bytes(self, error: sqlite3.Error) -> bool:
        """Return whether `error` is about a text that isn't UTF-8; then, from now on, such texts are read as bytes.

        This isn't the default: a function call per text costs more than all other work of reading a row.
        """
        # Python raises this error itself, without a code of SQLite
        if (
            self._connection is None
            or hasattr(error, "sqlite_errorcode")
            or self._connection.text_factory is text_or_bytes
        ):
            return False
        self._connection.text_factory = text_or_bytes
        return True

    def disconnect(self) -> None:
        """Close the connection, which rolls back an open transaction."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def abandon(self) -> sqlite3.Connection | None:
        """In a forked child: forget the parent's connection without closing it."""
        connection, self._connection = self._connection, None
        return connection

    def rollback(self) -> None:
        """Undo a transaction that failed."""
        self._due.changed()
        if self._connection is not None and self._connection.in_transaction:
            try:
                self._connection.execute("ROLLBACK")
            except sqlite3.Error:
                self.disconnect()  # which rolls back

    def release_all(self) -> None:
        """Free all held jobs if the file can be written now; otherwise other workers free them when the leases end."""
        if self._connection is not None:
            with suppress(sqlite3.Error):
                for taker in self._takers.all:
                    if taker.lease.id is not None:
                        self._reap(self._connection, taker.lease.id)

    def has_news(self, connection: sqlite3.Connection, now: float) -> bool:
        """Whether a transaction is due although nothing is to be written: for a beat, a dead worker, or a job to claim."""
        takers = self._takers
        if not takers.all:
            return False
        if takers.due(now):
            return True
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            mine = set(takers.ids)
            rows = connection.execute("SELECT id, identity FROM workers").fetchall()
            self._dead = [worker for worker, identity in rows if worker not in mine and known_dead(identity)]
        self._look(connection)
        return bool(self._dead) or (takers.taking and self._due.any(connection)) or self._may_claim(connection)

    def _look(self, connection: sqlite3.Connection) -> None:
        """Check whether another connection wrote to the file; then every window may have jobs to claim."""
        version: int = connection.execute("PRAGMA data_version").fetchone()[0]
        if version != self._version:
            self._version = version
            self._due.changed()
            self._takers.may_find_jobs()
        if self._takers.taking:
            self._due.look(connection)

    def _may_claim(self, connection: sqlite3.Connection) -> bool:
        """Whether there is a job to claim; checked before the lock is taken, so that idle workers don't compete for it."""
        for taker in self._takers.all:
            for window in taker.windows if taker.taking else ():
                if window.maybe and window.held < window.prefetch:
                    if connection.execute(_ANY, (window.queue.name, window.level)).fetchone():
                        return True
                    window.maybe = False
        return False

    def transact(self, connection: sqlite3.Connection, turn: Turn) -> None:
        """Do all the work of a turn, in the transaction that the caller began."""
        takers = self._takers
        self._look(connection)
        for taker in takers.all:
            turn.names |= self._hold(connection, taker)
        if takers.all and time.monotonic() >= takers.next_beat:
            self._beat(connection, turn)
        for worker in self._dead:
            self._reap(connection, worker, _BEREAVE)
        turn.gather()
        self._settle(connection, turn)
        self._add(connection, turn)
        for begin in turn.begins:
            begin.result = connection.execute(_BEGIN, (begin.delivery.seq, begin.delivery.lease.id)).rowcount == 1
        for run in turn.calls:
            run.result = run.call(connection)
        for taker in turn.closing:
            if taker.lease.id is not None:
                self._reap(connection, taker.lease.id)
        if takers.taking and self._due.any(connection):
            self._promote(connection)
        for taker in takers.all:
            self._claim(connection, taker, turn)

    def _hold(self, connection: sqlite3.Connection, taker: Taker) -> set[str]:
        """Check that the lease is still valid, or get a new lease; return the new queues that this adds."""
        if taker.lease.id is not None:
            if connection.execute("SELECT 1 FROM workers WHERE id = ?", (taker.lease.id,)).fetchone():
                return set()
            self._takers.expired(taker)
        opened = connection.execute("INSERT INTO workers (identity) VALUES (?)", (my_identity(),))
        assert opened.lastrowid is not None
        self._takers.lease(taker, opened.lastrowid)
        return {window.queue.name for window in taker.windows} - self._names

    def _beat(self, connection: sqlite3.Connection, turn: Turn) -> None:
        """Raise the beats of this process, and free the jobs of workers whose beats stopped."""
        mine = json.dumps(self._takers.ids)
        connection.execute("UPDATE workers SET beat = beat + 1 WHERE id IN (SELECT value FROM json_each(?))", (mine,))
        for worker in self._takers.silent(turn, connection.execute("SELECT id, beat FROM workers").fetchall()):
            self._reap(connection, worker, _BEREAVE)

    def _reap(self, connection: sqlite3.Connection, worker: int, jobs: str = _RELEASE) -> None:
        """Delete a worker's row, after freeing its dead letters, and its jobs by the statement `jobs`."""
        connection.execute(jobs, (worker,))
        connection.execute("UPDATE dead SET claimed_by = NULL WHERE claimed_by = ?", (worker,))
        connection.execute("DELETE FROM workers WHERE id = ?", (worker,))
        self._takers.may_find_jobs()

    def _settle(self, connection: sqlite3.Connection, turn: Turn) -> None:
        """Delete the rows of finished jobs and free the rows that were given back."""
        for lease, deliveries in turn.gone.items():
            connection.execute(_SETTLE, (_seqs(deliveries), lease.id))
        for lease, deliveries in turn.given_back.items():
            connection.execute(_GIVE_BACK, (_seqs(deliveries), lease.id))
            self._takers.may_find_jobs()

    def _add(self, connection: sqlite3.Connection, turn: Turn) -> None:
        """Add the rows of jobs and dead letters, many per statement."""
        tables = ("jobs", turn.jobs), ("dead", turn.letters)
        turn.names |= {row[0] for _, rows in tables for row in rows} - self._names
        if turn.names:
            connection.executemany("INSERT OR IGNORE INTO queues (name) VALUES (?)", [(name,) for name in turn.names])
        for table, rows in tables:
            start = 0
            for count, statement in INSERTS[table]:
                while len(rows) - start >= count:
                    connection.execute(statement, [value for row in rows[start : start + count] for value in row])
                    start += count
        if turn.jobs:
            self._due.changed()
            self._takers.may_find_jobs()

    def _promote(self, connection: sqlite3.Connection) -> None:
        """Move the delayed jobs that are due to the ends of their levels, by new rows."""
        rows = self._due.rows(connection, _PROMOTED_AT_ONCE)
        connection.execute(_PROMOTED, (rows,))
        connection.execute("DELETE FROM jobs WHERE seq IN (SELECT value FROM json_each(?))", (rows,))
        self._due.changed()
        self._takers.may_find_jobs()

    def _claim(self, connection: sqlite3.Connection, taker: Taker, turn: Turn) -> None:
        for window, free in turn.wanted(taker):
            rows = connection.execute(_CLAIM, (taker.lease.id, window.queue.name, window.level, free)).fetchall()
            rows.sort()  # by seq: RETURNING has no order
            turn.claim(taker, window, free, rows)

    def committed(self, turn: Turn) -> None:
        """Take over the results of `turn`, which was committed."""
        self._dead.clear()
        self._names |= turn.names
        if turn.beats is not None:
            self._shrink()

    def _shrink(self) -> None:
        """Return some of the file's free pages to the disk, if there are many."""
        assert self._connection is not None
        with suppress(sqlite3.Error):  # the file was locked; the next beat tries again
            free, pages = (
                self._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_count")
            )
            if free > max(_FREE_PAGES, pages // 4):
                # a script, since `execute` would stop after the first page
                self._connection.executescript(f"PRAGMA incremental_vacuum({_FREE_PAGES})")


def _seqs(deliveries: list[Claimed]) -> str:
    return json.dumps([delivery.seq for delivery in deliveries])
