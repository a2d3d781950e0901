"""Lost: the connection, or the lease, ends while a job runs. The worker that finishes the job doesn't run it again."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from leveret import App, Attempt, Bury, Outcome, Retry
from leveret.consuming.worker import Working, working
from leveret.outcome import Kind
from tests.contract.harness import PATIENCE_S, Harness, depth
from tests.contract.pipeline.apps import Runs, Say, assert_empty, job_class, letters_of, make_app, publish, until

pytestmark = pytest.mark.features(counts_redelivery=True)


async def until_remembered(work: Working, count: int = 1) -> None:
    await until(lambda: work.consumer.counts[Kind.REMEMBERED] >= count)


def gated(gate: asyncio.Event, say: Say | None = None) -> Say:
    """A handler that waits for `gate`."""

    async def wait(job: Any, attempt: Attempt[Any]) -> Any:
        await gate.wait()
        return say(job, attempt) if say is not None else None

    return wait


async def test_a_lost_connection_neither_cancels_a_handler_nor_repeats_it(harness: Harness) -> None:
    """What runs may have charged a card already: it finishes, and its end settles the job that the broker delivers again."""
    gate = asyncio.Event()
    queue, runs = harness.queue(), Runs(gated(gate))
    work = job_class(queue)
    app = make_app(harness, work, runs)

    await publish(app, work(n=1))
    async with working(app, queues=[queue.name]) as worker:
        await runs.next()
        harness.cut()
        await until_remembered(worker)
        harness.cut()  # the delivery that took the first one's place is lost, too
        await until_remembered(worker, 2)
        gate.set()

    assert runs.count == 1
    assert worker.consumer.counts == Counter({Kind.DONE: 1, Kind.REMEMBERED: 2})
    await assert_empty(harness, queue)


async def test_the_retry_of_a_run_whose_delivery_was_lost_is_published_once(harness: Harness) -> None:
    """A failed run that is repeated by the broker, and not as a retry, is no attempt that counts: `Retries` can't stop it."""
    gate = asyncio.Event()
    queue, runs = harness.queue(), Runs(gated(gate, lambda _, attempt: Retry() if attempt.number == 1 else None))
    work = job_class(queue)
    app = make_app(harness, work, runs)

    [job_id] = await publish(app, work(n=1))
    async with working(app, queues=[queue.name]) as worker:
        await runs.next()
        harness.cut()
        await until_remembered(worker)
        gate.set()
        second = await runs.next()

    assert (second.job_id, second.number, runs.count) == (job_id, 2, 2)
    await assert_empty(harness, queue)


@pytest.mark.parametrize("bury", [False, True], ids=["done", "bury"])
async def test_a_run_that_ends_before_its_redelivery_settles_it(harness: Harness, bury: bool) -> None:
    """While the broker is away a worker finishes what it runs; all of that would run again."""
    gate = asyncio.Event()

    def say(job: Any, attempt: Attempt[Any]) -> Outcome | None:
        if bury:
            raise Bury("no such order") from LookupError("order 7")
        return None

    queue, runs = harness.queue(), Runs(gated(gate, say))
    work = job_class(queue)
    app = make_app(harness, work, runs)

    await publish(app, work(n=1))
    async with working(app, queues=[queue.name]) as worker:
        await runs.next()
        harness.cut()
        gate.set()  # it ends before the broker hears of it, and on some brokers before this worker hears of the loss
        await until_remembered(worker)

    assert runs.count == 1
    letters = await letters_of(harness, queue, 1) if bury else []
    assert ["LookupError" in letter.errors for letter in letters] == [True] * bury
    await assert_empty(harness, queue)


async def test_what_was_finished_and_not_yet_acknowledged_runs_once(harness: Harness) -> None:
    """The acks that a broken link takes along would each cost a second run, of jobs that were done."""
    queue, runs = harness.queue(), Counter[str]()
    work = job_class(queue)
    app: App[Any] = App("contract", broker=harness.url)

    @app.handler(job=work)
    async def handle(job: Any, attempt: Attempt[Any]) -> None:
        runs[attempt.job_id] += 1
        if job.n % 100 == 50:
            harness.cut()

    ids = await publish(app, *(work(n=n) for n in range(300)))
    async with working(app, queues=[queue.name]):
        await until(lambda: len(runs) == len(ids))
        async with asyncio.timeout(PATIENCE_S):
            while (row := await depth(harness.admin(), queue)).ready + (row.unsettled or 0):
                await asyncio.sleep(0.05)

    assert {job_id: count for job_id, count in runs.items() if count > 1} == {}
    await assert_empty(harness, queue)


async def test_a_handler_that_forbids_it_runs_again(harness: Harness) -> None:
    """Who keeps its own record of what it did may want each delivery."""
    gate = asyncio.Event()
    queue, runs = harness.queue(), Runs(gated(gate))
    work = job_class(queue)
    app: App[Any] = App("contract", broker=harness.url)

    @app.handler(job=work, remember=False)
    async def handle(job: Any, attempt: Attempt[Any]) -> None:
        await runs(job, attempt)

    [job_id] = await publish(app, work(n=1))
    async with app.worker(queues=[queue.name]):
        first = await runs.next()
        harness.cut()
        again = await runs.next()
        gate.set()

    assert (first.job_id, again.job_id, again.redelivered) == (job_id, job_id, True)
    await assert_empty(harness, queue)
