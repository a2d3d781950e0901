"""A process's access to one SQLite file, through one thread.

`Store` collects the publishes, settlements and claims of its process. Its thread writes all that were collected in one
transaction, so that everything which came during the last commit shares the cost of the next.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, final

from leveret.backoff import full_jitter
from leveret.broker import PublisherState
from leveret.errors import BrokerUnavailable, ConfigurationError, LeveretError, PublishTimeout
from leveret.runtime import Runtime

from . import siblings
from .delivery import SqliteDelivery
from .file import File
from .taker import Taker, Takers
from .write import OVER, PENDING, TAKEN, Look, Open, Turn, Write

log = logging.getLogger("leveret.sqlite")

POLL_S = 0.025
"""How often a worker checks whether another process changed the file, and whether a delayed job is due, seconds."""
BATCH_BYTES = 32 << 20
"""At most this many bytes of bodies in one transaction; a single larger job is written alone."""
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
    """The file at `path`, which one loop of this process uses through one thread."""

    def __init__(self, path: str, runtime: Runtime, *, create: bool = True) -> None:
        self.path = path
        self._runtime = runtime
        self._create = create
        self._reset()
        siblings.register(self)

    def _reset(self) -> None:
        """Set the initial state; also in a forked child, which has no thread and must not use the connection."""
        self._wake = threading.Condition(threading.Lock())
        self.in_sqlite = threading.Lock()  # held while the thread is inside SQLite; a fork waits for it
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # used by the loop: collected in this turn
        self._out: list[Write] = []
        self._out_done: list[SqliteDelivery] = []
        self._out_back: list[SqliteDelivery] = []
        self._flushing = False
        # under the lock: handed over to the thread
        self._in: list[Write] = []
        self._in_done: list[SqliteDelivery] = []
        self._in_back: list[SqliteDelivery] = []
        self._noticed = False
        self._stop_by: float | None = None
        self._stopped: asyncio.Future[None] | None = None
        # used by the thread
        self._writes: list[Write] = []
        self._done: list[SqliteDelivery] = []
        self._back: list[SqliteDelivery] = []
        self._takers = Takers(self.path)
        self._file = File(self.path, self._runtime.clock, self._takers, create=self._create)
        self._failures = 0
        self._not_before = 0.0
        self._failing_since: float | None = None
        self._said = False
        self._why = ""
        self.publishing = PublisherState.at(self._runtime.clock.now(), "ready")
        """Whether the file can be written, as `Broker.publishing`."""

    async def run(self, write: Write) -> Any:
        """Do `write` and return its result; raise at its deadline, after which a write that isn't in a transaction is never done."""
        loop = self._attach()
        if self.closed:
            raise self._unavailable(write, "the broker is closed")
        if write.deadline <= time.monotonic():
            raise self._late(write, maybe=False)
        write.future = loop.create_future()
        timer = loop.call_at(write.deadline, self._expire, write) if write.deadline != float("inf") else None
        self._out.append(write)
        self._flush_soon(loop)
        try:
            return await write.future
        except asyncio.CancelledError:
            with self._wake:
                if write.state == PENDING:
                    write.state = OVER
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def post(self, write: Write) -> None:
        """Do `write` as soon as the file can be written, without waiting for it."""
        loop = self._attach()
        self._out.append(write)
        self._flush_soon(loop)

    def done(self, delivery: SqliteDelivery) -> None:
        """Delete the row of `delivery` in the next transaction, trying until it succeeds."""
        delivery.settled = True
        loop = self._attach()
        self._out_done.append(delivery)
        self._flush_soon(loop)

    def give_back(self, delivery: SqliteDelivery) -> None:
        """Free the row of `delivery` in the next transaction, trying until it succeeds."""
        delivery.settled = True
        loop = self._attach()
        self._out_back.append(delivery)
        self._flush_soon(loop)

    def _attach(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._flushing = False
        return loop

    def _flush_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        # wakes the thread once per loop turn, with everything collected in that turn
        if not self._flushing:
            self._flushing = True
            loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        with self._wake:
            self._in += self._out
            self._in_done += self._out_done
            self._in_back += self._out_back
            self._out, self._out_done, self._out_back = [], [], []
            if self._stop_by is None and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._main, name=f"leveret-sqlite {self.path}", daemon=True)
                self._thread.start()
            self._wake.notify()

    def _expire(self, write: Write) -> None:
        assert write.future is not None
        if write.future.done():
            return
        with self._wake:
            maybe = write.state == TAKEN
            write.state = OVER
        write.future.set_exception(self._late(write, maybe=maybe))

    def _late(self, write: Write, *, maybe: bool) -> PublishTimeout:
        why = "the write is under way" if maybe else self._why or "its deadline passed before it could be written"
        return PublishTimeout(
            f"{write.about} wasn't confirmed in time by {self.path}: {why}", job_id=write.job_id, maybe_published=maybe
        )

    def forked(self) -> None:
        """In a forked child: drop the parent's work. The parent's connection is kept unused, since closing it could end the parent's locks."""
        siblings.leak(self._file.abandon())
        self._takers.end()
        self._reset()

    async def close(self, timeout_s: float) -> None:
        """End the thread, which has `timeout_s` to do the remaining work. Idempotent."""
        loop = self._attach()
        if self._thread is None or not self._thread.is_alive():
            self._stop_by = 0.0
            return
        self._flush()
        stopped = loop.create_future()
        with self._wake:
            self._stop_by = time.monotonic() + timeout_s
            self.publishing = self.publishing.then(self._runtime.clock.now(), "closed")
            self._stopped = stopped
            self._wake.notify()
        with suppress(TimeoutError):
            # the thread ends by itself unless the disk hangs; then it is left running, as a daemon
            await asyncio.wait_for(stopped, timeout_s + 1.0)

    def _can_write(self, why_not: str) -> None:
        self._why = why_not
        if not self.closed:
            now = self._runtime.clock.now()
            self.publishing = self.publishing.then(now, "blocked" if why_not else "ready", " ".join(why_not.split()))

    @property
    def why(self) -> str:
        """Why the file can't be written now; empty if it can."""
        return self._why

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._stop_by is not None

    def notice(self) -> None:
        """Look at the file now, since another store of this process wrote to it."""
        with self._wake:
            self._noticed = True
            self._wake.notify()

    @property
    def takes(self) -> bool:
        """Whether a consumption takes jobs through this store."""
        return self._takers.taking

    def _main(self) -> None:
        try:
            while self._collect():
                with self.in_sqlite:
                    self._turn()
        except Exception as error:
            log.exception("the thread of %s ended; the jobs that it held are delivered again", self.path)
            self._give_up(ConfigurationError(f"the thread of {self.path} ended because of a bug in leveret: {error!r}"))
        finally:
            self._end()

    def _end(self) -> None:
        self._file.release_all()
        self._file.disconnect()
        kept = sum(delivery.lease.alive for delivery in self._done)
        if kept:
            log.warning(
                "%d finished jobs couldn't be deleted from %s and will run again: %s", kept, self.path, self._why
            )
        self._takers.end()
        with self._wake:
            left = [*self._writes, *self._in]
        self._post(_refuse, [(write, self._unavailable(write, "the broker is closed")) for write in left])
        self._post(self._ended)

    def _ended(self) -> None:
        if self._stopped is not None and not self._stopped.done():
            self._stopped.set_result(None)

    def _collect(self) -> bool:
        """Wait for work; return False when the thread must end."""
        with self._wake:
            if not (self._in or self._in_done or self._in_back or self._noticed):
                patience = self._patience()
                if self._stop_by is not None:
                    patience = min(self._stop_by - time.monotonic(), self._not_before - time.monotonic())
                if patience is None or patience > 0:
                    self._wake.wait(patience)
            self._noticed = False
            self._writes += self._in
            self._done += self._in_done
            self._back += self._in_back
            self._in, self._in_done, self._in_back = [], [], []
            if self._stop_by is None:
                return True
            return bool(self._writes or self._done or self._back) and time.monotonic() < self._stop_by

    def _patience(self) -> float | None:
        """Return how long to wait for work, seconds; None means for ever."""
        now = time.monotonic()
        if self._not_before > now:
            return self._not_before - now
        if self._writes or self._done or self._back:
            return 0.0
        if self.takes:
            return POLL_S
        return max(0.0, self._takers.next_beat - now) if self._takers.all else None

    def _turn(self) -> None:
        now = time.monotonic()
        # a write whose deadline passed is never taken, even if the busy loop hasn't expired it yet
        self._writes = [write for write in self._writes if write.state == PENDING and write.deadline > now]
        takers = self._takers.all
        takers += [write.taker for write in self._writes if isinstance(write, Open) and write.taker not in takers]
        taken: list[Write] = []
        try:
            connection = self._file.connect()
            self._read(connection)
            if not (self._writes or self._done or self._back) and not self._file.has_news(connection, now):
                if not self._said:
                    self._failing_since = None
                return
            connection.execute("BEGIN IMMEDIATE")
            taken = self._take()
            turn = Turn(taken, self._done, self._back)
            self._file.transact(connection, turn)
            try:
                connection.execute("COMMIT")
            except sqlite3.Error as error:
                if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_IOERR:
                    self._doubt(taken, error)  # whether the transaction reached the disk is unknown
                raise
        except ConfigurationError as error:
            self._give_up(error)
        except sqlite3.Error as error:
            self._rollback()
            if not self._file.reads_bytes(error):  # otherwise the next turn tries again, reading bytes
                self._failed(error, taken)
        except (ValueError, OverflowError) as error:  # a text that can't be UTF-8, or a number of more than 64 bits
            self._rollback()
            self._refused(error, taken)
        else:
            self._committed(turn)

    def _rollback(self) -> None:
        self._file.rollback()
        self._takers.rolled_back()
        with self._wake:
            for write in self._writes:
                if write.state == TAKEN:
                    write.state = PENDING

    def _read(self, connection: sqlite3.Connection) -> None:
        looks = [write for write in self._writes if isinstance(write, Look)]
        for look in looks:
            connection.execute("BEGIN")
            look.result = look.call(connection)
            connection.execute("COMMIT")
        if looks:
            self._writes = [write for write in self._writes if not isinstance(write, Look)]
            self._post(_answer, looks)

    def _take(self) -> list[Write]:
        """Take the writes of this transaction; from here on a deadline can't cancel them."""
        taken: list[Write] = []
        size = 0
        now = time.monotonic()  # waiting for the lock may have taken a while
        with self._wake:
            for write in self._writes:
                size += write.size
                if taken and size > BATCH_BYTES:
                    break
                if write.state == PENDING and write.deadline > now:
                    write.state = TAKEN
                    taken.append(write)
        return taken

    def _committed(self, turn: Turn) -> None:
        self._writes = [write for write in self._writes if write.state == PENDING]
        self._done.clear()
        self._back.clear()
        self._takers.committed(turn)
        self._file.committed(turn)
        if turn.too_late:
            log.warning(
                "%d finished jobs of %s are delivered again, since their lease was lost", turn.too_late, self.path
            )
        self._failures = 0
        self._not_before = 0.0
        if self._why:
            self._can_write("")
        if self._said:
            assert self._failing_since is not None
            log.info("%s can be written again, after %.1f s", self.path, time.monotonic() - self._failing_since)
        self._failing_since, self._said = None, False
        self._post(self._tell, turn)
        if turn.added:
            siblings.notice(self)

    def _tell(self, turn: Turn) -> None:
        """On the loop: report the results of `turn`."""
        _answer(turn.writes)
        for taker in turn.lost:
            if taker.listener is not None:
                taker.listener.lost()
        _changed(turn.ready)
        for taker, deliveries in turn.claimed.items():
            assert taker.listener is not None
            taker.listener.arrived(deliveries)

    def _post(self, function: Callable[..., object], *args: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            # the loop was closed without a call of close(): end the thread, and release the held jobs to others
            with self._wake:
                self._stop_by = self._stop_by or 0.0

    def _unavailable(self, write: Write, why: str) -> BrokerUnavailable:
        return BrokerUnavailable(f"{write.about} wasn't written to {self.path}: {why}", job_id=write.job_id)

    def _fail(self, writes: list[Write], error: Callable[[Write], LeveretError]) -> None:
        with self._wake:
            for write in writes:
                write.state = OVER
        self._writes = [write for write in self._writes if write.state != OVER]
        self._post(_refuse, [(write, error(write)) for write in writes])

    def _doubt(self, taken: list[Write], error: sqlite3.Error) -> None:
        self._fail(
            taken,
            lambda write: PublishTimeout(
                f"{write.about}: the disk of {self.path} failed during the write: {error}",
                job_id=write.job_id, maybe_published=True,
            ),
        )  # fmt: skip

    def _failed(self, error: sqlite3.Error, taken: list[Write]) -> None:
        code = getattr(error, "sqlite_errorcode", -1) & 0xFF
        if code in _DAMAGED:
            self._file.disconnect()
            self._give_up(
                ConfigurationError(
                    f"{self.path} is damaged: {error}; restore the file, or move it away and start with a new one"
                )
            )
            return
        if code not in _BUSY | _MACHINE and taken:
            self._refused(error, taken)
            return
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if code in _BUSY:
            # nothing is refused or lost: the writes are tried again until their deadlines pass
            self._can_write("the file is locked by another process")
            self._not_before = now + _BUSY_PAUSE_S
        else:
            self._can_write(str(error))
            self._failures += 1
            base_s, cap_s = self._runtime.settings.reconnect_base_s, self._runtime.settings.reconnect_cap_s
            self._not_before = now + full_jitter(self._failures, base_s=base_s, cap_s=cap_s, rng=self._runtime.rng)
            failed = [write for write in self._writes if write.future is not None and not isinstance(write, Open)]
            self._fail(failed, lambda write: self._unavailable(write, self._why))
            self._file.disconnect()
        if (
            (self._takers.all or self._done)
            and not self._said
            and (code not in _BUSY or now - self._failing_since > _SAY_AFTER_S)
        ):
            self._said = True
            for taker in self._takers.all:
                taker.ready = False
            self._post(_changed, list(self._takers.all))
            log.warning("%s can't be written: %s; trying again", self.path, self._why)

    def _refused(self, error: Exception, taken: list[Write]) -> None:
        """Try the writes one by one, so that the write which SQLite refuses fails alone."""
        if len(taken) == 1:
            self._fail(taken, lambda write: self._unavailable(write, f"SQLite refuses it: {error}"))
            return
        waiting, left = self._writes, list[Write]()
        for write in waiting:
            self._writes = [write]
            self._turn()
            left += self._writes
        self._writes = left

    def _give_up(self, error: ConfigurationError) -> None:
        """Fail everything with `error`: the file can't be used, and waiting won't help."""
        takers = self._takers.end()
        self._can_write(str(error))
        self._fail(self._writes, lambda write: error if write.job_id is None else _unusable(write, error))
        if self._done:
            log.warning("%d finished jobs couldn't be deleted from %s: %s", len(self._done), self.path, error)
        self._done.clear()
        self._back.clear()
        for taker in takers:
            if taker.listener is not None:
                self._post(taker.listener.cannot, error)


def _unusable(write: Write, error: ConfigurationError) -> BrokerUnavailable:
    """Return the error of a publish, a retry or a burial to a file that can't be used: publishers handle `PublishError` only."""
    unavailable = BrokerUnavailable(str(error), job_id=write.job_id)
    unavailable.__cause__ = error
    return unavailable


def _changed(takers: Iterable[Taker]) -> None:
    """On the loop: tell the consumptions that their queues are consumed, or aren't any more."""
    for taker in takers:
        if taker.listener is not None:
            taker.listener.changed()


def _answer(writes: Iterable[Write]) -> None:
    """On the loop: end the futures of the writes that succeeded."""
    for write in writes:
        if write.future is not None and not write.future.done():
            write.future.set_result(write.result)


def _refuse(refused: Iterable[tuple[Write, LeveretError]]) -> None:
    """On the loop: end the futures of the writes that failed."""
    for write, error in refused:
        if write.future is not None and not write.future.done():
            write.future.set_exception(error)
