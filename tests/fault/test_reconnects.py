"""Many workers that lose their connections at once, and one that loses its own: how soon each consumes again."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from datetime import datetime
from functools import partial
from typing import Any

import pytest

from leveret import App, Attempt, Job, Queue, Retry, Settings
from leveret.broker import Subscription
from leveret.brokers.rabbitmq import open_broker
from leveret.consuming.limits import Concurrency
from leveret.consuming.settlement import MOST_LOST
from leveret.consuming.worker import working
from leveret.outcome import Kind
from leveret.runtime import Runtime
from tests.conftest import StartNode
from tests.contract.harness import Recorder, ready
from tests.fault.bench import eventually, link_to
from tests.rabbit.node import Rabbit

pytestmark = [pytest.mark.fault, pytest.mark.timeout(180)]

CLIENTS = 64


async def test_64_clients_with_four_queues_each_consume_again_within_ten_seconds(
    rabbit: Rabbit, caplog: pytest.LogCaptureFixture
) -> None:
    """R33. A herd that comes back at once is turned away, and comes back at once."""
    caplog.set_level(logging.INFO, "leveret")
    name = uuid.uuid4().hex[:12]
    queues = [Queue(f"herd-{number}-{name}", priorities=False) for number in range(4)]
    brokers = [open_broker(rabbit.url, Runtime(app="herd")) for _ in range(CLIENTS)]
    sinks = [Recorder() for _ in brokers]
    try:
        consumptions = [
            await broker.consume([Subscription(queue, 1) for queue in queues], sink)
            for broker, sink in zip(brokers, sinks, strict=True)
        ]
        await rabbit.close_connections()
        # RabbitMQ closes one after the other: on a slow machine the first is back before the last is lost
        await asyncio.wait_for(asyncio.gather(*(sink.lost_once.wait() for sink in sinks)), 20)
        began = time.monotonic()
        await eventually(lambda: all(ready(each) for each in consumptions), lambda: caplog.text)
        took_s = time.monotonic() - began
    finally:
        await asyncio.gather(*(broker.close() for broker in brokers))

    assert took_s < 10
    assert "waiting to consume" not in caplog.text, "a connect was refused, or had no answer"


async def test_a_worker_whose_connection_is_reset_every_second_is_back_within_two_each_time(
    rabbit: Rabbit,
) -> None:
    """R14. A link that flaps is away for a moment: a worker that waits longer each time is away for good."""
    async with link_to(rabbit) as link:
        app, queue = App("shop", broker=link.url), Queue(f"reset-{uuid.uuid4().hex[:12]}", priorities=False)
        starts: Counter[str] = Counter()
        latest, enough = 0.0, asyncio.Event()

        class Order(Job, name="order", queue=queue):
            """A job to run."""

        async def run(job: Any, attempt: Attempt[Any]) -> None:
            nonlocal latest
            starts[attempt.job_id] += 1
            latest = time.monotonic()

        app.handler(job=Order)(run)
        direct = App("shop", broker=rabbit.url)
        ids: list[str] = []

        async def publish() -> None:
            async with direct.publisher() as publisher:
                while not enough.is_set():
                    ids.append((await publisher.publish(Order())).job_id)
                    await asyncio.sleep(0.005)

        def ready_since(before: datetime) -> bool:
            return worker.state().name == "ready" and worker.state().since > before

        def went_on(cut: float) -> bool:
            return latest > cut + 0.05

        async with app.worker(queues=[queue.name]) as worker:
            await eventually(lambda: worker.state().name == "ready")
            publishing = asyncio.create_task(publish())
            for _ in range(8):
                await asyncio.sleep(1)
                before = worker.state().since
                link.reset()
                cut = time.monotonic()
                await eventually(partial(ready_since, before), timeout_s=2)
                await eventually(partial(went_on, cut), timeout_s=2 - (time.monotonic() - cut))
            enough.set()
            await publishing
            await eventually(lambda: all(starts[job] for job in ids))

    assert sum(starts.values()) - len(ids) <= 8 * 20, "only what was on its way when the connection went"


async def test_a_publishing_connection_that_never_lasts_is_opened_ever_more_rarely(rabbit: Rabbit) -> None:
    """A load balancer that accepts and hangs up would get a connection after the other, and the log a line for each."""

    class Order(Job, name="order", queue=Queue(f"brief-{uuid.uuid4().hex[:12]}", priorities=False)):
        """A job to publish."""

    async with link_to(rabbit) as link, App("shop", broker=link.url).publisher() as publisher:
        await publisher.publish(Order())
        before = link.accepted
        for _ in range(60):
            link.reset()
            await asyncio.sleep(0.05)
        assert link.accepted - before < 20
        await publisher.publish(Order(), timeout_s=10)


@pytest.mark.parametrize("fail", [False, True], ids=["jobs that succeed", "jobs that fail"])
async def test_a_hundred_running_jobs_and_no_broker_are_a_few_lines(
    rabbit_node: StartNode, caplog: pytest.LogCaptureFixture, fail: bool
) -> None:
    """A line per job, or per try, fills the disk in the night in which the broker is away."""
    caplog.set_level(logging.INFO, "leveret")
    node = await rabbit_node()
    often = Settings(reconnect_base_s=0.1, reconnect_cap_s=0.2)
    app, queue = App("shop", broker=node.url, settings=often), Queue(f"many-{uuid.uuid4().hex[:12]}", priorities=False)
    started, ended, gone = Counter[str](), Counter[str](), asyncio.Event()

    class Order(Job, name="order", queue=queue):
        """A job to run."""

    async def run(job: Any, attempt: Attempt[Any]) -> Retry | None:
        started[attempt.job_id] += 1
        await gone.wait()
        ended[attempt.job_id] += 1
        return Retry(0.25) if fail and attempt.number == 1 else None

    app.handler(job=Order)(run)
    async with working(app, concurrency=[Concurrency(process=100)]) as work, app.publisher() as publisher:
        await publisher.publish_many([Order() for _ in range(100)])
        await eventually(lambda: len(started) == 100)
        await node.flush()
        await node.kill9()
        await eventually(lambda: work.worker.state().name == "connecting")
        gone.set()
        await eventually(lambda: len(ended) == 100)
        await asyncio.sleep(2)  # several tries
        await node.start()
        await eventually(lambda: work.worker.state().name == "ready", timeout_s=10)
        await eventually(lambda: work.consumer.counts[Kind.REMEMBERED] == 100)
        await eventually(lambda: sum(ended.values()) == (200 if fail else 100))

    assert sum(started.values()) == (200 if fail else 100)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("leveret")]
    assert len(lines) < 10 + MOST_LOST * fail, lines
    assert any("can't be acknowledged any more: 100, " in line for line in lines), lines
