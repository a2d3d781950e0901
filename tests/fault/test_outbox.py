"""A relay on a broker that hangs, a queue that takes nothing, and a job that is too large for the broker."""

import asyncio
from collections.abc import AsyncGenerator
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from leveret import BrokerUnavailable, Publisher
from tests.conftest import StartNode
from tests.outbox.shop import Shop, eventually, migrated
from tests.postgres.node import Postgres
from tests.proxy import FaultProxy
from tests.rabbit.node import Rabbit

pytestmark = pytest.mark.fault

FULL: dict[str, int | str] = {"max-length": 1, "overflow": "reject-publish"}


@pytest_asyncio.fixture
async def url(postgres: Postgres) -> AsyncGenerator[str]:
    """A database with leveret's tables."""
    async with migrated(postgres) as made:
        yield made


async def _oldest_s(shop: Shop, postgres: Postgres) -> float:
    """Return for how long the oldest transaction of the relay's is open."""
    rows = await postgres.query(
        "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0)::float FROM pg_stat_activity"
        " WHERE application_name LIKE 'leveret % relay' AND datname = $1",
        urlsplit(shop.outbox).path[1:],
    )
    found: float = rows[0][0]
    return found


async def test_no_transaction_is_open_for_long_while_the_broker_hangs(
    rabbit: Rabbit, postgres: Postgres, url: str
) -> None:
    """An outage of RabbitMQ would stop vacuum in the whole database, which is then the second outage."""
    async with FaultProxy(urlsplit(rabbit.url).port or 5672) as proxy:
        shop = Shop(proxy.url_of(rabbit.url), url)
        async with shop.app.relay():
            await shop.publish(shop.order(0))
            await shop.empty()
            proxy.freeze()
            await shop.publish(*(shop.order(n) for n in range(1, 700)))
            ages = [await _oldest_s(shop, postgres)]
            ends = asyncio.get_running_loop().time() + 12
            while asyncio.get_running_loop().time() < ends:
                await asyncio.sleep(0.05)
                ages.append(await _oldest_s(shop, postgres))
            proxy.thaw()
            await shop.empty()

    assert max(ages) > 2  # it was seen
    assert max(ages) < 5 + 1  # a second for the look itself


async def _fill(publisher: Publisher, shop: Shop) -> None:
    """Publish until the queue refuses: a policy comes into effect a while after it is set."""
    for _ in range(10_000):
        await publisher.publish(shop.order(0))


async def test_a_full_queue_holds_up_only_its_own_jobs(rabbit: Rabbit, url: str) -> None:
    """One service that is down would stop the jobs of all others."""
    full, other = Shop(rabbit.url, url), Shop(rabbit.url, url)
    async with full.app.publisher() as publisher:
        await publisher.publish(full.order(0))  # declares the queue
        await rabbit.set_policy(full.queue.name, f"^{full.queue.name}$", FULL)
        with pytest.raises(BrokerUnavailable):
            await _fill(publisher, full)
    ids = await full.publish(*(full.order(n) for n in range(1, 1201)))  # more than two batches
    await other.publish(*(other.order(n) for n in range(10)))

    async with full.app.relay():
        async with other.app.worker():
            await eventually(lambda: sorted(other.ran) == list(range(10)), lambda: other.ran)
        assert await full.waiting() > 0
        await rabbit.clear_policy(full.queue.name)
        async with full.app.worker():
            await eventually(lambda: set(ids) <= set(full.ids), lambda: len(full.ids))


async def test_a_job_that_is_too_large_for_the_broker_takes_no_other_with_it(
    rabbit_node: StartNode, postgres: Postgres, url: str
) -> None:
    """RabbitMQ closes the channel at such a body: all jobs of the batch would come back with it, each time."""
    shop = Shop((await rabbit_node(conf={"max_message_size": "65536"})).url, url)
    await shop.publish(*(shop.order(n, "x" * (100_000 if n == 50 else 10)) for n in range(100)))

    async with shop.app.relay(), shop.app.worker():
        await eventually(lambda: set(shop.ran) == set(range(100)) - {50}, lambda: len(set(shop.ran)))
        await shop.empty()

    dead = await postgres.query("SELECT headers FROM leveret.outbox_dead", url=url)
    assert ["MessageTooLarge" in row["headers"] for row in dead] == [True]
