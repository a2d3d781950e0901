"""Servers that are gone without a word, as after a power cut, and locks that others hold: everything ends in time and says why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from urllib.parse import urlsplit

import asyncpg
import pytest
import pytest_asyncio

from leveret.brokers.postgresql import (
    migrator,
    open_admin,
    open_broker,
    open_migrator,
    open_outbox_admin,
    schema,
    store,
)
from leveret.brokers.postgresql.schema import Migration
from leveret.errors import BrokerUnavailable
from leveret.job import Queue
from leveret.runtime import Runtime
from leveret.settings import Settings
from tests.contract.harness import PATIENCE_S, make_envelope, soon, timed
from tests.nodes import free_ports, url_at
from tests.postgres.node import Postgres
from tests.proxy import FaultProxy

QUEUE = Queue("jobs")
Ask = Callable[[str, Runtime], Awaitable[object]]


def runtime(connect_timeout_s: float) -> Runtime:
    return Runtime(
        app="tests", settings=Settings(connect_timeout_s=connect_timeout_s, reconnect_base_s=0.01, reconnect_cap_s=0.05)
    )


async def depths(url: str, runtime: Runtime) -> None:
    """Ask as `leveret queues` does."""
    admin = open_admin(url, runtime)
    try:
        await admin.depths([QUEUE])
    finally:
        await admin.close()


async def of_outbox(url: str, runtime: Runtime) -> None:
    """Ask as `leveret queues --outbox` does."""
    admin = open_outbox_admin(url, runtime)
    try:
        await admin.depths()
    finally:
        await admin.close()


async def pending(url: str, runtime: Runtime) -> None:
    """Ask as `leveret migrate --check` does."""
    await open_migrator(url, runtime).pending()


@pytest_asyncio.fixture
async def link(postgres_url: str) -> AsyncGenerator[FaultProxy]:
    """A proxy before the test's database, which passes a login and then freezes."""
    async with FaultProxy(urlsplit(postgres_url).port or 0) as proxy:
        yield proxy


async def freeze_after_login(link: FaultProxy, url: str) -> str:
    """Freeze the next connection in the middle of the first answer after its login; return the link's URL."""
    behind = link.url_of(url)
    connection = await asyncpg.connect(behind, server_settings={"application_name": "leveret"})
    connection.terminate()
    link.freeze_after("down", link.passed["down"] + 20)
    return behind


async def test_a_host_that_is_gone_does_not_hide_the_next_one(postgres_url: str) -> None:
    """A primary's machine loses its power: no program would ever find the standby that was promoted."""
    async with FaultProxy(urlsplit(postgres_url).port or 0) as gone:
        gone.mute = True
        hosts = f"127.0.0.1:{gone.port},127.0.0.1:{urlsplit(postgres_url).port}"
        parts = urlsplit(postgres_url)
        broker = open_broker(parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@{hosts}").geturl(), runtime(2.0))
        try:
            await broker.publish(QUEUE, timed(make_envelope(QUEUE), soon()))
        finally:
            await broker.close()

    assert gone.accepted > 0


async def test_a_connection_that_freezes_while_it_opens_is_given_up(
    link: FaultProxy, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose server vanished in that moment would hang for ever, without a line in its log."""
    monkeypatch.setattr(store, "TURN_S", 0.2)
    broker = open_broker(await freeze_after_login(link, postgres_url), runtime(PATIENCE_S))
    before = link.accepted
    publish = asyncio.create_task(broker.publish(QUEUE, timed(make_envelope(QUEUE), soon())))
    try:
        async with asyncio.timeout(PATIENCE_S):
            while link.accepted < before + 5:  # each try also asks the server to cancel its statement
                await asyncio.sleep(0.01)
    finally:
        publish.cancel()
        link.thaw()
        await broker.close()


@pytest.mark.parametrize("ask", [of_outbox, pending])
async def test_a_command_ends_if_its_server_freezes(ask: Ask, link: FaultProxy, postgres_url: str) -> None:
    """A deploy that asks with `migrate --check` would stand still until somebody ends it."""
    behind = await freeze_after_login(link, postgres_url)

    with pytest.raises(BrokerUnavailable, match="no answer in time"):
        await asyncio.wait_for(ask(behind, runtime(1.0)), PATIENCE_S)


@pytest_asyncio.fixture
async def empty(postgres: Postgres) -> AsyncGenerator[str]:
    """A database without leveret's tables."""
    async with postgres.database() as made:
        yield made


def sleeps_for(seconds: float) -> tuple[Migration, ...]:
    return (Migration("0001_sleep", f"-- lowest reader: 1\nSELECT pg_sleep({seconds});\n", 1),)


async def asleep(postgres: Postgres) -> int:
    """Return the backend of the migration that sleeps."""
    async with asyncio.timeout(PATIENCE_S):
        while not (rows := await postgres.query("SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'")):
            await asyncio.sleep(0.01)
    pid: int = rows[0]["pid"]
    return pid


@pytest.mark.parametrize("left", ["nothing", "another address"])
async def test_a_migration_whose_server_is_gone_without_a_word_ends(
    left: str, postgres: Postgres, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deploy would wait for ever: nobody ends a connection to a host without power, also if another host has its database now."""
    monkeypatch.setattr(schema, "shipped", lambda: sleeps_for(600))
    monkeypatch.setattr(migrator, "WATCH_S", 0.2)
    async with FaultProxy(urlsplit(empty).port or 0) as link:
        parts = urlsplit(link.url_of(empty))
        login, _, host = parts.netloc.rpartition("@")
        hosts = f"{host},127.0.0.1:{urlsplit(empty).port}" if left == "another address" else host
        migrating = open_migrator(parts._replace(netloc=f"{login}@{hosts}").geturl(), runtime(6.0))
        task = asyncio.ensure_future(migrating.migrate(lambda _: None))
        pid = await asleep(postgres)
        link.freeze()
        link.refuse = True
        await postgres.terminate(pid)

        with pytest.raises(BrokerUnavailable, match="the server is gone, or gives no answer"):
            await asyncio.wait_for(task, PATIENCE_S)


async def test_a_migration_that_takes_long_is_not_ended(
    link: FaultProxy, postgres: Postgres, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The larger a table is, the surer would its upgrade fail."""
    monkeypatch.setattr(schema, "shipped", lambda: sleeps_for(600))
    monkeypatch.setattr(migrator, "WATCH_S", 0.02)
    task = asyncio.ensure_future(open_migrator(link.url_of(empty), runtime(PATIENCE_S)).migrate(lambda _: None))
    pid = await asleep(postgres)
    async with asyncio.timeout(PATIENCE_S):
        while link.accepted < 5 and not task.done():  # it asked three times and more
            await asyncio.sleep(0.01)

    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, PATIENCE_S)
    await postgres.terminate(pid)


@pytest.mark.parametrize("ask", [depths, of_outbox])
async def test_a_command_says_that_the_tables_are_locked(ask: Ask, postgres_url: str) -> None:
    """An operator would look for a fault of the network, while a transaction of somebody's holds the lock."""
    holder = await asyncpg.connect(postgres_url)
    try:
        await holder.execute("BEGIN; LOCK leveret.jobs, leveret.outbox IN ACCESS EXCLUSIVE MODE")

        with pytest.raises(BrokerUnavailable, match="canceling statement due to lock timeout"):
            await asyncio.wait_for(ask(postgres_url, runtime(4.0)), PATIENCE_S)
    finally:
        await holder.close()


async def test_a_command_without_a_server_ends_at_once(postgres_url: str) -> None:
    """Whoever looks at the queues during an outage would wait 15 s for each look."""
    away = url_at(postgres_url, free_ports(1)[0])

    with pytest.raises(BrokerUnavailable, match="Connect call failed"):
        await asyncio.wait_for(depths(away, runtime(100 * PATIENCE_S)), PATIENCE_S)
