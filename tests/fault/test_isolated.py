"""A node that is cut off from its cluster keeps its connections: nothing is confirmed or delivered there, and nothing says so."""

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import pytest_asyncio

from leveret import App, Attempt, Job, PublishError, Queue
from tests.fault.bench import eventually
from tests.nodes import ours
from tests.rabbit.cluster import Cluster
from tests.rabbit.network import NoNetwork
from tests.rabbit.node import Installation, Rabbit

pytestmark = [pytest.mark.fault, pytest.mark.timeout(240)]

WITHIN_S = 15.0


@pytest_asyncio.fixture
async def cluster(rabbit_found: Rabbit | Installation) -> AsyncGenerator[Cluster]:
    """Three nodes that ignore partitions, as RabbitMQ does unless it is told otherwise: a node that is cut off never ends its connections."""
    made = Cluster(ours(rabbit_found), conf={"cluster_partition_handling": "ignore"})
    try:
        await made.start()
        yield made
    except NoNetwork as error:
        pytest.skip(str(error))
    finally:
        await made.close()


async def test_worker_and_publisher_leave_a_node_that_is_cut_off(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """With three URLs, publisher and worker stayed on the minority node for a whole partition of 60 s, and nothing was logged."""
    caplog.set_level(logging.INFO, "leveret")
    cut = cluster.nodes[0]
    app, queue = App("shop", broker=cluster.url_from(cut)), Queue(f"cut-{uuid.uuid4().hex[:12]}", priorities=False)
    starts: Counter[str] = Counter()

    class Order(Job, name="order", queue=queue):
        """A job to run."""

    @app.handler
    async def handle(job: Order, attempt: Attempt[Any]) -> None:
        starts[attempt.job_id] += 1

    async with app.worker(queues=[queue.name]) as worker, app.publisher() as publisher:
        await eventually(lambda: worker.state().name == "ready")
        before = (await publisher.publish(Order())).job_id
        await eventually(lambda: starts[before] == 1)
        await cluster.lead(queue.name, cut)
        cluster.isolate(cut)
        began, confirmed = time.monotonic(), list[str]()
        while time.monotonic() < began + WITHIN_S:
            try:
                confirmed.append((await publisher.publish(Order(), timeout_s=1)).job_id)
            except PublishError:
                continue
            await asyncio.sleep(0.2)
            if starts[confirmed[-1]]:
                break
        took_s = time.monotonic() - began

        assert confirmed, caplog.text
        assert starts[confirmed[-1]], caplog.text
        assert took_s < WITHIN_S
        left = [record for record in caplog.records if "cut off from its cluster: " in record.getMessage()]
        assert [record.levelname for record in left] == ["WARNING"], "one for worker and publisher of this program"
        await asyncio.sleep(3)
        assert worker.state().name == "ready", "it stays where it went"
        cluster.heal()
        await cluster.whole()
        await eventually(lambda: "is back in its cluster" in caplog.text, timeout_s=60)
        after = (await publisher.publish(Order(), timeout_s=10)).job_id
        await eventually(lambda: starts[after] == 1)
    assert caplog.text.count("is back in its cluster") == 1
    assert {starts[job] for job in (before, after, *confirmed)} == {1}
