"""Inspect and repair the queues of a SQLite file, for the command line."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any, final

from leveret.admin import DeadLetter, DeadLetters, Depth
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable, ConfigurationError, PublishTimeout
from leveret.job import Queue
from leveret.runtime import Runtime

from ..rows import Letter, Row, packed, unpack
from ..turns import Call, Close, Look, Open, Run, Taker, Write
from .statements import INSERTS, READ
from .store import Store

log = logging.getLogger("leveret.sqlite")

_PAGE = 100
_PURGED_AT_ONCE = 5000

# each is answered from one of the partial indexes, without reading the jobs
_READY = "SELECT level, count(*) FROM jobs WHERE queue = ? AND claimed_by IS NULL AND due_ms IS NULL GROUP BY level"
_DUE = "SELECT level, due_ms <= ?, count(*) FROM jobs WHERE due_ms IS NOT NULL AND queue = ? GROUP BY 1, 2"
_HELD = "SELECT count(*) FROM jobs WHERE claimed_by IS NOT NULL AND queue = ?"
_PURGE = (
    "DELETE FROM jobs WHERE seq IN (SELECT seq FROM jobs WHERE queue = ? AND claimed_by IS NULL AND due_ms IS NULL"
    " UNION ALL SELECT seq FROM jobs WHERE queue = ? AND due_ms <= ? LIMIT ?)"
)
_PAGE_OF_DEAD = (
    "UPDATE dead SET claimed_by = ? WHERE seq IN ("  # noqa: S608 - columns of ours
    "SELECT seq FROM dead WHERE queue = ? AND claimed_by IS NULL AND seq > ? AND seq <= ? ORDER BY seq LIMIT ?)"
    f" RETURNING seq, {READ}"
)


def _changed(statement: str, arguments: tuple[object, ...], file: sqlite3.Connection) -> int:
    return file.execute(statement, arguments).rowcount


@final
class _Letter(Letter):
    """A row of `dead` that a reader holds."""

    __slots__ = ()


@final
class _Letters:
    """The dead letters of one queue, claimed page by page under a separate lease."""

    def __init__(self, admin: SqliteAdmin, queue: Queue, taker: Taker) -> None:
        self._admin = admin
        self._queue = queue.name
        self._taker = taker

    def __aiter__(self) -> AsyncIterator[DeadLetter]:
        return self._pages()

    async def _pages(self) -> AsyncIterator[DeadLetter]:
        if self._taker.lease.id is None:
            return  # the file doesn't exist
        # jobs buried later aren't read: a replay that fails at once would be read again and again
        last = await self._admin.run(
            "the dead letters",
            lambda file: file.execute("SELECT max(seq) FROM dead WHERE queue = ?", (self._queue,)).fetchone()[0],
        )
        seen = 0
        while last is not None:
            page: list[Any] = await self._admin.run("the dead letters", partial(self._claim, seen, last))
            for seq, *row in page:
                yield _Letter(seq, unpack(row)[0])
            if len(page) < _PAGE:
                return
            seen = page[-1][0]

    def _claim(self, seen: int, last: int, file: sqlite3.Connection) -> list[Any]:
        return sorted(file.execute(_PAGE_OF_DEAD, (self._taker.lease.id, self._queue, seen, last, _PAGE)).fetchall())

    async def replay(self, letter: DeadLetter, envelope: Envelope) -> None:
        """As `DeadLetters.replay`, in one transaction. BrokerUnavailable if the lease was lost meanwhile; then nothing is published."""
        await self._take(letter, f"the replay of job {envelope.job_id}", packed(letter.envelope.queue, envelope, None))

    async def drop(self, letter: DeadLetter) -> None:
        """As `DeadLetters.drop`."""
        await self._take(letter, f"the drop of job {letter.envelope.job_id}", None)

    async def _take(self, letter: DeadLetter, about: str, row: Row | None) -> None:
        if not isinstance(letter, _Letter):
            msg = f"replay() and drop() take a dead letter of the SQLite broker, not {letter!r}"
            raise TypeError(msg)
        seq = letter.seq

        def take(file: sqlite3.Connection) -> bool:
            if not file.execute(
                "DELETE FROM dead WHERE seq = ? AND claimed_by = ?", (seq, self._taker.lease.id)
            ).rowcount:
                return False
            if row is not None:
                file.execute(INSERTS["jobs"][-1][1], row)
            return True

        if not await self._admin.run(about, take):
            msg = f"{about} wasn't done: this reader no longer holds the dead letter; read it again"
            raise BrokerUnavailable(msg, job_id=letter.envelope.job_id)


@final
class _Open(AbstractAsyncContextManager[DeadLetters, None]):
    """Holds the dead letters of a queue for the time of a `with` block."""

    def __init__(self, admin: SqliteAdmin, queue: Queue) -> None:
        self._admin = admin
        self._queue = queue
        self._taker = Taker()

    async def __aenter__(self) -> DeadLetters:
        try:
            await self._admin.hold(self._taker)
        except BaseException:
            await self._admin.release(self._taker, self._queue)
            raise
        return _Letters(self._admin, self._queue, self._taker)

    async def __aexit__(self, *_: object) -> None:
        await self._admin.release(self._taker, self._queue)


@final
class SqliteAdmin:
    """An `Admin` on the SQLite file at `path`; a missing file counts as a file without queues, and isn't created.

    Every call ends within the setting `connect_timeout_s`: BrokerUnavailable if the file stays locked.
    """

    def __init__(self, path: str, runtime: Runtime) -> None:
        self._path = Path(path)
        self._runtime = runtime
        self._turns = Store(path, runtime, create=False).turns

    async def run(self, about: str, call: Call) -> Any:
        """Run `call` in a transaction that writes."""
        return await self._run(Run(about=about, call=call, deadline=self._deadline()))

    async def _run(self, write: Write) -> Any:
        try:
            return await self._turns.run(write)
        except PublishTimeout as error:
            raise BrokerUnavailable(str(error)) from error

    def _deadline(self) -> float:
        return time.monotonic() + self._runtime.settings.connect_timeout_s

    async def depths(self, queues: Sequence[Queue]) -> list[Depth]:
        """As `Admin.depths`; no lock stops the read. The jobs of a dead worker count as unsettled until another worker runs."""
        if not self._path.exists():
            return [_depth(queue, {}, 0, 0, 0, exists=False) for queue in queues]
        now_ms = self._runtime.clock.now() * 1000

        def read(file: sqlite3.Connection) -> list[Depth]:
            return [self._read(file, queue, now_ms) for queue in queues]

        rows: list[Depth] = await self._run(Look(about="the read of the queues", call=read, deadline=self._deadline()))
        return rows

    def _read(self, file: sqlite3.Connection, queue: Queue, now_ms: float) -> Depth:
        def count(statement: str) -> int:
            found: int = file.execute(statement, (queue.name,)).fetchone()[0]
            return found

        levels = Counter[str]()
        for level, jobs in file.execute(_READY, (queue.name,)).fetchall():
            levels[_text(level)] += jobs
        delayed = 0
        for level, due, jobs in file.execute(_DUE, (now_ms, queue.name)).fetchall():
            if due:
                levels[_text(level)] += jobs
            else:
                delayed += jobs
        dead, known = (
            count("SELECT count(*) FROM dead WHERE queue = ?"),
            count("SELECT count(*) FROM queues WHERE name = ?"),
        )
        return _depth(queue, levels, count(_HELD), delayed, dead, exists=known > 0)

    async def delayed(self) -> None:
        """As `Admin.delayed`; returns None, since `depths` counts the delayed jobs of each queue."""

    async def notes(self) -> list[str]:
        """As `Admin.notes`; nothing is known that would slow it down."""
        return []

    async def purge(self, queue: Queue) -> int:
        """As `Admin.purge`, some thousands of jobs per transaction, so that workers get their turns in between."""
        if not self._path.exists():
            return 0
        purged = 0
        while True:
            now_ms = self._runtime.clock.now() * 1000
            arguments = (queue.name, queue.name, now_ms, _PURGED_AT_ONCE)
            count: int = await self.run(f"the purge of queue {queue.name!r}", partial(_changed, _PURGE, arguments))
            purged += count
            if count < _PURGED_AT_ONCE:
                return purged

    def dead(self, queue: Queue) -> AbstractAsyncContextManager[DeadLetters, None]:
        """As `Admin.dead`; if this process dies, its letters are free again as the jobs of a dead worker are."""
        return _Open(self, queue)

    async def hold(self, taker: Taker) -> None:
        """Get a lease, if the file exists."""
        if self._path.exists():
            await self._run(Open(about="opening the dead letters", taker=taker, deadline=self._deadline()))

    async def release(self, taker: Taker, queue: Queue) -> None:
        """Free the letters that are held under the lease."""
        if not self._path.exists():
            return
        try:
            await self._run(Close(about="closing the dead letters", taker=taker, deadline=self._deadline()))
        except (BrokerUnavailable, ConfigurationError) as error:
            # they are free again when this process has ended, as those of a killed process are
            log.warning(
                "the dead letters of queue %r can't be opened by others until this process ends: %s", queue.name, error
            )

    async def close(self) -> None:
        """As `Admin.close`."""
        await self._turns.close()


def _text(level: str | bytes) -> str:
    # a foreign producer may write any bytes
    return level if isinstance(level, str) else level.decode(errors="replace")


def _depth(queue: Queue, levels: dict[str, int], held: int, delayed: int, dead: int, *, exists: bool) -> Depth:
    by_level = {level.value: levels.get(level.value, 0) for level in queue.levels} | levels
    return Depth(
        queue=queue.name,
        ready=sum(by_level.values()),
        levels=by_level,
        unsettled=held,
        delayed=delayed,
        dead=dead,
        consumers=None,
        exists=exists,
    )
