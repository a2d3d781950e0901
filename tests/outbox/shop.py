"""A shop whose orders lie in PostgreSQL, and whose jobs go over the outbox to RabbitMQ."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from leveret import App, Attempt, Job, Outgoing, Publisher, Queue, Settings
from leveret.brokers.postgresql.schema import migrate
from tests.postgres.node import Postgres

PATIENCE_S = 40.0
"""How long anything that must happen may take on a loaded machine; it never takes so long where all is well."""


async def eventually(happened: Callable[[], bool], what: Callable[[], object] = lambda: "it didn't happen") -> None:
    """Wait until something has happened."""
    ends = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < ends, what()
        await asyncio.sleep(0.01)


class Shop:
    """One app, one queue, and what its jobs did."""

    def __init__(self, broker: str, outbox: str, *, queue: Queue | None = None, **settings: Any) -> None:
        self.queue = queue = queue or Queue(f"outbox-{uuid.uuid4().hex[:12]}")
        self.outbox = outbox
        self.app = App("shop", broker=broker, outbox=outbox, settings=Settings(**settings), concurrency=1)
        self.ran: list[int] = []
        """The numbers of the jobs, in the order in which they ran."""
        self.attempts: list[Attempt[Any]] = []

        class Order(Job, name="order", queue=queue):
            n: int
            text: str = ""

        async def run(job: Order, attempt: Attempt[Any]) -> None:
            self.ran.append(job.n)
            self.attempts.append(attempt)

        self.app.handler(job=Order)(run)
        self.order: Callable[..., Job] = Order

    @property
    def ids(self) -> Counter[str]:
        """How often the job of each id ran."""
        return Counter(attempt.job_id for attempt in self.attempts)

    @asynccontextmanager
    async def connected(self) -> AsyncGenerator[asyncpg.Connection]:
        """Give a connection to the database of the outbox."""
        connection = await asyncpg.connect(self.outbox)
        try:
            yield connection
        finally:
            connection.terminate()

    async def publish(self, *jobs: Job | Outgoing) -> list[str]:
        """Publish jobs in a transaction, and return their ids."""
        async with self.app.publisher() as publisher, self.connected() as connection:
            return await publish(publisher, connection, *jobs)

    async def waiting(self) -> int:
        """Return how many jobs wait in the outbox."""
        async with self.connected() as connection:
            count: int = await connection.fetchval("SELECT count(*) FROM leveret.outbox")
            return count

    async def empty(self) -> None:
        """Wait until no job waits in the outbox."""
        async with asyncio.timeout(PATIENCE_S):
            while await self.waiting():
                await asyncio.sleep(0.02)


async def publish(publisher: Publisher, connection: asyncpg.Connection, *jobs: Job | Outgoing) -> list[str]:
    """Publish jobs in a transaction, and return their ids."""
    async with connection.transaction():
        return [one.job_id for one in await publisher.publish_many(jobs, connection=connection, timeout_s=PATIENCE_S)]


@asynccontextmanager
async def migrated(postgres: Postgres) -> AsyncGenerator[str]:
    """Give the URL of a database with leveret's tables."""
    async with postgres.database() as url:
        connection = await asyncpg.connect(url)
        try:
            await migrate(connection, "leveret")
        finally:
            await connection.close()
        yield url
