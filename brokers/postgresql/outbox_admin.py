"""Inspect and repair an outbox, for the command line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar, cast, final

import asyncpg

from leveret.admin import DeadLetter, DeadLetters, OutboxDepth
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable, ConfigurationError
from leveret.headers import pack_headers
from leveret.job import Queue
from leveret.runtime import Runtime

from ..rows import Letter, headers_text, unpack
from .address import Address
from .link import Link, meaning_of
from .schema import in_schema
from .statements import READ

if TYPE_CHECKING:
    from .link import Connection

T = TypeVar("T")
_PAGE: Final = 100
_BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '2s'"
_NOW_MS: Final = "floor(extract(epoch FROM clock_timestamp()) * 1000)"
_DEPTHS: Final = (
    "SELECT coalesce(w.queue, d.queue), coalesce(w.jobs, 0), w.oldest_s, coalesce(d.jobs, 0)"  # noqa: S608 - columns of ours
    f" FROM (SELECT queue, count(*) AS jobs, ({_NOW_MS} - min(added_ms)) / 1000 AS oldest_s FROM {{schema}}.outbox GROUP BY queue) w"
    " FULL JOIN (SELECT queue, count(*) AS jobs FROM {schema}.outbox_dead GROUP BY queue) d ON d.queue = w.queue ORDER BY 1"
)
_LAST: Final = "SELECT max(seq) FROM {schema}.outbox_dead WHERE queue = $1"
_READ_PAGE: Final = (
    f"SELECT seq, {READ} FROM {{schema}}.outbox_dead WHERE queue = $1 AND seq > $2 AND seq <= $3 ORDER BY seq LIMIT $4"  # noqa: S608
)
_FIELDS: Final = "queue, level, queue_type, priorities, job_id, job, content_type, content_encoding, body, created_s, app, correlation_id, reply_to"
_REPLAY: Final = (
    "WITH letter AS (DELETE FROM {schema}.outbox_dead WHERE queue = $1 AND seq = $2 RETURNING *), added AS ("  # noqa: S608
    f"INSERT INTO {{schema}}.outbox ({_FIELDS}, headers) SELECT {_FIELDS}, $3 FROM letter RETURNING 1) SELECT count(*) FROM added"
)
_DROP: Final = "WITH letter AS (DELETE FROM {schema}.outbox_dead WHERE queue = $1 AND seq = $2 RETURNING 1) SELECT count(*) FROM letter"


async def _fetch(
    text: str, arguments: Sequence[object], connection: Connection, sql: Callable[[str], str]
) -> list[asyncpg.Record]:
    return await connection.fetch(sql(text), *arguments)


@final
class _Letter(Letter):
    """A row of `outbox_dead`."""

    __slots__ = ()


@final
class _Letters:
    """The dead letters of one queue, read page by page."""

    def __init__(self, admin: PostgresOutboxAdmin, queue: Queue) -> None:
        self._admin = admin
        self._queue = queue.name

    def __aiter__(self) -> AsyncIterator[DeadLetter]:
        return self._pages()

    async def _pages(self) -> AsyncGenerator[DeadLetter, None]:
        # what is buried later isn't read: a replay that fails at once would be read again and again
        last = await self._admin.run(lambda connection, sql: connection.fetchval(sql(_LAST), self._queue))
        seen = -1
        while last is not None:
            arguments = self._queue, seen, last, _PAGE
            page = await self._admin.run(partial(_fetch, _READ_PAGE, arguments))
            for row in page:
                seen = row[0]
                yield _Letter(seen, unpack(tuple(row)[1:])[0])
            if len(page) < _PAGE:
                return

    async def replay(self, letter: DeadLetter, envelope: Envelope) -> None:
        """As `DeadLetters.replay`: put the job back into the outbox, in one statement."""
        await self._take(
            "replay", letter, lambda seq: (_REPLAY, (self._queue, seq, headers_text(pack_headers(envelope))))
        )

    async def drop(self, letter: DeadLetter) -> None:
        """As `DeadLetters.drop`."""
        await self._take("drop", letter, lambda seq: (_DROP, (self._queue, seq)))

    async def _take(
        self, what: str, letter: DeadLetter, statement: Callable[[int], tuple[str, tuple[object, ...]]]
    ) -> None:
        if not isinstance(letter, _Letter):
            msg = f"replay() and drop() take a dead letter of the outbox, not {letter!r}"
            raise TypeError(msg)
        text, arguments = statement(letter.seq)
        taken = await self._admin.run(lambda connection, sql: connection.fetchval(sql(text), *arguments))
        if not taken:
            msg = f"the {what} of job {letter.job_id} wasn't done: somebody else replayed or dropped it meanwhile"
            raise BrokerUnavailable(msg, job_id=letter.job_id)


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
    async def _dead(self, queue: Queue) -> AsyncGenerator[DeadLetters, None]:
        yield _Letters(self, queue)

    def dead(self, queue: Queue) -> AbstractAsyncContextManager[DeadLetters, None]:
        """As `OutboxAdmin.dead`."""
        return cast("AbstractAsyncContextManager[DeadLetters, None]", self._dead(queue))

    async def close(self) -> None:
        """As `OutboxAdmin.close`."""
        await self._link.close()
