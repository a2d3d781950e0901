"""The outbox: jobs that a user's transaction published for another broker, and what relays do with them. The inbox is beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Literal, cast, final

import msgspec

from leveret.clock import moment_ms
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable, ConfigurationError
from leveret.headers import pack_headers
from leveret.job import Queue
from leveret.outbox import Waiting
from leveret.runtime import Runtime
from leveret.transactions import AsyncTransaction, Transaction

from ..rows import headers_text, unpack
from .address import Address
from .link import Link, meaning_of
from .statements import OutboxStatements
from .within import Jobs, Once, Within, rows_of

if TYPE_CHECKING:
    from .link import Connection

TRANSACTION_S: Final = 5.0
"""How long a relay's transaction is open at most, seconds. It holds back vacuum for all tables of the database."""
FIRST_POLL_S: Final = 0.1
POLL_S: Final = 1.0
"""How soon, and how often at least, a relay without jobs looks, seconds: a notice may be lost, or come before the commit of a job."""
_BYTES_AT_ONCE: Final = 16 << 20
_FORGOTTEN_AT_ONCE: Final = 1000
_BEGIN: Final = (
    # synchronous_commit: if the server loses this commit, the jobs are still there, and are published again under their ids
    "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit = off; SET LOCAL lock_timeout = '2s';"
    f" SET LOCAL statement_timeout = '{TRANSACTION_S:g}s'; SET LOCAL idle_in_transaction_session_timeout = '{TRANSACTION_S:g}s'"
)
_BEHIND: Final = 5
"""How many columns of a taken row come before those of `unpack`."""


@final
class PostgresOutbox:
    """The outbox and the inbox of the schema at `address`."""

    def __init__(self, address: Address, runtime: Runtime) -> None:
        self._address = address
        self._runtime = runtime
        self._sql = OutboxStatements(address.schema)
        clock = runtime.clock

        def arguments(jobs: Jobs) -> Sequence[Any]:
            types, priorities = [queue.type for queue, _ in jobs], [queue.priorities for queue, _ in jobs]
            return [*rows_of(jobs, clock), types, priorities]

        within = Within(self._sql.add, arguments, address.schema)
        self.within, self.within_blocking = within.within, within.within_blocking
        """As `Transactional`."""
        self._once = Once(address.schema, runtime.settings.inbox_s)

    def once(self, connection: AsyncTransaction, queue: str, job_id: str, /) -> Awaitable[bool]:
        """As `Inbox.once`."""
        return self._once.once(connection, queue, job_id)

    def once_blocking(self, connection: Transaction, queue: str, job_id: str, /) -> bool:
        """As `Inbox.once_blocking`."""
        return self._once.once_blocking(connection, queue, job_id)

    def line(self) -> PostgresLine:
        """As `Outbox.line`."""
        return PostgresLine(self._address, self._runtime, self._sql)


@final
class PostgresLine:
    """A relay's connection; see `leveret.outbox.Line`."""

    def __init__(self, address: Address, runtime: Runtime, sql: OutboxStatements) -> None:
        self._runtime = runtime
        self._sql = sql
        self._news = asyncio.Event()
        self._link = Link(address, runtime, sql.channel, self._noticed, name=f"leveret {runtime.app} relay")
        self._ends = 0.0
        """When the transaction must have ended."""
        self._marked = False
        """Whether this connection is marked as waiting."""
        self._poll_s = FIRST_POLL_S

    def _noticed(self, _: str) -> None:
        self._news.set()

    async def take(
        self, at_most: int, *, only: str | None, without: Collection[str], deadline: float
    ) -> Sequence[Waiting]:
        """As `Line.take`."""
        async with self._doing(self._runtime.settings.connect_timeout_s + TRANSACTION_S) as connection:
            self._ends = time.monotonic() + TRANSACTION_S
            await connection.execute(_BEGIN)
            rows = await connection.fetch(self._sql.take, at_most, _BYTES_AT_ONCE, only, list(without))
            if not rows:
                await connection.execute("COMMIT")
                return ()
            if self._marked:
                await connection.execute(self._sql.works)
            self._marked, self._poll_s = False, FIRST_POLL_S
            now = self._runtime.clock.now()
            return [_waiting(tuple(row), now, deadline) for row in rows]

    async def settle(self, published: Sequence[int], dead: Sequence[tuple[int, Envelope]]) -> None:
        """As `Line.settle`."""
        async with self._doing(max(0.0, self._ends - time.monotonic())) as connection:
            if dead:
                seqs, headers = [seq for seq, _ in dead], [headers_text(pack_headers(envelope)) for _, envelope in dead]
                await connection.execute(self._sql.bury, seqs, headers)
                await connection.execute(self._sql.settle, seqs)
            if published:
                await connection.execute(self._sql.settle, published)
            await connection.execute("COMMIT")

    async def leave(self) -> None:
        """As `Line.leave`."""
        await self._rollback()

    async def wait(self) -> None:
        """As `Line.wait`: for a notice, or for the next look."""
        if self._link.listens and not self._marked:
            async with self._doing(TRANSACTION_S) as connection:
                await connection.execute(self._sql.waits)
            self._marked = True
            return  # looks once more: a publisher that asked who waits, before the mark was there, told nobody
        with suppress(TimeoutError):
            async with asyncio.timeout(self._poll_s):
                await self._news.wait()
        self._news.clear()
        self._poll_s = min(2 * self._poll_s, POLL_S) if self._link.listens else FIRST_POLL_S

    async def forget(self) -> None:
        """As `Line.forget`."""
        count = _FORGOTTEN_AT_ONCE
        while count == _FORGOTTEN_AT_ONCE:
            async with self._doing(TRANSACTION_S) as connection:
                await connection.execute(_BEGIN)
                count = await connection.fetchval(self._sql.forget, self._runtime.settings.inbox_s, _FORGOTTEN_AT_ONCE)
                await connection.execute("COMMIT")

    async def close(self) -> None:
        """As `Line.close`."""
        await self._link.close()

    async def _rollback(self) -> None:
        await self._link.rollback()
        self._marked = False  # rolling back ends the mark too

    @asynccontextmanager
    async def _doing(self, limit_s: float) -> AsyncGenerator[Connection, None]:
        """Give the connection; on an error, roll back and say what the error means."""
        try:
            async with asyncio.timeout(limit_s):
                connection = await self._link.connection(listen=True)
                if self._link.fresh:
                    self._link.fresh = self._marked = False
                yield connection
        except asyncio.CancelledError:
            self._link.abandon()  # a statement may be under way
            raise
        except Exception as error:
            meaning = meaning_of(error)
            if meaning is None:
                raise
            if meaning in {"busy", "refused", "full", "wrong"}:
                await self._rollback()
            else:
                self._link.lost(error)
            if isinstance(error, (BrokerUnavailable, ConfigurationError)):
                raise
            said = " ".join(str(error).split()) or "no answer in time"
            msg = f"the outbox {self._link.address}: {said}"
            raise (ConfigurationError if meaning == "wrong" else BrokerUnavailable)(msg) from error


def _waiting(row: tuple[Any, ...], now: float, deadline: float) -> Waiting:
    """Return the job of a row: it is due when its delay, which began at the publish, is over."""
    seq, waited_ms, delay_ms, queue_type, priorities = row[:_BEHIND]
    envelope, problem = unpack(row[_BEHIND:])
    if waited_ms is None:
        waited_ms, problem = 0, problem or "its added_ms is before 1970, so nobody knows when it is due"
    waited_ms = max(0, waited_ms)  # the server's clock may have been set back since
    due_ms = None if delay_ms is None or waited_ms >= delay_ms else moment_ms(now + (delay_ms - waited_ms) / 1000)
    envelope = msgspec.structs.replace(envelope, due_ms=due_ms, deadline=deadline)
    queue = _queue(envelope.queue, queue_type, priorities)
    if isinstance(queue, str):
        return Waiting(seq, None, envelope, queue)
    return Waiting(seq, queue, envelope, problem)


_queues: dict[tuple[str, str, bool], Queue] = {}


def _queue(name: str, queue_type: str, priorities: bool) -> Queue | str:
    """Return the queue with this definition, or why there can't be one."""
    found = _queues.get((name, queue_type, priorities))
    if found is None:
        try:
            found = Queue(name, type=cast("Literal['quorum', 'classic']", queue_type), priorities=priorities)
        except ValueError as error:
            return str(error)
        _queues[name, queue_type, priorities] = found
    return found
