"""Two apps whose workers take jobs from one queue, by mistake or in a deploy. Each must get its own jobs."""

import asyncio
import logging
import sys
import time
import uuid
from contextlib import AsyncExitStack

import pytest

from leveret import App, Attempt, Job, Queue, Settings
from leveret.brokers.rabbitmq import open_admin
from leveret.failure import failures_of
from leveret.runtime import Runtime
from tests.fault.bench import eventually
from tests.rabbit.node import Rabbit
from tests.rabbit.raw import Raw

pytestmark = [pytest.mark.fault, pytest.mark.versions, pytest.mark.timeout(120)]

GRACE_S = 15.0


async def test_jobs_reach_the_one_worker_of_four_that_knows_them(
    rabbit: Rabbit, caplog: pytest.LogCaptureFixture
) -> None:
    """48 of 200 jobs were buried though their worker was ready: each had met strangers only."""
    caplog.set_level(logging.INFO, "leveret")
    queue = Queue(f"shared-{uuid.uuid4().hex[:12]}")

    class Invoice(Job, name="invoice", queue=queue):
        n: int

    class Parcel(Job, name="parcel", queue=queue):
        n: int

    billing = App("billing", broker=rabbit.url, settings=Settings(unknown_grace_s=GRACE_S))
    shipping = App("shipping", broker=rabbit.url, settings=Settings(unknown_grace_s=GRACE_S))
    waits: list[float] = []

    @billing.handler
    async def bill(job: Invoice) -> None:
        raise AssertionError

    @shipping.handler
    async def ship(job: Parcel, attempt: Attempt[None]) -> None:
        waits.append(time.time() - published)

    async with AsyncExitStack() as workers, shipping.publisher() as publisher:
        for app in (billing, billing, billing, shipping):
            await workers.enter_async_context(app.worker())
        published = time.time()
        await asyncio.gather(*(publisher.publish(Parcel(n)) for n in range(200)))
        await eventually(lambda: len(waits) == 200, lambda: f"{len(waits)} of 200 ran")

    waits.sort()
    sys.stdout.write(
        f"3 workers of 4 are strangers: p50 {waits[100]:.1f} s, p99 {waits[197]:.1f} s, last {waits[-1]:.1f} s\n"
    )
    lines = [record.getMessage() for record in caplog.records if "waits in the broker" in record.getMessage()]
    assert len(lines) == 3, "one per worker"
    assert "from the app shipping" in lines[0]


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
