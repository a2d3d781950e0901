"""Transactions with jobs in them, whose client or server is killed or frozen."""

import asyncio
import signal
import sys
import time
from contextlib import AsyncExitStack, suppress

import pytest

from leveret import BrokerUnavailable, InvalidJob, Outgoing, PublishTimeout
from tests.conftest import StartPostgres
from tests.postgres.node import Postgres
from tests.transactions.clients import CLIENTS, Client, Order, client, prepare, there


class Undone(Exception):
    """Leaves a block."""


pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]


async def test_a_client_that_is_killed_leaves_what_it_committed(postgres: Postgres) -> None:
    """The death of a web process, at any moment: no invoice without its order, and none twice."""
    async with postgres.database() as url:
        await prepare(url)

        async def one(name: str) -> None:
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.transactions.half", name, url, stdout=asyncio.subprocess.PIPE
            )
            assert child.stdout is not None
            try:
                assert await child.stdout.readline() == b"published\n"
            finally:
                child.send_signal(signal.SIGKILL)
                await child.wait()

        await asyncio.gather(*map(one, CLIENTS))
        while await postgres.query("SELECT FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"):
            await asyncio.sleep(0.05)

        assert await there(url) == ([1] * len(CLIENTS), sorted(f"{name} committed" for name in CLIENTS))


@pytest.mark.filterwarnings("ignore")  # the libraries' own, about the sockets that are gone
async def test_a_server_that_is_killed_keeps_what_was_committed(postgres_node: StartPostgres) -> None:
    """A crash of the database must leave orders and invoices alike."""
    node = await postgres_node()
    names = [name for name in CLIENTS if name != "django-alias"]  # the same connection as django's
    async with node.database() as url:
        await prepare(url)
        async with AsyncExitStack() as stack:
            clients = {name: await stack.enter_async_context(client(name, url)) for name in names}
            opened = asyncio.Barrier(len(clients) + 1)
            killed = asyncio.Event()

            async def one(name: str, shop: Client) -> None:
                async with shop.begin():
                    await shop.order(1)
                    await shop.publish(Order(1), job_id=f"{name} committed")
                with suppress(Exception):
                    async with shop.begin():
                        await shop.order(2)
                        await shop.publish(Order(2), job_id=f"{name} open")
                        await opened.wait()
                        await killed.wait()
                        with pytest.raises((BrokerUnavailable, InvalidJob)):
                            await shop.publish(Order(3))

            async with asyncio.TaskGroup() as group:
                for name, shop in clients.items():
                    group.create_task(one(name, shop))
                await opened.wait()
                await node.kill9()
                killed.set()
            await node.start()

            assert await there(url) == ([1] * len(clients), sorted(f"{name} committed" for name in names))


@pytest.mark.filterwarnings("ignore")  # the libraries' own, about connections that they give up
@pytest.mark.parametrize("name", ["asyncpg", "psycopg-async", "sqlalchemy-asyncpg"])
async def test_a_server_that_gives_no_answer_ends_the_publish(name: str, postgres_node: StartPostgres) -> None:
    """A request would hang for as long as the server does, and its caller must hear that the job may be in the transaction."""
    node = await postgres_node()
    async with node.database() as url:
        await prepare(url)
        async with client(name, url) as shop:
            with suppress(Exception):
                async with shop.begin():
                    await shop.order(1)
                    node.pause()
                    begun = time.monotonic()
                    try:
                        with pytest.raises(PublishTimeout, match="may have been added to the transaction") as caught:
                            await shop.publish(Order(1), timeout_s=0.5)
                        took_s = time.monotonic() - begun
                    finally:
                        node.resume()
                    raise Undone
            assert caught.value.maybe_published
            assert took_s < 30
        assert await there(url) == ([], [])


async def test_behind_a_pooler_jobs_are_published_in_transactions(postgres_node: StartPostgres) -> None:
    """Each transaction may get another server's connection, with none of the statements that were prepared."""
    node = await postgres_node()
    pooler = await node.pooler(default_pool_size=2)
    options: dict[str, dict[str, object]] = {
        "asyncpg": {"statement_cache_size": 0},
        "asyncpg-pool": {"statement_cache_size": 0},
        "psycopg-async": {"prepare_threshold": None},
        "psycopg": {"prepare_threshold": None},
        "sqlalchemy": {"connect_args": {"prepare_threshold": None}},
        "django": {},
    }
    async with node.database() as url:
        await prepare(url)
        for name, given in options.items():
            async with client(name, pooler.url_of(url), **given) as shop:
                for n in range(12):
                    async with shop.begin():
                        await shop.publish(Order(n), job_id=f"{name} {n}")
                        await shop.publish_many([Outgoing(Order(n), job_id=f"{name} {n} of many")])

        _, jobs = await there(url)
        assert jobs == sorted(f"{name} {n}{many}" for name in options for n in range(12) for many in ("", " of many"))
