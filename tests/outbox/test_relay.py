"""A job that was published in a committed transaction reaches the broker, wherever a relay dies."""

import asyncio
import logging
import re
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from leveret import InvalidJob, Outgoing, Priority
from leveret.brokers.postgresql import open_outbox, outbox
from leveret.clock import ManualClock
from leveret.errors import ConfigurationError
from leveret.outbox import Waiting
from leveret.runtime import Runtime
from leveret.testing import running
from tests.outbox.shop import PATIENCE_S, Shop, eventually, publish
from tests.postgres.node import Postgres
from tests.proxy import FaultProxy


async def test_what_is_committed_runs_and_what_is_rolled_back_does_not(shop: Shop) -> None:
    """An invoice for an order that isn't there, or an order without one."""
    async with shop.app.publisher() as publisher, shop.connected() as connection:
        rolled_back = connection.transaction()
        await rolled_back.start()
        await publisher.publish(shop.order(1), connection=connection)
        await rolled_back.rollback()
        async with connection.transaction():
            receipt = await publisher.publish(
                shop.order(2, "é"), connection=connection, priority=Priority.HIGH, headers={"x-tenant": 7}, job_id="two"
            )
        async with shop.app.relay(), shop.app.worker():
            await shop.publish(shop.order(3))
            await eventually(lambda: 3 in shop.ran, lambda: shop.ran)

    assert receipt.state == "uncommitted"
    assert shop.ran == [2, 3]
    envelope = shop.attempts[0].envelope
    assert (envelope.job_id, envelope.priority, envelope.headers) == ("two", Priority.HIGH, {"x-tenant": 7})
    assert envelope.app == "shop"
    assert await shop.waiting() == 0


async def test_one_relay_keeps_the_order_over_many_batches(shop: Shop) -> None:
    """Two changes of one order that swap places leave it as it was before."""
    await shop.publish(*(shop.order(n) for n in range(1200)))

    async with shop.app.relay(), shop.app.worker():
        await eventually(lambda: len(shop.ran) == 1200, lambda: len(shop.ran))

    assert shop.ran == list(range(1200))


async def test_two_relays_publish_each_job_once(shop: Shop) -> None:
    """Relays that take each other's rows double all jobs."""
    ids = await shop.publish(*(shop.order(n) for n in range(3000)))

    async with shop.app.relay(), shop.app.relay():
        await shop.empty()
    async with shop.app.worker():
        await eventually(lambda: len(shop.ids) == 3000, lambda: len(shop.ids))

    assert shop.ids == Counter(ids)


async def test_a_waiting_relay_is_told(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each job would wait for the next look."""
    monkeypatch.setattr(outbox, "POLL_S", 600.0)
    monkeypatch.setattr(outbox, "FIRST_POLL_S", 600.0)
    async with shop.app.relay(), shop.app.publisher() as publisher, shop.connected() as connection:
        # the mark is there before the relay looks once more; a job that comes in between is found by that look
        async with asyncio.timeout(PATIENCE_S):
            while not await connection.fetch("SELECT FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock'"):
                await asyncio.sleep(0.01)
        for n in range(3):
            await publish(publisher, connection, shop.order(n))
            await shop.empty()


async def _taken(shop: Shop, clock: ManualClock) -> Sequence[Waiting]:
    line = open_outbox(shop.outbox, Runtime(app="shop", clock=clock)).line()
    try:
        jobs = await line.take(10, only=None, without=(), deadline=0.0)
        await line.leave()
    finally:
        await line.close()
    return jobs


async def test_delays_count_from_the_publish_by_the_clock_of_the_server(shop: Shop) -> None:
    """A job that waited an hour for a relay would wait for its delay once more, and by a wrong clock for hours."""
    clock = ManualClock(4_000_000_000.0)  # the relay's clock is decades ahead
    await shop.publish(
        Outgoing(shop.order(1), delay_s=3600),
        Outgoing(shop.order(2), delay_s=60),
        Outgoing(shop.order(3), expires_s=90),
    )
    async with shop.connected() as connection:
        await connection.execute("UPDATE leveret.outbox SET added_ms = added_ms - 600000")

    hour, minute, expiring = await _taken(shop, clock)

    assert hour.envelope.due_ms is not None
    left_s = hour.envelope.due_ms / 1000 - clock.now()
    assert 3000 - PATIENCE_S < left_s <= 3000
    assert minute.envelope.due_ms is None
    assert expiring.envelope.expires_at_ms == pytest.approx(1000 * expiring.envelope.created_s + 90_000, abs=1000)


async def test_a_clock_of_the_server_that_was_set_back_makes_no_delay_longer(shop: Shop) -> None:
    """A clock that is corrected by an hour would hold up each job that waits in the outbox then by that hour, at the broker."""
    await shop.publish(Outgoing(shop.order(1), delay_s=60))
    async with shop.connected() as connection:
        await connection.execute("UPDATE leveret.outbox SET added_ms = added_ms + 3600000")
    clock = ManualClock(4_000_000_000.0)

    [job] = await _taken(shop, clock)

    # The delay is counted in whole milliseconds, from a moment of the publisher's that is not one.
    assert job.envelope.due_ms == pytest.approx(1000 * (clock.now() + 60), abs=1)


async def test_the_rest_of_a_delay_passes_at_the_broker(shop: Shop) -> None:
    """A delayed job that runs at once, or never."""
    clock = asyncio.get_running_loop().time
    began = clock()
    await shop.publish(Outgoing(shop.order(1), delay_s=1.5))

    async with shop.app.relay(), shop.app.worker():
        await eventually(lambda: shop.ran == [1])

    assert clock() - began >= 1.5


async def test_what_the_broker_never_takes_becomes_a_dead_letter_and_blocks_nothing(shop: Shop) -> None:
    """One job that is too large would hold up all others for ever."""
    roomy = Shop(shop.app.broker_url() or "", shop.outbox, max_header_bytes=100 << 10)
    large = Outgoing(roomy.order(1), headers={"x-large": "x" * 60_000}, job_id="large")
    await roomy.publish(roomy.order(0), large, roomy.order(2))
    async with roomy.connected() as connection:  # a row that nobody but a wrong program writes
        await connection.execute(
            "UPDATE leveret.outbox SET queue = 'no queue' WHERE seq = (SELECT min(seq) FROM leveret.outbox)"
        )

    async with roomy.app.relay(), roomy.app.worker():
        await eventually(lambda: roomy.ran == [2], lambda: roomy.ran)
        await roomy.empty()

    async with roomy.connected() as connection:
        dead = await connection.fetch("SELECT queue, job_id, headers FROM leveret.outbox_dead ORDER BY seq")
    assert [(row["queue"], row["job_id"] == "large") for row in dead] == [("no queue", False), (roomy.queue.name, True)]
    assert "MessageTooLarge" in dead[1]["headers"]


@pytest.mark.parametrize(
    ("column", "value", "why"),
    [
        ("created_s", -1, "AMQP can't carry its properties"),
        ("headers", '{"x":' * 700 + "1" + "}" * 700, "AMQP can't carry its properties"),
        ("added_ms", -(1 << 63), "its added_ms is before 1970"),
    ],
    ids=["time", "depth", "long ago"],
)
async def test_a_row_of_a_wrong_program_ends_no_relay(shop: Shop, column: str, value: object, why: str) -> None:
    """A relay that ends or stands still at a row does so after each restart, and all jobs behind it stay."""
    await shop.publish(shop.order(1))
    async with shop.connected() as connection:
        await connection.execute(f"UPDATE leveret.outbox SET {column} = $1", value)
    await shop.publish(shop.order(2))

    async with shop.app.relay(), shop.app.worker():
        await eventually(lambda: shop.ran == [2], lambda: shop.ran)
        await shop.empty()

    async with shop.connected() as connection:
        [dead] = await connection.fetch("SELECT headers FROM leveret.outbox_dead")
    assert why in dead["headers"]


async def test_a_relay_works_behind_a_pooler(shop: Shop, postgres: Postgres) -> None:
    """Whose database can only be reached through PgBouncer would have jobs that nobody relays."""
    pooler = await postgres.pooler(default_pool_size=2)
    pooled = Shop(shop.app.broker_url() or "", f"{pooler.url_of(shop.outbox)}?prepared=off", queue=shop.queue)
    ids = await shop.publish(*(shop.order(n) for n in range(1200)))

    async with pooled.app.relay(), shop.app.worker():
        await eventually(lambda: len(shop.ran) == 1200, lambda: len(shop.ran))
        late = await shop.publish(shop.order(1200))
        await eventually(lambda: len(shop.ran) == 1201, lambda: len(shop.ran))

    assert shop.ran == list(range(1201))
    assert shop.ids == Counter([*ids, *late])


async def test_a_killed_relay_loses_nothing(shop: Shop, tmp_path: Path) -> None:
    """A relay dies between the broker's confirm and its commit, and its jobs are gone or stay locked."""
    (tmp_path / "relayed.py").write_text("from leveret import App\napp = App('shop')\n")
    ids = set(await shop.publish(*(shop.order(n) for n in range(3000))))

    for _ in range(2):
        process = _relay(shop, tmp_path)
        left = await shop.waiting()
        async with asyncio.timeout(PATIENCE_S):
            while left == await shop.waiting() > 0:
                await asyncio.sleep(0.005)
        process.kill()
        process.wait(10)
        ids |= set(await shop.publish(*(shop.order(n) for n in range(500))))
    async with shop.app.relay():
        await shop.empty()
    async with shop.app.worker():
        await eventually(lambda: set(shop.ids) == ids, lambda: len(shop.ids))


def _relay(shop: Shop, folder: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("leveret")), "relay", "relayed:app"],
        cwd=folder,
        env={"LEVERET_BROKER": shop.app.broker_url() or "", "LEVERET_OUTBOX": shop.outbox, "PATH": "/usr/bin"},
        stderr=subprocess.DEVNULL,
    )


async def test_a_broker_that_is_away_costs_no_job(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """The relay would give up, or bury what it can't publish now."""
    away = Shop("amqp://guest:guest@127.0.0.1:1/", shop.outbox, reconnect_base_s=0.05, reconnect_cap_s=0.05)
    await away.publish(*(away.order(n) for n in range(3)))

    with caplog.at_level(logging.WARNING, "leveret.relay"):
        async with away.app.relay():
            await eventually(lambda: "stay in the outbox" in caplog.text)
            await asyncio.sleep(0.3)  # several tries later

    assert await away.waiting() == 3
    assert caplog.text.count("stay in the outbox") == 1


async def test_a_relay_that_waits_for_a_frozen_database_stops(shop: Shop) -> None:
    """A program that must end, as in a deploy, would hang for as long as a connection may take to open, and then be killed."""
    async with FaultProxy(urlsplit(shop.outbox).port or 0) as link:
        frozen = Shop(shop.app.broker_url() or "", link.url_of(shop.outbox), connect_timeout_s=10 * PATIENCE_S)
        async with shop.connected() as locker, asyncio.timeout(PATIENCE_S):
            await locker.execute("BEGIN; LOCK leveret.outbox IN ACCESS EXCLUSIVE MODE")
            async with frozen.app.relay():
                while not await locker.fetch("SELECT FROM pg_locks WHERE NOT granted"):
                    await asyncio.sleep(0.01)
                link.freeze()


async def test_what_waiting_cannot_mend_ends_the_relay(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """A relay without its tables would look as if it worked."""
    wrong = Shop(shop.app.broker_url() or "", f"{shop.outbox}?schema=other")

    with pytest.raises(ConfigurationError, match="leveret migrate"):
        async with wrong.app.relay():
            await eventually(lambda: "the relay has ended" in caplog.text)


async def test_a_test_publishes_at_once(shop: Shop) -> None:
    """A test would need the outbox's database, and a relay."""
    async with running(shop.app) as lab, shop.app.relay(), shop.app.publisher() as publisher:
        await publisher.publish(shop.order(1), connection=object())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        await lab.drain()

    assert shop.ran == [1]


async def test_publishing_without_a_connection_goes_to_the_broker(shop: Shop) -> None:
    """Every job would wait for the relay."""
    async with shop.app.publisher() as publisher:
        receipt = await publisher.publish(shop.order(1))

    assert receipt.state == "confirmed"
    assert await shop.waiting() == 0


async def test_a_connection_outside_a_transaction_is_refused(shop: Shop) -> None:
    """The job would be committed by itself, without its order."""
    async with shop.app.publisher() as publisher, shop.connected() as connection:
        with pytest.raises(InvalidJob, match="no open transaction"):
            await publisher.publish(shop.order(1), connection=connection)


@asynccontextmanager
async def _as_role(shop: Shop, postgres: Postgres, begins: str) -> AsyncGenerator[Shop]:
    """Give the shop as a role that has what docs/operations.md grants below a sentence that begins so."""
    page = (Path(__file__).parents[2] / "docs/operations.md").read_text(encoding="utf-8")
    sql = page.partition(begins)[2].partition("```sql")[2].partition("```")[0]
    async with postgres.role(shop.outbox) as url:
        role = urlsplit(url).username or ""
        for statement in re.sub(r" TO \w+;", f" TO {role};", sql).split(";"):
            if statement.strip():
                await postgres.query(statement, url=shop.outbox)
        yield Shop(shop.app.broker_url() or "", url, queue=shop.queue)


async def test_the_rights_that_operations_asks_for_are_enough(shop: Shop, postgres: Postgres) -> None:
    """An operator would grant more, and more, until it works."""
    async with _as_role(shop, postgres, "**A program that publishes into the outbox**") as orders:
        [job_id] = await orders.publish(shop.order(1))
        async with orders.connected() as connection:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.fetch("SELECT FROM leveret.outbox")
            async with connection.transaction():
                at = open_outbox(orders.outbox, Runtime(app="shop"))
                assert await at.once(connection, "orders", job_id)

    async with _as_role(shop, postgres, "**A relay**, and an administrator") as relay, relay.app.relay():
        await shop.empty()
