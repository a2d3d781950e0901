"""Jobs of committed transactions, as a worker meets them: woken by the commit, and published by handlers in their own transactions."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import asyncpg
import psycopg
import pytest_asyncio

from leveret import App, Attempt, Bury, Job, Queue
from tests.postgres.node import Postgres
from tests.transactions.clients import prepare

orders, mails = Queue("orders"), Queue("mails")


class Order(Job, name="order.take", queue=orders):
    """The first job."""

    n: int


class Mail(Job, name="mail.send", queue=mails):
    """The job that a handler publishes."""

    n: int


@pytest_asyncio.fixture
async def url(postgres: Postgres) -> AsyncGenerator[str]:
    """A database of this test."""
    async with postgres.database() as made:
        await prepare(made)
        yield made


@asynccontextmanager
async def connected(url: str) -> AsyncGenerator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        connection.terminate()


async def test_a_commit_wakes_a_worker_that_waits(url: str) -> None:
    """Each invoice would wait for the next look at the tables, for up to a second."""
    app, ran = App("shop", broker=url), asyncio.Queue[tuple[int, float]]()

    @app.handler
    async def take(job: Order) -> None:
        ran.put_nowait((job.n, time.monotonic()))

    waits = (
        "SELECT EXISTS (SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
        " WHERE d.datname = current_database() AND l.locktype = 'advisory' AND l.mode = 'ShareLock')"
    )
    waits_s: list[float] = []
    async with app.worker(), app.publisher() as publisher, connected(url) as connection:
        for n in range(7):
            while not await connection.fetchval(waits):
                await asyncio.sleep(0.01)
            async with connection.transaction():
                await publisher.publish(Order(n), connection=connection)
                assert ran.empty()
            committed = time.monotonic()
            came, at = await ran.get()
            assert came == n
            waits_s.append(at - committed)

    assert sorted(waits_s)[3] < 0.5, waits_s


async def test_a_handler_publishes_in_its_own_transaction(url: str) -> None:
    """A retry would send the mail of a run that was rolled back."""
    app, sent = App("shop", broker=url), asyncio.Queue[int]()

    @app.handler
    async def take(job: Order, attempt: Attempt) -> None:
        async with connected(url) as connection, connection.transaction():
            await attempt.publish(Mail(job.n), connection=connection)
            if job.n == 1:
                raise Bury("no such order")

    @app.handler
    async def mail(job: Mail) -> None:
        sent.put_nowait(job.n)

    async with app.worker(), app.publisher() as publisher:
        for n in range(3):
            await publisher.publish(Order(n))
        assert sorted([await sent.get(), await sent.get()]) == [0, 2]
    assert sent.empty()


async def test_a_def_handler_publishes_in_its_own_transaction(url: str) -> None:
    """Its statement runs in the handler's thread, while that waits for the worker's loop."""
    app, sent = App("shop", broker=url), asyncio.Queue[Mail]()
    loop = asyncio.get_running_loop()

    @app.handler
    def take(job: Order, attempt: Attempt) -> None:
        with psycopg.connect(url) as connection:
            attempt.publish_blocking(Mail(job.n), connection=connection)
            if job.n == 1:
                raise Bury("no such order")

    @app.handler
    def mail(job: Mail, attempt: Attempt) -> None:
        loop.call_soon_threadsafe(sent.put_nowait, job)
        assert attempt.envelope.correlation_id is not None

    async with app.worker(), app.publisher() as publisher:
        for n in range(3):
            await publisher.publish(Order(n))
        came = [await sent.get(), await sent.get()]
    assert sorted(one.n for one in came) == [0, 2]
