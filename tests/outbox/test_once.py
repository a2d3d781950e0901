"""`attempt.once` says True to one committed transaction for each job."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from leveret import App, Attempt, InvalidJob, Job, Outgoing, Queue
from leveret.brokers.postgresql import open_outbox
from leveret.outbox import Outbox
from leveret.runtime import Runtime
from leveret.settings import Settings
from leveret.testing import attempt as make_attempt
from tests.outbox.shop import Shop, eventually
from tests.transactions.clients import CLIENTS, BlockingClient, Client, client


class Rolled(Exception):
    """Leaves a block."""


def inbox(url: str) -> Outbox:
    return open_outbox(url, Runtime(app="shop"))


def _ask(one: Client, at: Outbox, job_id: str) -> Awaitable[bool]:
    """Ask in the transaction of a client, in the client's own thread."""
    connection: Any = one.connection  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(one, BlockingClient):
        return one.call(at.once_blocking, connection, "orders", job_id)
    return at.once(connection, "orders", job_id)


@pytest.mark.parametrize("name", CLIENTS)
async def test_the_first_committed_transaction_has_the_effect(name: str, url: str) -> None:
    """An effect twice, or none after a transaction that failed."""
    at = inbox(url)
    async with client(name, url) as one:
        heard: list[bool] = []
        with contextlib.suppress(Rolled):
            async with one.begin():
                heard.append(await _ask(one, at, "seven"))
                raise Rolled
        for job_id in ("seven", "seven", "eight"):
            async with one.begin():
                heard.append(await _ask(one, at, job_id))

    assert heard == [True, True, False, True]


@asynccontextmanager
async def transaction(url: str) -> AsyncGenerator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            yield connection
    finally:
        connection.terminate()


async def _blocked(url: str, job_id: str, then: Callable[[asyncpg.Connection], Awaitable[Any]]) -> bool:
    """Ask while another transaction, which `then` ends, has the effect; return what the second hears."""
    at = inbox(url)
    first = await asyncpg.connect(url)
    try:
        await first.execute("BEGIN")
        assert await at.once(first, "orders", job_id)
        async with transaction(url) as second:
            asked = asyncio.ensure_future(at.once(second, "orders", job_id))
            waits = "SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event_type = 'Lock'"
            while not await first.fetch(waits, second.get_server_pid()):
                assert not asked.done(), "it didn't wait for its twin"
                await asyncio.sleep(0.01)
            await then(first)
            return await asked
    finally:
        first.terminate()


async def test_a_concurrent_twin_waits_and_hears_false(url: str) -> None:
    """Two workers with one job, one of which was thought dead, would both have the effect."""
    assert not await _blocked(url, "seven", lambda first: first.execute("COMMIT"))


async def test_a_twin_takes_over_if_the_first_rolls_back(url: str) -> None:
    """The effect would be nowhere, since the second left it to the first."""
    assert await _blocked(url, "seven", lambda first: first.execute("ROLLBACK"))


async def test_a_job_that_comes_twice_has_its_effect_once(shop: Shop) -> None:
    """A customer is charged for each delivery."""
    queue = Queue(f"{shop.queue.name}-once")
    app = App("invoices", broker=shop.app.broker_url(), outbox=shop.outbox)
    ran: list[str] = []

    class Invoice(Job, name="invoice", queue=queue):
        n: int

    @app.handler
    async def invoice(job: Invoice, attempt: Attempt[Any]) -> None:
        async with transaction(shop.outbox) as connection:
            if await attempt.once(connection=connection):
                await connection.execute("INSERT INTO invoices VALUES ($1)", job.n)
        ran.append(attempt.job_id)

    async with shop.connected() as connection:
        await connection.execute("CREATE TABLE invoices (n int)")
        async with app.publisher() as publisher, app.worker():
            await publisher.publish_many([Outgoing(Invoice(n % 20), job_id=f"job-{n % 20}") for n in range(60)])
            await eventually(lambda: len(ran) == 60, lambda: len(ran))
        effects = [row["n"] for row in await connection.fetch("SELECT n FROM invoices ORDER BY n")]

    assert effects == list(range(20))


async def test_whoever_fills_the_inbox_empties_it(shop: Shop) -> None:
    """The inbox would grow for ever in a service that has no relay."""
    async with shop.connected() as connection:
        await connection.execute(
            "INSERT INTO leveret.inbox (queue, job_id, done_at)"
            " SELECT 'old', n::text, now() - interval '8 days' FROM generate_series(1, 5000) n"
        )
        # one call in a hundred deletes 200: that all of 5000 stay has a chance of 1 in 10^21
        await connection.execute("SELECT leveret.once('new', n::text, 604800) FROM generate_series(1, 5000) n")
        old, new = await connection.fetchrow(
            "SELECT count(*) FILTER (WHERE queue = 'old'), count(*) FILTER (WHERE queue = 'new') FROM leveret.inbox"
        ) or (0, 0)

    assert old < 5000
    assert new == 5000


async def test_a_relay_empties_the_inbox(shop: Shop) -> None:
    """What is left of a queue that gets no more jobs would stay."""
    brief = Shop(shop.app.broker_url() or "", shop.outbox, inbox_s=60.0)
    async with shop.connected() as connection:
        await connection.execute(
            "INSERT INTO leveret.inbox (queue, job_id, done_at)"
            " SELECT 'old', n::text, now() - interval '61 seconds' FROM generate_series(1, 2500) n"
        )
        await connection.execute("SELECT leveret.once('new', 'kept', 60)")
        line = open_outbox(brief.outbox, brief.app.runtime()).line()
        await line.forget()
        await line.close()
        left = await connection.fetch("SELECT queue FROM leveret.inbox")

    assert [row["queue"] for row in left] == ["new"]


async def test_a_database_without_the_inbox_is_refused(shop: Shop, url: str) -> None:
    """An error of the library would say only that a function doesn't exist."""
    other = open_outbox(f"{url}?schema=other", Runtime(app="shop"))
    async with transaction(url) as connection:
        with pytest.raises(InvalidJob, match="leveret migrate"):
            await other.once(connection, "orders", "seven")


async def test_once_outside_a_transaction_is_refused(url: str) -> None:
    """The note would be committed by itself: the effect that fails then never comes."""
    connection = await asyncpg.connect(url)
    try:
        with pytest.raises(InvalidJob, match="has no open transaction"):
            await inbox(url).once(connection, "orders", "seven")
    finally:
        connection.terminate()


async def test_an_app_without_an_inbox_says_what_to_do(url: str) -> None:
    """It would look as if every effect were the first."""
    app, errors = App("shop", broker="memory://once"), list[BaseException]()

    class Work(Job, name="work", queue=Queue("work")):
        pass

    @app.handler
    async def work(_: Work, attempt: Attempt[Any]) -> None:
        async with transaction(url) as connection:
            try:
                await attempt.once(connection=connection)
            except InvalidJob as error:
                errors.append(error)

    async with app.publisher() as publisher, app.worker():
        await publisher.publish(Work())
        await eventually(lambda: bool(errors))

    assert "App(outbox=" in str(errors[0])


async def test_in_a_test_the_effect_is_the_first() -> None:
    """A test of a handler would need the database."""
    assert await make_attempt().once(connection=object())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_the_setting_is_a_time() -> None:
    """0 would forget each job at once."""
    with pytest.raises(ValueError, match="inbox_s"):
        Settings(inbox_s=0)
