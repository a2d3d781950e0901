"""Given back: a job that never started goes to the next worker."""

from __future__ import annotations

import asyncio
from typing import Any

from leveret import App, Attempt
from leveret.consuming.limits import Concurrency
from leveret.consuming.worker import Working, working
from leveret.middleware import RateLimit
from leveret.outcome import Kind
from tests.contract.harness import Harness, depth
from tests.contract.pipeline.apps import Runs, assert_empty, job_class, make_app, publish, until


async def test_a_worker_that_stops_gives_back_what_it_has_not_started(harness: Harness) -> None:
    """A deploy must neither lose a held job nor run it twice; the one that runs may finish."""
    gate, leaving = asyncio.Event(), asyncio.Event()

    async def wait(job: Any, attempt: Attempt[Any]) -> None:
        await gate.wait()

    queue, runs, next_runs = harness.queue(), Runs(wait), Runs()
    work = job_class(queue)
    app, next_app = make_app(harness, work, runs), make_app(harness, work, next_runs)
    ids = await publish(app, *(work(n=n) for n in range(5)))

    async def first_worker() -> Working:
        async with working(app, queues=[queue.name], concurrency=[Concurrency(process=1)]) as worker:
            await runs.next()
            await until(lambda: worker.consumer.held == 1)
            leaving.set()
        return worker

    stopping = asyncio.create_task(first_worker())
    await leaving.wait()
    async with next_app.worker(queues=[queue.name]):
        others = {(await next_runs.next()).job_id for _ in range(4)}  # while the first still runs its one
        gate.set()
        worker = await stopping

    assert worker.drained
    assert others == set(ids[1:])
    assert (runs.count, next_runs.count) == (1, 4)
    await assert_empty(harness, queue)


async def test_without_any_grace_what_waits_is_given_back_all_the_same(harness: Harness) -> None:
    """What never started needs no time to end: cut off, it would make the exit code say that jobs were torn."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app: App[Any] = App("contract", broker=harness.url, middleware=[RateLimit(1, every_s=3600)])

    @app.handler(job=work)
    async def handle(job: Any, attempt: Attempt[Any]) -> None:
        await runs(job, attempt)

    await publish(app, *(work(n=n) for n in range(4)))
    async with working(app, queues=[queue.name], grace_s=0) as worker:
        await runs.next()
        await until(lambda: worker.consumer.held == 1 and not worker.consumer.busy)

    assert worker.drained
    assert (worker.consumer.counts[Kind.NOT_STARTED], worker.consumer.counts[Kind.CUT_OFF]) == (1, 0)
    assert (await depth(harness.admin(), queue)).ready == 3
