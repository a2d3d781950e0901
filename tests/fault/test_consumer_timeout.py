"""A job that runs for longer than the broker's consumer timeout, which the worker's settings don't know."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import pytest

from leveret import App, Attempt, Job, Priority, Queue
from leveret.consuming.worker import working
from leveret.middleware import Retries
from leveret.outcome import Kind
from tests.fault.bench import Bench, eventually
from tests.rabbit.node import Rabbit
from tests.rabbit.raw import Raw

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

LIMIT_S, LONG_S = 3.0, 9.0


@pytest.mark.versions
@pytest.mark.parametrize(("kind", "fails"), [("quorum", True), ("classic", False)])
async def test_a_job_longer_than_the_consumer_timeout_runs_once_and_costs_its_queue_one_channel(
    rabbit: Rabbit, caplog: pytest.LogCaptureFixture, kind: Literal["quorum", "classic"], fails: bool
) -> None:
    """A report of 75 s under a limit of 8 s was started 13 times in 100 s, up to 9 at once, and each start cost all queues their jobs."""
    caplog.set_level(logging.INFO, "leveret")
    name = uuid.uuid4().hex[:12]
    app = App("shop", broker=rabbit.url, middleware=[Retries(base_s=0.2, cap_s=0.4)])
    slow, well = Queue(f"slow-{name}", type=kind), Queue(f"well-{name}", type=kind)
    starts, ends = Counter[tuple[str, int]](), set[str]()

    class Report(Job, name="report", queue=slow):
        seconds: float = 0.3

    class Email(Job, name="email", queue=well):
        seconds: float = 0.3

    async def run(job: Any, attempt: Attempt[Any]) -> None:
        starts[attempt.job_id, attempt.number] += 1
        if attempt.number == 1:
            await asyncio.sleep(job.seconds)
            if fails and job.seconds == LONG_S:
                raise ConnectionError("not yet")
        ends.add(attempt.job_id)

    for job_class in (Report, Email):
        app.handler(job=job_class)(run)
    await rabbit.limit_consumers(LIMIT_S)
    try:
        async with app.publisher() as publisher, working(app) as work:
            long = (await publisher.publish(Report(seconds=LONG_S))).job_id
            short = list[str]()
            while long not in ends:
                for level in (Priority.NORMAL, Priority.LOW):
                    short += [(await publisher.publish(job, priority=level)).job_id for job in (Report(), Email())]
                await asyncio.sleep(0.1)
            await eventually(lambda: ends.issuperset(short))
            await asyncio.sleep(LIMIT_S)  # a redelivery that was left would run
            counts = work.consumer.counts
    finally:
        await rabbit.limit_consumers(1800)

    assert {key for key in starts if key[0] == long} == {(long, number) for number in range(1, 3 if fails else 2)}
    assert set(starts.values()) == {1}, "each attempt began once, of the long job and of its neighbours"
    assert counts[Kind.RETRY] == fails
    said = [record.getMessage() for record in caplog.records]
    assert not [line for line in said if "connecting: " in line or (well.name in line and "degraded" in line)], said
    lost = [line for line in said if "degraded: " in line]
    if lost:  # a classic queue of RabbitMQ 4.3 has no consumer timeout
        assert len(lost) == 1, "the second time, its delivery was given back in time"
        [warned] = [line for line in said if "consumer_timeout_s is 1800" in line]
        assert warned.startswith(f"queue {slow.name}: ")
        assert "held for 3 s" in warned


async def test_a_job_longer_than_the_consumer_timeout_starts_once_per_process(
    bench: Callable[..., Bench], rabbit: Rabbit
) -> None:
    """The broker gives the job to another worker, and may do so at each limit; a start for each limit would never end."""
    one = bench(rabbit.url)
    await rabbit.limit_consumers(LIMIT_S)
    try:
        workers = [await one.working("--concurrency", "4") for _ in range(3)]
        [long] = await one.publish(one.recorder.Note(LONG_S))
        await one.until_lines("start", 1)
        await one.until_lines("end", 1)
        await one.until_empty()
        starts = Counter(words[3] for words in one.recorder.lines("start"))
        for worker in workers:
            await worker.drained()
    finally:
        await rabbit.limit_consumers(1800)

    assert set(one.recorder.ids("start")) == {long}
    assert set(starts.values()) == {1}, starts


@pytest.mark.versions
async def test_a_deleted_queue_is_not_taken_for_the_consumer_timeout(
    rabbit: Rabbit, raw: Raw, caplog: pytest.LogCaptureFixture
) -> None:
    """On 4.3 each worker took the age of its oldest job for the limit: it gave back longer jobs from then on, which ran up to three times."""
    caplog.set_level(logging.INFO, "leveret")
    queue = Queue(uuid.uuid4().hex[:12])
    app = App("shop", broker=rabbit.url)

    class Report(Job, name="report", queue=queue): ...

    started, end = asyncio.Event(), asyncio.Event()

    @app.handler(job=Report)
    async def run(_: Any) -> None:
        started.set()
        await end.wait()

    async with app.publisher() as publisher, app.worker() as worker:
        await publisher.publish(Report(), priority=Priority.URGENT)
        await started.wait()
        await asyncio.sleep(1.1)  # no limit is believed to be below 1 s
        await raw.delete(f"{queue.name}.urgent")
        await eventually(lambda: "degraded: " in caplog.text)
        await eventually(lambda: worker.state().name == "ready")
        end.set()

    assert "because the queue is gone" in caplog.text
    assert "consumer_timeout" not in caplog.text
