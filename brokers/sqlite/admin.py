"""Inspect and repair the queues of a SQLite file, for the command line."""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, final

from leveret.admin import DeadLetters, Depth
from leveret.job import Queue
from leveret.runtime import Runtime

from ..letters import PAGE, Letters
from ..rows import Row
from ..turns import Access, Taker
from .statements import INSERTS, READ
from .store import Store

log = logging.getLogger("leveret.sqlite")

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
_LAST_DEAD = "SELECT coalesce(max(seq), 0) FROM dead WHERE queue = ?"
_TAKE_DEAD = "DELETE FROM dead WHERE seq = ? AND claimed_by = ?"


def _changed(statement: str, arguments: tuple[object, ...], file: sqlite3.Connection) -> int:
    return file.execute(statement, arguments).rowcount


@final
class _Letters(Letters):
    """The dead letters of one queue, claimed page by page under a separate lease."""

    store = "the SQLite broker"

    def __init__(self, access: Access, queue: Queue, taker: Taker) -> None:
        super().__init__(queue.name)
        self._access = access
        self._taker = taker

    async def _last(self) -> int:
        if self._taker.lease.id is None:
            return 0  # the file doesn't exist
        last: int = await self._access.run(
            "the dead letters", lambda file: file.execute(_LAST_DEAD, (self.queue,)).fetchone()[0]
        )
        return last

    async def _page(self, seen: int, last: int) -> list[Any]:
        def claim(file: sqlite3.Connection) -> list[Any]:
            arguments = (self._taker.lease.id, self.queue, seen, last, PAGE)
            return sorted(file.execute(_PAGE_OF_DEAD, arguments).fetchall())

        page: list[Any] = await self._access.run("the dead letters", claim)
        return page

    async def _take(self, seq: int, about: str, job: Row | None) -> bool:
        def take(file: sqlite3.Connection) -> bool:
            if not file.execute(_TAKE_DEAD, (seq, self._taker.lease.id)).rowcount:
                return False
            if job is not None:
                file.execute(INSERTS["jobs"][-1][1], job)
            return True

        taken: bool = await self._access.run(about, take)
        return taken


@final
class SqliteAdmin:
    """An `Admin` on the SQLite file at `path`; a missing file counts as a file without queues, and isn't created.

    Every call ends within the setting `connect_timeout_s`: BrokerUnavailable if the file stays locked.
    """

    def __init__(self, path: str, runtime: Runtime) -> None:
        self._path = Path(path)
        self._clock = runtime.clock
        self._turns = Store(path, runtime, create=False).turns
        self._access = Access(self._turns, runtime, log)

    async def depths(self, queues: Sequence[Queue]) -> list[Depth]:
        """As `Admin.depths`; no lock stops the read. The jobs of a dead worker count as unsettled until another worker runs."""
        if not self._path.exists():
            return [_depth(queue, {}, 0, 0, 0, exists=False) for queue in queues]
        now_ms = self._clock.now() * 1000

        def read(file: sqlite3.Connection) -> list[Depth]:
            return [self._read(file, queue, now_ms) for queue in queues]

        rows: list[Depth] = await self._access.look("the read of the queues", read)
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
            now_ms = self._clock.now() * 1000
            arguments = (queue.name, queue.name, now_ms, _PURGED_AT_ONCE)
            about = f"the purge of queue {queue.name!r}"
            count: int = await self._access.run(about, partial(_changed, _PURGE, arguments))
            purged += count
            if count < _PURGED_AT_ONCE:
                return purged

    @asynccontextmanager
    async def dead(self, queue: Queue) -> AsyncGenerator[DeadLetters]:
        """As `Admin.dead`; if this process dies, its letters are free again as the jobs of a dead worker are."""
        if not self._path.exists():
            yield _Letters(self._access, queue, Taker())
            return
        async with self._access.reader(queue) as taker:
            yield _Letters(self._access, queue, taker)

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
