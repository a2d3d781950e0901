"""Done: the job ran once and is gone."""

from __future__ import annotations

import asyncio
from typing import Any

from leveret import App
from leveret.consuming.worker import working
from tests.contract.harness import Harness
from tests.contract.pipeline.apps import Runs, assert_empty, job_class, make_app, publish


async def test_a_job_that_ran_is_gone(harness: Harness) -> None:
    """Run once is the whole point."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app = make_app(harness, work, runs)

    ids = await publish(app, *(work(n=n) for n in range(20)))
    async with app.worker(queues=[queue.name]):
        attempts = [await runs.next() for _ in range(20)]

    assert [attempt.job_id for attempt in attempts] == ids
    assert [attempt.job for attempt in attempts] == [work(n=n) for n in range(20)]
    assert runs.count == 20
    await assert_empty(harness, queue)


async def test_each_of_many_jobs_has_its_receipt_and_runs_once(harness: Harness) -> None:
    """Many more than are unconfirmed at once: one that is skipped is reported lost, or is lost; one sent twice runs twice."""
    work, ran = job_class(harness.queue()), list[int]()
    app: App[Any] = App("contract", broker=harness.url)
    count = 12_000

    @app.handler(job=work)
    async def handle(job: Any) -> None:
        ran.append(job.n)

    async with app.publisher() as publisher:
        receipts = await publisher.publish_many((work(n) for n in range(count)), timeout_s=60)
    async with working(app) as running:
        async with asyncio.timeout(60):
            while len(ran) < count or running.consumer.busy:
                await running.consumer.changed()

    assert len({receipt.job_id for receipt in receipts}) == count
    assert sorted(ran) == list(range(count))


async def test_a_job_without_a_name_is_the_queues_only_one(harness: Harness) -> None:
    """A producer in another language need know nothing of leveret."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app = make_app(harness, work, runs)

    async with app.worker(queues=[queue.name]):
        await publish(app, work(n=1))
        await runs.next()
        await harness.put(queue, b'{"n": 2}')
        foreign = await runs.next()

    assert foreign.job == work(n=2)
    assert foreign.job_id
