"""A process's access to one SQLite file, through one thread.

The thread drives the turns: it writes all that the process collected during the last commit in one transaction.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, final

from leveret.errors import ConfigurationError
from leveret.runtime import Runtime

from ..turns import Turn, Turns
from . import siblings
from .file import File

if TYPE_CHECKING:
    from leveret.store import Change, Progress

log = logging.getLogger("leveret.sqlite")

POLL_S = 0.025
"""How often a worker checks whether another process changed the file, and whether a delayed job is due, seconds."""
_SAY_AFTER_S = 1.0
"""How long the file may stay locked before a warning is logged, seconds."""
_BUSY_PAUSE_S = 0.005

_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_MACHINE = {
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM,
}  # fmt: skip
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


@final
class Store:
    """The file at `path`, which one loop of this process uses through one thread: the `Driver` of its `turns`."""

    def __init__(self, path: str, runtime: Runtime, *, create: bool = True) -> None:
        self.path = path
        self.turns = Turns(path, runtime, log, self)
        self.enter: Callable[[sqlite3.Connection, Sequence[Change | Progress]], None] | None = None
        """Enters changes into the job store, if that is in this file."""
        self._clock = runtime.clock
        self._create = create
        self._reset()
        siblings.register(self)

    def _reset(self) -> None:
        """Set the initial state; also in a forked child, which has no thread and must not use the connection."""
        self.in_sqlite = threading.Lock()  # held while the thread is inside SQLite; a fork waits for it
        self._news = threading.Condition(self.turns.lock)
        self._noticed = False
        self._file = File(self.path, self._clock, self.turns.takers, create=self._create)

    def forked(self) -> None:
        """In a forked child: drop the parent's work. The parent's connection is kept unused, since closing it could end the parent's locks."""
        siblings.leak(self._file.abandon())
        self.turns.forked()
        self._reset()

    def start(self) -> None:
        """As `Driver.start`."""
        threading.Thread(target=self._main, name=f"leveret-sqlite {self.path}", daemon=True).start()

    def wake(self) -> None:
        """As `Driver.wake`."""
        self._news.notify()

    def tell(self, function: Callable[..., object], /, *args: object) -> None:
        """As `Driver.tell`."""
        assert self.turns.loop is not None
        try:
            self.turns.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            self.turns.orphaned()  # the thread ends, and the held jobs go to others

    @property
    def takes(self) -> bool:
        """Whether a consumption takes jobs through this store."""
        return self.turns.takers.taking

    def notice(self) -> None:
        """Look at the file now, since another store of this process wrote to it."""
        with self._news:
            self._noticed = True
            self._news.notify()

    def _main(self) -> None:
        try:
            while self._collect():
                with self.in_sqlite:
                    self._turn()
        except Exception as error:
            log.exception("the thread of %s ended; the jobs that it held are delivered again", self.path)
            self.turns.give_up(
                ConfigurationError(f"the thread of {self.path} ended because of a bug in leveret: {error!r}")
            )
        finally:
            self._file.release_all()
            self._file.disconnect()
            self.turns.end()

    def _collect(self) -> bool:
        """Wait for work; return False when the thread must end."""
        with self._news:
            patience = 0.0 if self._noticed else self.turns.patience(POLL_S)
            if patience is None or patience > 0:
                self._news.wait(patience)
            self._noticed = False
            return self.turns.collect()

    def _turn(self) -> None:
        turns, now = self.turns, time.monotonic()
        turns.prepare(now)
        turn = None
        try:
            connection = self._file.connect()
            self._look(connection)
            if not (turns.waiting or self._file.has_news(connection, now)):
                turns.rest()
                return
            connection.execute("BEGIN IMMEDIATE")
            turn = turns.take()
            self._file.transact(connection, turn)
            if turn.changes:
                assert self.enter is not None
                self.enter(connection, turn.changes)
            try:
                connection.execute("COMMIT")
            except sqlite3.Error as error:
                if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_IOERR:
                    # whether the transaction reached the disk is unknown
                    turns.doubt(turn, f"the disk of {self.path} failed during the write: {error}")
                raise
        except ConfigurationError as error:
            turns.give_up(error)
        except sqlite3.Error as error:
            self._rollback()
            if not self._file.reads_bytes(error):  # otherwise the next turn tries again, reading bytes
                self._failed(error, turn)
        except (ValueError, OverflowError) as error:  # a text that can't be UTF-8, or a number of more than 64 bits
            if turn is None:
                raise
            self._rollback()
            turns.refuse(turn, f"SQLite refuses it: {error}")
        else:
            self._file.committed(turn)
            turns.committed(turn)
            if turn.added:
                siblings.notice(self)

    def _look(self, connection: sqlite3.Connection) -> None:
        looks = self.turns.looks()
        for look in looks:
            connection.execute("BEGIN")
            look.result = look.call(connection)
            connection.execute("COMMIT")
        if looks:
            self.turns.looked(looks)

    def _rollback(self) -> None:
        self._file.rollback()
        self.turns.rolled_back()

    def _failed(self, error: sqlite3.Error, turn: Turn | None) -> None:
        code = getattr(error, "sqlite_errorcode", -1) & 0xFF
        if code in _DAMAGED:
            self._file.disconnect()
            self.turns.give_up(
                ConfigurationError(
                    f"{self.path} is damaged: {error}; restore the file, or move it away and start with a new one"
                )
            )
        elif code in _BUSY:
            self.turns.hold_up("the file is locked by another process", pause_s=_BUSY_PAUSE_S, quiet_s=_SAY_AFTER_S)
        elif code in _MACHINE or turn is None or not turn.writes:
            self.turns.fail(str(error))
            self._file.disconnect()
        else:
            self.turns.refuse(turn, f"SQLite refuses it: {error}")
