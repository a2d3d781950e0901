"""A quorum queue, or one level of it, that has no leader and can't be consumed: its worker's other queues are consumed as if nothing were."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest

from leveret import App, Attempt, Job, Priority, Queue, Settings, Worker
from leveret.brokers.rabbitmq import aside, consumers, consuming
from leveret.consuming.worker import working
from leveret.errors import ConfigurationError, LeveretError
from tests.conftest import StartNode
from tests.fault.bench import Bench, eventually
from tests.rabbit.node import Rabbit
from tests.rabbit.proxy import FaultProxy
from tests.rabbit.raw import Raw

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]


class Shop:
    """An app with one queue that gets sick and one that stays well; it counts the starts of each job."""

    def __init__(self, url: str, kind: Literal["quorum", "classic"] = "quorum") -> None:
        name = uuid.uuid4().hex[:12]
        self.app = App("shop", broker=url)
        self.sick, self.well = Queue(f"sick-{name}", type=kind), Queue(f"well-{name}", type=kind)
        self.starts: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()

        class Email(Job, name="email", queue=self.sick):
            seconds: float = 0.0

        class Report(Job, name="report", queue=self.well):
            seconds: float = 0.0

        self.Email, self.Report = Email, Report

        async def run(job: Any, attempt: Attempt[Any]) -> None:
            self.starts[attempt.job_id] += 1
            await asyncio.sleep(job.seconds)
            self.ends[attempt.job_id] += 1

        for job_class in (Email, Report):
            self.app.handler(job=job_class)(run)

    @asynccontextmanager
    async def working(self) -> AsyncGenerator[Worker]:
        """Run a worker of both queues, which is ready."""
        async with self.app.worker(queues=[self.sick.name, self.well.name]) as worker:
            await eventually(lambda: worker.state().name == "ready")
            yield worker

    async def publish(self, *jobs: Job, priority: Priority = Priority.NORMAL) -> list[str]:
        """Publish; return the ids."""
        async with self.app.publisher() as publisher:
            return [(await publisher.publish(job, priority=priority)).job_id for job in jobs]


def about(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    """The lines at INFO and above with `text`."""
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


async def test_a_level_that_cannot_be_consumed_costs_no_other_job_a_second_run(
    rabbit: Rabbit, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 jobs of another level were started 4 257 times in 75 s, all as attempt 1: one level without a leader ended every new connection."""
    caplog.set_level(logging.INFO, "leveret")
    monkeypatch.setattr(aside, "BASE_S", 0.2)
    monkeypatch.setattr(aside, "CAP_S", 0.5)
    shop = Shop(rabbit.url)
    async with shop.working() as worker:
        running = await shop.publish(*(shop.Report(seconds=2) for _ in range(4)))
        waiting = await shop.publish(shop.Email(), priority=Priority.LOW)
        await eventually(lambda: shop.ends[waiting[0]] == 1)
        await rabbit.stop_queue(f"{shop.sick.name}.low")
        try:
            await rabbit.close_connections()
            others = await shop.publish(
                *(shop.Email(seconds=0.2) for _ in range(100)), *(shop.Report(seconds=0.2) for _ in range(100))
            )
            await eventually(lambda: all(shop.ends[job] for job in (*others, *running)), timeout_s=20)
            await eventually(lambda: worker.state().name == "degraded")
            await asyncio.sleep(3)  # several tries to consume the level

            assert {job: shop.starts[job] for job in others if shop.starts[job] != 1} == {}
            assert max(shop.starts[job] for job in running) <= 2, "once more: their connection was closed as they ran"
            assert [queue.name for queue in worker.state().queues] == ["sick", "consumed"]
            assert f"{shop.sick.name}.low" in worker.state().why
            assert len(about(caplog, f"{shop.sick.name}.low")) == 1, caplog.text
        finally:
            await rabbit.start_queue(f"{shop.sick.name}.low")
        late = await shop.publish(*(shop.Email() for _ in range(20)), priority=Priority.LOW)
        await eventually(lambda: all(shop.ends[job] == 1 for job in late), lambda: caplog.text)
        await eventually(lambda: worker.state().name == "ready")
        assert {shop.starts[job] for job in late} == {1}
        assert worker.state().why == ""


@pytest.mark.parametrize("kind", ["quorum", "classic"])
async def test_what_one_queue_loses_costs_the_other_queues_nothing(
    rabbit: Rabbit, caplog: pytest.LogCaptureFixture, kind: Literal["quorum", "classic"]
) -> None:
    """A channel that the broker closes for one queue took the connection along, and every other queue's running jobs ran twice."""
    caplog.set_level(logging.INFO, "leveret")
    if kind == "classic" and os.environ.get("LEVERET_TEST_RABBIT") == "4.3":
        pytest.skip("classic queues of RabbitMQ 4.3 have no consumer timeout")
    shop = Shop(rabbit.url, kind)
    await rabbit.limit_consumers(2)
    try:
        async with shop.working() as worker:
            running = await shop.publish(*(shop.Report(seconds=1.5) for _ in range(8)))
            long = await shop.publish(shop.Email(seconds=6))
            more = await shop.publish(*(shop.Report(seconds=0.5) for _ in range(60)))
            await eventually(lambda: bool(about(caplog, "degraded: ")))
            await eventually(lambda: worker.state().name == "ready")
            await eventually(lambda: all(shop.ends[job] for job in (*running, *long, *more)))

            assert {shop.starts[job] for job in (*running, *more)} == {1}
            assert not about(caplog, "connecting: ")
            assert shop.sick.name in about(caplog, "degraded: ")[0]
    finally:
        await rabbit.limit_consumers(1800)


async def test_a_deleted_queue_is_back_while_the_other_queues_run(
    rabbit: Rabbit, raw: Raw, caplog: pytest.LogCaptureFixture
) -> None:
    """A queue that somebody deleted and declared again had a worker that was connected, and took nothing from it."""
    caplog.set_level(logging.INFO, "leveret")
    shop = Shop(rabbit.url)
    async with shop.working() as worker:
        running = await shop.publish(*(shop.Report(seconds=3) for _ in range(8)))
        for level in ("", ".low", ".high", ".urgent"):
            await raw.delete(f"{shop.sick.name}{level}")
        await eventually(lambda: bool(about(caplog, "degraded: ")))
        await eventually(lambda: worker.state().name == "ready", timeout_s=5)
        jobs = [*await shop.publish(shop.Email()), *await shop.publish(shop.Email(), priority=Priority.LOW)]
        await eventually(lambda: all(shop.ends[job] == 1 for job in (*jobs, *running)), timeout_s=5)

        assert {shop.starts[job] for job in running} == {1}


async def test_a_queue_that_gets_sick_under_its_consumer_is_told_and_a_stop_loses_no_ack(
    rabbit: Rabbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its consumer looks healthy, and the cancel of that consumer ends the connection, with the acks of what ran to its end in the grace."""
    monkeypatch.setattr(consumers, "WATCH_S", 0.5)
    shop = Shop(rabbit.url)
    try:
        async with shop.working() as worker:
            await rabbit.stop_queue(f"{shop.sick.name}.low")
            await eventually(lambda: worker.state().name == "degraded")
            assert f"no consumer of {shop.sick.name}.low" in worker.state().why
            running = await shop.publish(*(shop.Report(seconds=2) for _ in range(8)))
            await eventually(lambda: all(shop.starts[job] for job in running))
    finally:
        await rabbit.start_queue(f"{shop.sick.name}.low")
    async with shop.working():
        after = await shop.publish(shop.Report())
        await eventually(lambda: bool(shop.ends[after[0]]))

    assert [shop.starts[job] for job in running] == [1] * 8


async def test_a_queue_that_is_well_again_under_its_consumer_is_ready_and_has_one_consumer(
    rabbit: Rabbit, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watchdog that registers again because of a count leaves a consumer too many at each false alarm."""
    monkeypatch.setattr(consumers, "WATCH_S", 0.5)
    shop = Shop(rabbit.url)
    async with shop.working() as worker:
        await rabbit.stop_queue(f"{shop.sick.name}.low")
        await eventually(lambda: worker.state().name == "degraded")
        await rabbit.start_queue(f"{shop.sick.name}.low")
        await eventually(lambda: worker.state().name == "ready")
        async with raw.channel() as channel:
            found = await channel.queue_declare(f"{shop.sick.name}.low", passive=True)
        assert found.consumer_count == 1


async def test_a_worker_that_can_consume_nothing_although_the_broker_answers_fails_and_goes_on_trying(
    rabbit: Rabbit, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that stands still for ever is replaced by nobody; an embedded one can't be replaced, and must go on when the queue does."""
    monkeypatch.setattr(consuming, "FRUITLESS_TRIES", 3)
    monkeypatch.setattr(aside, "BASE_S", 0.1)
    monkeypatch.setattr(aside, "CAP_S", 0.2)
    app, queue = App("shop", broker=rabbit.url), Queue(f"alone-{uuid.uuid4().hex[:12]}", priorities=False)

    class Email(Job, name="email", queue=queue):
        """A job to run."""

    async def run(job: Any) -> None: ...

    app.handler(job=Email)(run)
    async with working(app) as work:
        await rabbit.stop_queue(queue.name)
        try:
            await rabbit.close_connections()
            with pytest.raises(
                LeveretError, match="answers, but none of the queues could be consumed in 3 tries each"
            ) as failed:
                await asyncio.wait_for(work.consumption.failed(), 30)
            assert not isinstance(failed.value, ConfigurationError), (
                "which would end the process with 2, and no supervisor restarts it"
            )
            await eventually(lambda: work.worker.state().name == "failed")
        finally:
            await rabbit.start_queue(queue.name)
        await eventually(lambda: work.worker.state().name == "ready")
    assert len(about(caplog, "failed: ")) == 1


async def test_a_worker_whose_declares_are_refused_fails_and_goes_on_trying(
    rabbit: Rabbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody takes the permission away from a running fleet: it takes no job, and every process looks alive."""
    monkeypatch.setattr(consuming, "FRUITLESS_TRIES", 3)
    queue, user = Queue(f"alone-{uuid.uuid4().hex[:12]}", priorities=False), urlsplit(rabbit.url).username or "guest"
    app = App("shop", broker=rabbit.url, settings=Settings(reconnect_base_s=0.1, reconnect_cap_s=0.2))

    class Email(Job, name="email", queue=queue):
        """A job to run."""

    async def run(job: Any) -> None: ...

    app.handler(job=Email)(run)
    async with working(app) as work:
        await rabbit.ctl("set_permissions", user, "^$", ".*", ".*")
        try:
            await rabbit.ctl("delete_queue", queue.name)
            with pytest.raises(LeveretError, match="answers, but none of the queues could be consumed") as failed:
                await asyncio.wait_for(work.consumption.failed(), 30)
            assert not isinstance(failed.value, ConfigurationError)
        finally:
            await rabbit.ctl("set_permissions", user, ".*", ".*", ".*")
        await eventually(lambda: work.worker.state().name == "ready")


async def test_a_process_that_can_consume_nothing_although_the_broker_answers_ends_for_its_supervisor(
    bench: Callable[..., Bench], rabbit: Rabbit
) -> None:
    """A process that stands still for ever looks alive to everybody; another one may do better, and is there when the queue is well."""
    one = bench(rabbit.url)
    levels = [f"{one.queue.name}{level}" for level in ("", ".low", ".high", ".urgent")]
    await one.publish(one.recorder.Note())
    for level in levels:
        await rabbit.stop_queue(level)
    try:
        worker = one.start("--processes", "2", app="impatient")
        await worker.says("answers, but none of the queues could be consumed in 3 tries each")
        await worker.says(r"worker \d+ \(number \d\) died with exit code 1; restarting it")
    finally:
        for level in levels:
            await rabbit.start_queue(level)
    await one.until_lines("end", 1)
    worker.term()
    await worker.ended()


async def test_a_process_waits_for_a_broker_that_is_away_however_often_it_tries(
    bench: Callable[..., Bench], rabbit_node: StartNode
) -> None:
    """A fleet that ends in an outage, and is restarted with ever longer waits, comes back minutes after its broker."""
    node = await rabbit_node()
    async with FaultProxy(node.port) as link:
        one = bench(link.url, reconnect_base_s=0.05, reconnect_cap_s=0.1)
        worker = one.start(app="impatient")
        await worker.says("takes jobs from")
        await node.flush()
        await node.kill9()
        before = link.accepted
        await eventually(lambda: link.accepted > before + 60, lambda: worker.log)
        assert worker.process.poll() is None, worker.log
        await node.start()
        await one.publish(one.recorder.Note())
        await one.until_lines("end", 1)
        await worker.drained()
