"""A worker that has learnt after how long its broker takes a delivery back."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from msgspec import structs

from leveret import App, Job, Queue
from leveret.broker import Delivery
from leveret.clock import ManualClock
from leveret.consuming.consumer import Consumer
from leveret.consuming.worker import working
from leveret.envelope import Envelope
from leveret.outcome import Kind

reports = Queue("reports")


class Report(Job, name="report", queue=reports):
    """A long job."""


class Held:
    """A delivery that records how it is settled."""

    live = True
    problem = None
    queue = reports

    def __init__(self, *, redelivered: bool = False) -> None:
        self.redelivered = redelivered
        self.envelope = Envelope(job_id="id-1", job="report", queue="reports", body=b"{}", created_s=1)
        self.how: list[str] = []

    def done(self) -> None:
        self.how.append("done")

    def give_back(self) -> None:
        self.how.append("given back")


def delivered(consumer: Consumer, held: Held) -> Held:
    consumer.deliver(cast("Delivery", cast("Any", held)))
    return held


class Running:
    """A worker whose handler runs until `finish` is set."""

    def __init__(self, consumer: Consumer, clock: ManualClock) -> None:
        self.consumer = consumer
        self.clock = clock
        self.finish = asyncio.Event()
        self.starts = 0

    async def until_finished(self) -> None:
        self.finish.set()
        while self.consumer.busy:
            await asyncio.sleep(0)


@asynccontextmanager
async def a_worker(*, remember: bool = True) -> AsyncGenerator[Running]:
    app, clock = App("shop", broker="memory://"), ManualClock()
    this: Running

    @app.handler(remember=remember)
    async def run(job: Report) -> None:
        this.starts += 1
        await this.finish.wait()

    runtime = structs.replace(app.runtime(), clock=clock)
    async with working(app, runtime=runtime, grace_s=0) as work:
        this = Running(work.consumer, clock)
        yield this


async def test_the_delivery_of_a_running_job_is_given_back_before_the_limit_and_the_next_one_settled() -> None:
    """At the limit the broker closes the queue's channel, with the acks of all other jobs of the queue."""
    async with a_worker() as one:
        first = delivered(one.consumer, Held())
        await asyncio.sleep(0)
        one.consumer.overdue("reports", 8.0)
        one.clock.advance(5.9)
        assert first.how == []
        one.clock.advance(1)
        assert first.how == ["given back"]
        second = delivered(one.consumer, Held(redelivered=True))

        await one.until_finished()

        assert (one.starts, first.how, second.how) == (1, ["given back"], ["done"])
        assert one.consumer.counts == {Kind.DONE: 1}


async def test_a_job_that_ends_between_two_deliveries_is_not_run_by_the_second() -> None:
    """The delivery is on its way when the handler returns, and would run a job again that is done."""
    async with a_worker() as one:
        delivered(one.consumer, Held())
        await asyncio.sleep(0)
        one.consumer.overdue("reports", 8.0)
        one.clock.advance(7)
        await one.until_finished()

        second = delivered(one.consumer, Held(redelivered=True))
        await one.until_finished()

        assert (one.starts, second.how) == (1, ["done"])


async def test_a_job_that_is_to_run_again_keeps_its_delivery() -> None:
    """With remember=False, its next delivery would start beside it."""
    async with a_worker(remember=False) as one:
        first = delivered(one.consumer, Held())
        await asyncio.sleep(0)
        one.consumer.overdue("reports", 8.0)
        one.clock.advance(60)
        assert first.how == []
        await one.until_finished()
        assert first.how == ["done"]


async def test_an_unnamed_limit_is_the_age_of_the_oldest_delivery_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """RabbitMQ 4.3 cancels a consumer without a word; without the value nobody knows what to set."""
    caplog.set_level(logging.WARNING, "leveret")
    async with a_worker() as one:
        delivered(one.consumer, Held())
        await asyncio.sleep(0)
        one.clock.advance(8)
        one.consumer.overdue("reports", None)
        one.consumer.overdue("reports", 9.0)

        [said] = [record.getMessage() for record in caplog.records]
        assert said.startswith("queue reports: the broker took back a delivery that was held for 8 s, its limit ")
        assert "consumer_timeout_s isn't set" in said
        assert "Set consumer_timeout_s=8, and give each handler a Timeout of at most 6 s." in said
        await one.until_finished()


async def test_a_limit_below_a_second_is_not_believed(caplog: pytest.LogCaptureFixture) -> None:
    """A queue that was deleted and declared again at once looks like a timeout; each job would then be given back without end."""
    async with a_worker() as one:
        delivered(one.consumer, Held())
        await asyncio.sleep(0)
        one.clock.advance(0.4)
        one.consumer.overdue("reports", None)
        assert not caplog.records
        await one.until_finished()
