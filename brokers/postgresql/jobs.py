"""The job store in a PostgreSQL: through one connection for each process, one call after another.

A waiter leaves its channel in the records, so that only an end that somebody waits for is told. Behind a pooler nobody is told.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

from leveret.errors import ConfigurationError, LeveretError, StoreUnavailable
from leveret.runtime import Runtime
from leveret.store import STAGES, Abort, Change, Key, Progress, Record, State, Verdict

from ..records import Watched, in_order, record_of
from .address import Address
from .link import Link, meaning_of
from .records import RecordStatements, columns, is_mixed

if TYPE_CHECKING:
    from .link import Connection

_T = TypeVar("_T")

_READ: Final = "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY"
_AT_ONCE: Final = 2000
"""For how many publishes a transaction waits at once: it locks their records."""


@final
class PostgresJobs:
    """A `leveret.store.Store` in the schema at `address`. Every call ends within the setting `connect_timeout_s`."""

    def __init__(self, address: Address, runtime: Runtime) -> None:
        self.what = str(address)
        """As `Store.what`."""
        self.address = address
        self._sql = RecordStatements(address.schema)
        self.enter = self._sql.write
        """Enters changes in another connection's transaction."""
        self._channel = f"leveret_ended_{secrets.token_hex(8)}"
        self._link = Link(address, runtime, self._channel, self._noticed, name=f"leveret {runtime.app} store")
        self._limit_s = runtime.settings.connect_timeout_s
        self._one = asyncio.Lock()
        """Held during a call: its waiters get it in the order in which they came."""
        self._tell: Callable[[Sequence[Key]], None] | None = None
        self._watched = Watched()
        self._closed = False

    async def write(self, changes: Sequence[Change | Progress], /) -> None:
        """As `Store.write`. Progress of publishes without a change is written first: in one transaction it would lock out of order."""
        if is_mixed(changes):
            changed = {one.key for one in changes if isinstance(one, Change)}
            if alone := [one for one in changes if one.key not in changed]:
                await self.write(alone)
                changes = [one for one in changes if one.key in changed]

        async def enter(connection: Connection) -> None:
            await self._sql.write(connection, changes)

        await self._call(enter, together=_is_several(changes))

    async def begin(self, changes: Sequence[Change], /) -> Sequence[Verdict]:
        """As `Store.begin`."""

        async def begin(connection: Connection) -> Sequence[Verdict]:
            return await self._sql.begin(connection, changes)

        return await self._call(begin, together=_is_several(changes))

    async def read(self, keys: Sequence[Key], /) -> Sequence[Record | None]:
        """As `Store.read`."""
        return in_order(keys, await self._records(self._sql.read, *columns(keys, 2), 0))

    async def ended(self, keys: Sequence[Key], /) -> Sequence[Record]:
        """As `Store.ended`."""
        found: list[Record] = []
        if self._tell:
            self._watched.add(keys)  # before the records say that we wait: a notice may come before the answer
        ordered = sorted(keys)
        for start in range(0, len(ordered), _AT_ONCE):
            those = columns(ordered[start : start + _AT_ONCE], 2)

            async def look(connection: Connection, those: Sequence[Any] = those) -> list[Any]:
                if self._link.listens:
                    await connection.fetch(self._sql.wait, *those, self._channel)
                return await connection.fetch(self._sql.read, *those, STAGES["done"])

            found += [record_of(row) for row in await self._call(look, reads=self._tell is None)]
        self._watched.take(record.publish for record in found)
        return found

    def watch(self, ended: Callable[[Sequence[Key]], None], /) -> None:
        """As `Store.watch`; the connection listens from its next call on."""
        self._tell = ended

    def _noticed(self, notice: str) -> None:
        """Hear which publishes ended: their numbers, or nothing if there are too many."""
        if self._tell is not None and notice != "lost":
            ended = self._watched.take(map(int, notice.split(",")) if notice else None)
            if ended:
                self._tell(ended)

    async def newest(self, job_ids: Sequence[str], /) -> Sequence[Key | None]:
        """As `Store.newest`."""
        found = await self._rows(self._sql.newest, job_ids)
        return [
            None if publish is None else Key(job_id, publish) for job_id, (publish,) in zip(job_ids, found, strict=True)
        ]

    async def abort(self, key: Key, /) -> Abort:
        """As `Store.abort`."""

        async def abort(connection: Connection) -> Abort:
            state = await connection.fetchval(self._sql.abort, *key)
            answers: dict[str | None, Abort] = {None: "unknown", "running": "asked", "aborted": "aborted"}
            return answers.get(state, "finished")

        return await self._call(abort)

    async def asked(self, keys: Sequence[Key], /) -> Sequence[Key]:
        """As `Store.asked`."""
        return [Key(*row) for row in await self._rows(self._sql.asked, *columns(keys, 2))]

    async def list(
        self, *, state: State | None = None, queue: str | None = None, job: str | None = None, limit: int
    ) -> Sequence[Record]:
        """As `Store.list`."""
        return await self._records(self._sql.list, state, queue, job, limit)

    async def find(self, job_id: str, /, *, prefix: bool = False, limit: int = 100) -> Sequence[Record]:
        """As `Store.find`."""
        return await self._records(self._sql.find, job_id, job_id + chr(0x10FFFF) if prefix else job_id, limit)

    async def drop(self, keys: Sequence[Key], /) -> int:
        """As `Store.drop`."""
        return await self._count(self._sql.drop, *columns(sorted(keys), 2))

    async def trim(self, at_most: int, /) -> int:
        """As `Store.trim`."""
        return await self._count(self._sql.trim, at_most)

    async def close(self) -> None:
        """As `Store.close`."""
        self._tell, self._closed = None, True
        await self._link.close()

    async def _count(self, statement: str, *arguments: Any) -> int:
        async def change(connection: Connection) -> int:
            count: int = await connection.fetchval(statement, *arguments)
            return count

        return await self._call(change)

    async def _records(self, statement: str, *arguments: Any) -> Sequence[Record]:
        return [record_of(row) for row in await self._rows(statement, *arguments)]

    async def _rows(self, statement: str, *arguments: Any) -> Sequence[Any]:
        async def read(connection: Connection) -> Sequence[Any]:
            return await connection.fetch(statement, *arguments)

        return await self._call(read, reads=True)

    async def _call(
        self, call: Callable[[Connection], Awaitable[_T]], *, reads: bool = False, together: bool = False
    ) -> _T:
        """Return what `call` returns. `together`: its statements have their effects together, or none has.

        Behind a pooler each call is a transaction: the statements of one transaction reach the same server. Otherwise one statement
        needs none, which saves a start and an end of a job two round trips.
        """
        if self._closed:
            msg = f"the job store {self.what} is closed"
            raise StoreUnavailable(msg)
        try:
            async with asyncio.timeout(self._limit_s), self._one:
                return await self._do(call, reads=reads, together=together)
        except TimeoutError as error:
            msg = f"the job store {self.what} didn't answer within {self._limit_s:g} s"
            raise StoreUnavailable(msg) from error

    async def _do(self, call: Callable[[Connection], Awaitable[_T]], *, reads: bool, together: bool) -> _T:
        try:
            connection = await self._link.connection(listen=self._tell is not None)
            if self._link.direct and not together:
                return await call(connection)
            await connection.execute(_READ if reads else self._link.begin)
            result = await call(connection)
            await connection.execute("COMMIT")
        except Exception as error:
            meaning = meaning_of(error)
            if meaning in {"busy", "refused", "full", "wrong"}:
                await self._link.rollback()
            else:
                self._link.abandon()
            if meaning is None or isinstance(error, (ConfigurationError, TimeoutError)):
                raise
            said = " ".join(str(error).split()) or type(error).__name__
            msg = said if isinstance(error, LeveretError) else f"{self.what}: {said}"
            kinds = {"wrong": ConfigurationError, "refused": ValueError}
            raise kinds.get(meaning, StoreUnavailable)(f"the job store {msg}") from error
        except BaseException:
            self._link.abandon()  # cancelled: a statement may be under way
            raise
        else:
            return result


def _is_several(changes: Sequence[Change | Progress]) -> bool:
    """Whether it takes several statements to enter the changes."""
    return len({change.publish for change in changes}) < len(changes) or is_mixed(changes)
