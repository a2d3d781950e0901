"""Cut off: a run that outlasts its worker is delivered again, and nothing of the worker stays behind."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from leveret import App, Attempt, Outcome, Publish, Snooze
from leveret.consuming.worker import working
from leveret.envelope import Envelope, Receipt
from leveret.middleware import Retries
from tests.contract.harness import Harness, depth
from tests.contract.pipeline.apps import Runs, assert_empty, job_class, make_app, publish, until


async def test_what_is_cut_off_after_the_grace_is_delivered_again(harness: Harness) -> None:
    """A handler that doesn't end keeps no deploy waiting, and its job isn't lost."""

    async def hang(job: Any, attempt: Attempt[Any]) -> None:
        await asyncio.Event().wait()

    queue, runs, next_runs = harness.queue(), Runs(hang), Runs()
    work = job_class(queue)
    [job_id] = await publish(app := make_app(harness, work, runs), work(n=1))

    async with working(app, queues=[queue.name], grace_s=0.05) as worker:
        await runs.next()
    async with make_app(harness, work, next_runs).worker(queues=[queue.name]):
        again = await next_runs.next()

    assert not worker.drained
    assert (again.job_id, again.number) == (job_id, 1)
    if harness.open().features(queue).counts_redelivery:
        assert again.redelivered
    await assert_empty(harness, queue)


async def test_a_program_that_ends_leaves_what_runs_to_the_next_one(harness: Harness) -> None:
    """`asyncio.run` cancels every task at once: what a worker in a background task was running would be in the dead letters."""
    queue, started, next_runs = harness.queue(), list[str](), Runs()
    work = job_class(queue)
    app: App[Any] = App("contract", broker=harness.url, middleware=[Retries()])

    @app.handler(job=work)
    async def hang(job: Any, attempt: Attempt[Any]) -> None:
        started.append(attempt.job_id)
        await asyncio.Event().wait()

    async def service() -> None:
        async with app.worker(queues=[queue.name]):
            await asyncio.Event().wait()

    async def program() -> None:
        serving = asyncio.create_task(service())
        await until(lambda: len(started) == 20)
        assert not serving.done()

    ids = await publish(app, *(work(n=n) for n in range(20)))
    await asyncio.to_thread(asyncio.run, program())
    async with make_app(harness, work, next_runs).worker(queues=[queue.name]):
        again = {(await next_runs.next()).job_id for _ in range(20)}

    assert again == set(ids)
    assert (await depth(harness.admin(), queue)).dead == 0


async def test_no_handler_outlives_a_worker_whose_end_is_cancelled(harness: Harness) -> None:
    """It would go on with a pool that is closed, beside the second run of its job."""
    queue, runs, pool, ended = harness.queue(), Runs(), list[str](), list[bool]()
    work = job_class(queue)

    @asynccontextmanager
    async def lifespan() -> AsyncGenerator[None, None]:
        pool.append("open")
        yield
        pool.clear()

    app: App[Any] = App("contract", broker=harness.url, lifespan=lifespan)

    @app.handler(job=work)
    async def hang(job: Any, attempt: Attempt[Any]) -> None:
        try:
            await runs(job, attempt)
            await asyncio.Event().wait()
        finally:
            ended.append(bool(pool))

    async def service() -> None:
        async with app.worker(queues=[queue.name]):
            await asyncio.Event().wait()

    [job_id] = await publish(app, work(n=1))
    serving = asyncio.create_task(service())
    await runs.next()
    while not serving.done():  # the first leaves the block, the others fall into its end
        serving.cancel()
        await asyncio.wait({serving}, timeout=0.05)

    assert ended == [True]
    next_runs = Runs()
    async with make_app(harness, work, next_runs).worker(queues=[queue.name]):
        assert (await next_runs.next()).job_id == job_id


async def test_a_worker_that_was_cut_off_is_let_go(harness: Harness) -> None:
    """An embedded worker, or a test suite's hundredth, that stays in memory with its connection and resources fills it."""

    class Shop: ...

    class Hang:
        async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
            if envelope.cause is not None:
                retrying.set()
                await asyncio.Event().wait()
            return await proceed(envelope)

    @asynccontextmanager
    async def lifespan() -> AsyncGenerator[Shop, None]:
        yield (shop := Shop())
        shops.append(weakref.ref(shop))

    queue, retrying, shops = harness.queue(), asyncio.Event(), list[weakref.ref[Shop]]()
    work = job_class(queue)
    app = App("contract", broker=harness.url, middleware=[Hang()], lifespan=lifespan)

    @app.handler(job=work)
    async def handle(job: Any) -> Outcome | None:
        return Snooze(60)

    await publish(app, work(n=1))
    async with working(app, queues=[queue.name], grace_s=0.05) as worker:
        await retrying.wait()
    assert not worker.drained
    del worker
    [shop] = shops

    def is_gone() -> bool:
        gc.collect()
        return shop() is None

    await until(is_gone)


async def test_what_six_restarts_cut_off_and_give_back_is_no_crash(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    """A long report, and what waits behind it, would be buried in a week of deploys, for workers that nobody mourns."""
    queue, started, done = harness.queue(), asyncio.Event(), set[str]()
    work = job_class(queue)
    app: App[Any] = App("contract", broker=harness.url, concurrency=1)
    last = False

    @app.handler(job=work)
    async def handle(job: Any, attempt: Attempt[Any]) -> None:
        started.set()
        if not last:
            await asyncio.Event().wait()
        done.add(attempt.job_id)

    ids = await publish(app, *(work(n=n) for n in range(20)))
    for _ in range(6):
        started.clear()
        async with working(app, queues=[queue.name], grace_s=0.05):
            await started.wait()
    last = True
    async with app.worker(queues=[queue.name]):
        await until(lambda: len(done) == len(ids))

    assert "runs alone" not in caplog.text
    assert (await depth(harness.admin(), queue)).dead == 0
    await assert_empty(harness, queue)
