"""A handler that publishes, and a publisher without a loop."""

from __future__ import annotations

import asyncio
from typing import Any

from leveret import App, Attempt, BrokerUnavailable, Job, Keep, Retry
from leveret.runtime import Runtime
from leveret.schemes import open_store
from leveret.store import Key
from tests.contract.harness import PATIENCE_S, Harness
from tests.contract.pipeline.apps import Runs, assert_empty, job_class, make_app, publish


async def test_a_job_published_by_a_handler_belongs_to_the_same_line(harness: Harness) -> None:
    """One correlation id finds all that followed from one request."""

    async def follow(job: Any, attempt: Attempt[Any]) -> None:
        if job.n < 3:
            await attempt.publish(type(job)(n=job.n + 1))

    queue, runs = harness.queue(), Runs(follow)
    work = job_class(queue)
    app = make_app(harness, work, runs)

    [first] = await publish(app, work(n=1))
    async with app.worker(queues=[queue.name]):
        attempts = [await runs.next() for _ in range(3)]

    assert [attempt.envelope.correlation_id for attempt in attempts] == [None, first, first]
    assert len({attempt.job_id for attempt in attempts}) == 3
    await assert_empty(harness, queue)


async def test_a_blocking_publisher_reaches_a_worker(harness: Harness) -> None:
    """Django and scripts publish from a thread that has no loop."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app = make_app(harness, work, runs)
    publisher = app.blocking_publisher()

    try:
        async with app.worker(queues=[queue.name]):
            receipt = await asyncio.to_thread(publisher.publish, work(n=1), timeout_s=PATIENCE_S)
            assert (await runs.next()).job_id == receipt.job_id
    finally:
        await asyncio.to_thread(publisher.close)
    await assert_empty(harness, queue)


async def test_a_def_handler_publishes_with_the_blocking_publisher_and_never_on_a_loop_of_its_own(
    harness: Harness,
) -> None:
    """The worker's connection, made on a loop that ends, would fail each publish, retry and burial until the restart."""
    queue, ran, refused = harness.queue(), asyncio.Queue[tuple[int, int]](), list[BaseException]()
    work = job_class(queue)
    app: App[Any] = App("contract", broker=harness.url)
    publisher, loop = app.blocking_publisher(), asyncio.get_running_loop()

    @app.handler(job=work)
    def handle(job: Any, attempt: Attempt[Any]) -> Retry | None:
        loop.call_soon_threadsafe(ran.put_nowait, (job.n, attempt.number))
        if job.n == 2:
            return None
        if attempt.number == 1:
            try:
                asyncio.run(attempt.publish(work(n=2)))
            except BrokerUnavailable as error:
                refused.append(error)
            return Retry(0)
        publisher.publish(work(n=2), timeout_s=PATIENCE_S)
        return None

    try:
        await publish(app, work(n=1))
        async with app.worker(queues=[queue.name]):
            got = [await asyncio.wait_for(ran.get(), PATIENCE_S) for _ in range(3)]
    finally:
        await asyncio.to_thread(publisher.close)

    assert got == [(1, 1), (1, 2), (2, 1)]
    assert "app.blocking_publisher()" in str(refused[0])
    await assert_empty(harness, queue)


async def test_each_confirmed_publish_of_a_kept_class_is_in_the_store(harness: Harness) -> None:
    """A handle would wait for a publish that the worker doesn't know, or a job that waits would be unknown."""
    queue, runs, count = harness.queue(), Runs(), 1200  # more than are unconfirmed at once

    class Kept(Job, name="contract.work", queue=queue, keep=Keep()):
        n: int

    url = f"memory://{queue.name}"
    async with App("contract", broker=harness.url, store=url).publisher() as publisher:
        handle = await publisher.publish(Kept(0), timeout_s=PATIENCE_S)
        jobs = (Kept(n) for n in range(1, count))
        receipts = await publisher.publish_many(jobs, timeout_s=60)
        assert (await handle.status()).state == "queued"
    async with make_app(harness, job_class(queue), runs).worker(queues=[queue.name]):
        delivered = [(await runs.next()).envelope for _ in range(count)]
    records = await open_store(url, Runtime(app="contract")).list(limit=2 * count)

    assert {record.job_id for record in records} == {handle.job_id, *(receipt.job_id for receipt in receipts)}
    assert {record.key for record in records} == {Key(envelope.job_id, envelope.publish) for envelope in delivered}
    assert {(record.state, record.passes, record.attempt) for record in records} == {("queued", 0, 1)}
