"""Inspect and repair an outbox, for the command line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeVar, final

import asyncpg

from leveret.admin import DeadLetters, OutboxDepth
from leveret.errors import BrokerUnavailable, ConfigurationError
from leveret.job import Queue
from leveret.runtime import Runtime

from ..letters import PAGE, Letters
from ..rows import Row
from .address import Address
from .link import Link, meaning_of
from .schema import in_schema
from .statements import READ

if TYPE_CHECKING:
    from .link import Connection

T = TypeVar("T")
_BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '2s'"
_NOW_MS: Final = "floor(extract(epoch FROM clock_timestamp()) * 1000)"
_DEPTHS: Final = (
    "SELECT coalesce(w.queue, d.queue), coalesce(w.jobs, 0), w.oldest_s, coalesce(d.jobs, 0)"  # noqa: S608 - columns of ours
    f" FROM (SELECT queue, count(*) AS jobs, ({_NOW_MS} - min(added_ms)) / 1000 AS oldest_s FROM {{schema}}.outbox GROUP BY queue) w"
    " FULL JOIN (SELECT queue, count(*) AS jobs FROM {schema}.outbox_dead GROUP BY queue) d ON d.queue = w.queue ORDER BY 1"
)
_LAST: Final = "SELECT coalesce(max(seq), 0) FROM {schema}.outbox_dead WHERE queue = $1"
_READ_PAGE: Final = (
    f"SELECT seq, {READ} FROM {{schema}}.outbox_dead WHERE queue = $1 AND seq > $2 AND seq <= $3 ORDER BY seq LIMIT $4"  # noqa: S608
)
_FIELDS: Final = "queue, level, queue_type, priorities, job_id, job, content_type, content_encoding, body, created_s, app, correlation_id, reply_to"
_REPLAY: Final = (
    "WITH letter AS (DELETE FROM {schema}.outbox_dead WHERE queue = $1 AND seq = $2 RETURNING *), added AS ("  # noqa: S608
    f"INSERT INTO {{schema}}.outbox ({_FIELDS}, headers) SELECT {_FIELDS}, $3 FROM letter RETURNING 1) SELECT count(*) FROM added"
)
_DROP: Final = "WITH letter AS (DELETE FROM {schema}.outbox_dead WHERE queue = $1 AND seq = $2 RETURNING 1) SELECT count(*) FROM letter"


@final
class _Letters(Letters):
    """The dead letters of one queue. They aren't hidden from others."""

    store = "the outbox"
    gone = "somebody else replayed or dropped it meanwhile"

    def __init__(self, admin: PostgresOutboxAdmin, queue: Queue) -> None:
        super().__init__(queue.name)
        self._admin = admin

    async def _last(self) -> int:
        last: int = await self._admin.run(lambda connection, sql: connection.fetchval(sql(_LAST), self.queue))
        return last

    async def _page(self, seen: int, last: int) -> list[asyncpg.Record]:
        return await self._admin.run(
            lambda connection, sql: connection.fetch(sql(_READ_PAGE), self.queue, seen, last, PAGE)
        )

    async def _take(self, seq: int, about: str, job: Row | None) -> bool:  # noqa: ARG002 - the URL alone names a call here
        text, headers = (_DROP, ()) if job is None else (_REPLAY, job[-1:])
        taken: int = await self._admin.run(
            lambda connection, sql: connection.fetchval(sql(text), self.queue, seq, *headers)
        )
        return bool(taken)


@final
class PostgresOutboxAdmin:
    """An `OutboxAdmin` on the schema at `address`.

    Every call ends within the setting `connect_timeout_s`: BrokerUnavailable if no server answers, or the tables stay locked.
    """

    def __init__(self, address: Address, runtime: Runtime) -> None:
        self._link = Link(address, runtime, "", lambda _: None, name="leveret outbox admin")
        self._limit_s = runtime.settings.connect_timeout_s

    async def run(self, call: Callable[[Connection, Callable[[str], str]], Awaitable[T]]) -> T:
        """Run `call` in a transaction, with what returns a statement for the schema."""
        schema = self._link.address.schema
        try:
            async with asyncio.timeout(self._limit_s):
                connection = await self._link.connection(listen=False)
                await connection.execute(_BEGIN)
                result = await call(connection, lambda text: in_schema(schema, text))
                await connection.execute("COMMIT")
        except BaseException as error:
            self._link.abandon()  # ends the transaction, also of a server that gives no answer
            meaning = meaning_of(error) if isinstance(error, Exception) else None
            if meaning is None or isinstance(error, (BrokerUnavailable, ConfigurationError)):
                raise
            msg = f"the outbox {self._link.address}: {' '.join(str(error).split()) or 'no answer in time'}"
            raise (ConfigurationError if meaning == "wrong" else BrokerUnavailable)(msg) from error
        return result

    async def depths(self) -> list[OutboxDepth]:
        """As `OutboxAdmin.depths`."""
        rows = await self.run(lambda connection, sql: connection.fetch(sql(_DEPTHS)))
        return [
            OutboxDepth(queue=queue, waiting=jobs, oldest_s=None if oldest_s is None else float(oldest_s), dead=dead)
            for queue, jobs, oldest_s, dead in rows
        ]

    @asynccontextmanager
    async def dead(self, queue: Queue) -> AsyncGenerator[DeadLetters]:
        """As `OutboxAdmin.dead`."""
        yield _Letters(self, queue)

    async def close(self) -> None:
        """As `OutboxAdmin.close`."""
        await self._link.close()
