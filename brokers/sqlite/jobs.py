"""The job store in a SQLite file, the broker's or another: through one connection and thread, as the broker's own.

All that one turn of the loop asks for shares a transaction; a read stops at no writer's lock.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar, cast, final

from leveret.errors import BrokerUnavailable, LeveretError, PublishTimeout, StoreUnavailable
from leveret.runtime import Runtime
from leveret.store import Abort, Change, Key, Progress, Record, State, Verdict

from ..records import in_order
from ..turns import Look, Run
from . import records
from .schema import empty
from .store import POLL_S, Store

_T = TypeVar("_T")

_WATCHED_S = 5.0
"""How long a publish is watched that nobody asks for any more, seconds."""


@final
class SqliteJobs:
    """A `leveret.store.Store` on the SQLite file at `path`, which only `write` and `begin` create.

    Every call ends within the setting `connect_timeout_s`.
    """

    def __init__(self, path: str, url: str, runtime: Runtime) -> None:
        self.path = path
        self.what = url
        """As `Store.what`."""
        self._path = Path(path)
        self._there = False
        """Whether the file exists, or will once a write that is under way has created it."""
        self._turns = Store(path, runtime).turns
        self._runtime = runtime
        self._writing = 0
        """How many calls that write are under way."""
        self._written = 0
        """How many have ended."""
        self._tell: Callable[[Sequence[Key]], None] | None = None
        self._watched: dict[Key, float] = {}
        """When each watched publish was last asked for."""
        self._watching: asyncio.Task[None] | None = None

    async def write(self, changes: Sequence[Change | Progress], /) -> None:
        """As `Store.write`."""
        await self._write("the write of states", partial(records.write, changes, self._now_ms()), creates=True)

    def enter(self, file: sqlite3.Connection, changes: Sequence[Change | Progress]) -> None:
        """As `write`, in another connection's transaction."""
        records.write(changes, self._now_ms(), file)

    async def begin(self, changes: Sequence[Change], /) -> Sequence[Verdict]:
        """As `Store.begin`."""
        call = partial(records.begin, changes, self._now_ms())
        return await self._write("the start of jobs", call, creates=True)

    async def read(self, keys: Sequence[Key], /) -> Sequence[Record | None]:
        """As `Store.read`."""
        return in_order(keys, await self._read(partial(records.read, keys)))

    async def ended(self, keys: Sequence[Key], /) -> Sequence[Record]:
        """As `Store.ended`."""
        found = await self._read(partial(records.ended, keys))
        if self._tell is not None:
            self._watched.update(dict.fromkeys(keys, time.monotonic()))
            for record in found:
                self._watched.pop(record.key, None)
            if self._watched and (self._watching is None or self._watching.done()):
                self._watching = asyncio.create_task(self._look_out())
        return found

    def watch(self, ended: Callable[[Sequence[Key]], None], /) -> None:
        """As `Store.watch`: it looks at the file as often as a worker does, and reads when something was written."""
        self._tell = ended

    async def _look_out(self) -> None:
        seen, took_s = None, 0.0
        while self._tell is not None and self._watched:
            await asyncio.sleep(max(POLL_S, 4 * took_s))  # however many they are, a fifth of the time at most
            began = time.monotonic()
            self._watched = {key: asked for key, asked in self._watched.items() if asked > began - _WATCHED_S}
            with suppress(LeveretError):  # who asks hears of it
                now = await self._read(records.version), self._written  # the version doesn't count what we write
                if now != seen:
                    ends = await self._read(partial(records.ends, [*self._watched]))
                    seen = now
                    for key in ends:
                        self._watched.pop(key, None)
                    if ends and self._tell is not None:
                        self._tell(ends)
            took_s = time.monotonic() - began
        self._watching = None

    async def newest(self, job_ids: Sequence[str], /) -> Sequence[Key | None]:
        """As `Store.newest`."""
        return await self._read(partial(records.newest, job_ids))

    async def abort(self, key: Key, /) -> Abort:
        """As `Store.abort`."""
        return await self._write(f"the abort of job {key.job_id}", partial(records.abort, key, self._now_ms()))

    async def asked(self, keys: Sequence[Key], /) -> Sequence[Key]:
        """As `Store.asked`."""
        return await self._read(partial(records.asked, keys))

    async def list(
        self, *, state: State | None = None, queue: str | None = None, job: str | None = None, limit: int
    ) -> Sequence[Record]:
        """As `Store.list`."""
        return await self._read(partial(records.listed, state, queue, job, limit))

    async def find(self, job_id: str, /, *, prefix: bool = False, limit: int = 100) -> Sequence[Record]:
        """As `Store.find`."""
        last = job_id + chr(0x10FFFF) if prefix else job_id
        return await self._read(partial(records.found, job_id, last, limit))

    async def drop(self, keys: Sequence[Key], /) -> int:
        """As `Store.drop`."""
        return await self._write("the drop of records", partial(records.drop, keys))

    async def trim(self, at_most: int, /) -> int:
        """As `Store.trim`."""
        return await self._write("the end of old records", partial(records.trim, at_most, self._now_ms()))

    async def close(self) -> None:
        """As `Store.close`."""
        self._tell = None
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        await self._turns.close()

    async def _read(self, call: Callable[[sqlite3.Connection], _T]) -> _T:
        """Read in a transaction for itself; behind writes of ours that are under way, in theirs."""
        kind = Run if self._writing else Look
        return await self._do(kind, "the read of records", call)

    async def _write(self, about: str, call: Callable[[sqlite3.Connection], _T], *, creates: bool = False) -> _T:
        self._writing += 1
        try:
            return await self._do(Run, about, call, creates=creates)
        finally:
            self._writing -= 1
            self._written += 1

    async def _do(
        self, kind: type[Run | Look], about: str, call: Callable[[sqlite3.Connection], _T], *, creates: bool = False
    ) -> _T:
        self._there = self._there or creates or self._path.exists()
        if not self._there:
            with closing(empty()) as file:
                return call(file)
        deadline = time.monotonic() + self._runtime.settings.connect_timeout_s
        refused: list[Exception] = []

        def unless_refused(file: sqlite3.Connection) -> _T | None:
            try:
                return call(file)
            except (ValueError, OverflowError, sqlite3.DataError) as error:
                refused.append(error)
                if kind is Look:
                    return None  # it costs the reads beside it nothing
                raise  # the transaction is rolled back

        result: _T | None = None
        try:
            result = await self._turns.run(kind(about=about, call=unless_refused, deadline=deadline))
        except (PublishTimeout, BrokerUnavailable) as error:
            if not refused:
                msg = f"the job store {self.what} didn't answer: {self._turns.why or error}"
                raise StoreUnavailable(msg) from error
        if refused:
            msg = f"the job store {self.what} can't keep or find a value: {refused[-1]}"
            raise ValueError(msg) from refused[-1]
        return cast("_T", result)

    def _now_ms(self) -> int:
        return round(self._runtime.clock.now() * 1000)
