"""Two apps whose workers take jobs from one queue, by mistake or in a deploy. Each must get its own jobs."""

import asyncio
import logging
import re
import sys
import time
import uuid
from contextlib import AsyncExitStack

import pytest

from leveret import App, Attempt, Job, Queue, Settings
from leveret.brokers.rabbitmq import consumers, open_admin
from leveret.failure import failures_of
from leveret.runtime import Runtime
from tests.fault.bench import eventually
from tests.rabbit.node import Rabbit
from tests.rabbit.raw import Raw

pytestmark = [pytest.mark.fault, pytest.mark.versions, pytest.mark.timeout(120)]


@pytest.mark.parametrize(
    ("strangers", "jobs", "takes_s", "grace_s"),
    [(3, 200, 0.0, 15.0), (5, 60, 0.0, 5.0), (3, 60, 1.0, 4.0)],
    ids=["one worker of four", "one worker of six", "a busy worker"],
)
async def test_jobs_reach_the_one_worker_that_knows_them(
    rabbit: Rabbit,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    strangers: int,
    jobs: int,
    takes_s: float,
    grace_s: float,
) -> None:
    """48 of 200 jobs were buried though their worker was ready: each had met strangers only."""
    caplog.set_level(logging.INFO, "leveret")
    monkeypatch.setattr(consumers, "WATCH_S", grace_s / 4)  # below the grace, as with the default grace
    queue = Queue(f"shared-{uuid.uuid4().hex[:12]}")

    class Invoice(Job, name="invoice", queue=queue):
        n: int

    class Parcel(Job, name="parcel", queue=queue):
        n: int

    billing = App("billing", broker=rabbit.url, settings=Settings(unknown_grace_s=grace_s))
    shipping = App("shipping", broker=rabbit.url, settings=Settings(unknown_grace_s=grace_s))
    waits: list[float] = []

    @billing.handler
    async def bill(job: Invoice) -> None:
        raise AssertionError

    @shipping.handler
    async def ship(job: Parcel, attempt: Attempt[None]) -> None:
        waits.append(time.time() - published)
        await asyncio.sleep(takes_s)

    async with AsyncExitStack() as workers, shipping.publisher() as publisher:
        for app in (*[billing] * strangers, shipping):
            await workers.enter_async_context(app.worker())
        published = time.time()
        await asyncio.gather(*(publisher.publish(Parcel(n)) for n in range(jobs)))
        await eventually(lambda: len(waits) == jobs, lambda: f"{len(waits)} of {jobs} ran")

    waits.sort()
    told = f"p50 {waits[jobs // 2]:.1f} s, p99 {waits[jobs * 99 // 100 - 1]:.1f} s, last {waits[-1]:.1f} s"
    sys.stdout.write(f"{strangers} workers of {strangers + 1} are strangers, a job takes {takes_s} s: {told}\n")
    lines = [record.getMessage() for record in caplog.records if "waits in the broker" in record.getMessage()]
    assert len(lines) == strangers, "one per worker"
    assert "from the app shipping" in lines[0]


async def test_a_job_that_no_consumer_knows_is_buried_once_it_has_met_them_all(
    rabbit: Rabbit, raw: Raw, caplog: pytest.LogCaptureFixture
) -> None:
    """A name with a typo would go round for ever, and nobody would look for it."""
    queue = Queue(f"shared-{uuid.uuid4().hex[:12]}")

    class Invoice(Job, name="invoice", queue=queue):
        n: int

    class Misspelt(Job, name="invioce", queue=queue):
        n: int

    billing = App("billing", broker=rabbit.url, settings=Settings(unknown_grace_s=2))

    @billing.handler
    async def bill(job: Invoice) -> None:
        raise AssertionError

    async with AsyncExitStack() as workers, billing.publisher() as publisher:
        for _ in range(3):
            await workers.enter_async_context(billing.worker())
        await publisher.publish(Misspelt(1))
        await raw.until_count(f"{queue.name}.dead", 1)
    [line] = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    waited = re.search(r"after a wait of (\d+) s", line)
    assert waited is not None, line
    assert int(waited[1]) < 20, "it waited for its last limit, ten graces"


async def test_a_job_of_another_contract_is_buried_with_both_contracts(rabbit: Rabbit, raw: Raw) -> None:
    """Two teams chose one name: whoever reads the dead letter must see whose job it is."""
    queue = Queue(f"shared-{uuid.uuid4().hex[:12]}")

    class Theirs(Job, name="report", queue=queue):
        month: str

    class Ours(Job, name="report", queue=queue):
        year: int

    billing, shipping = App("billing", broker=rabbit.url), App("shipping", broker=rabbit.url)

    @billing.handler
    async def report(job: Ours) -> None:
        raise AssertionError

    async with shipping.publisher() as publisher, billing.worker():
        await publisher.publish(Theirs("May"))
        admin = open_admin(rabbit.url, Runtime(app="fault"))
        await raw.until_count(f"{queue.name}.dead", 1)
        async with admin.dead(queue) as letters:
            [reason] = [failures_of(letter.envelope)[-1].reason async for letter in letters]
        await admin.close()

    assert "published by the app 'shipping' as version 1" in reason
    assert "this worker's app 'billing' has version 1" in reason
    assert "Ours" in reason
