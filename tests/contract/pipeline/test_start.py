"""When a job starts: due, in the order of its level, once its middleware is ready, at any concurrency."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from leveret import App, Attempt, Outcome, Priority
from leveret.consuming.limits import Concurrency
from leveret.consuming.worker import working
from tests.contract.harness import Harness
from tests.contract.pipeline.apps import Runs, assert_empty, job_class, make_app, publish, until


async def test_a_delayed_job_runs_when_it_is_due(harness: Harness) -> None:
    """And can tell how late it is."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app = make_app(harness, work, runs)

    async with app.worker(queues=[queue.name]):
        started, asked = time.monotonic(), time.time()
        await publish(app, work(n=1), delay_s=0.5)
        attempt = await runs.next()

    assert time.monotonic() - started >= 0.5
    assert attempt.envelope.due_ms == pytest.approx((asked + 0.5) * 1000, abs=2000)
    await assert_empty(harness, queue)


async def test_an_urgent_job_overtakes_low_ones_that_are_held(harness: Harness) -> None:
    """Held here or waiting there: urgent is urgent."""
    gate = asyncio.Event()

    async def wait(job: Any, attempt: Attempt[Any]) -> None:
        await gate.wait()

    queue, runs = harness.queue(), Runs(wait)
    work = job_class(queue)
    app = make_app(harness, work, runs)

    async with working(app, queues=[queue.name], concurrency=[Concurrency(process=1)]) as worker:
        await publish(app, work(n=0))
        await runs.next()
        await publish(app, *(work(n=n) for n in range(1, 5)), priority=Priority.LOW)
        await publish(app, work(n=9), priority=Priority.URGENT)
        # a window of 2 per level, one of which runs; a classic queue has one window for all
        windows = harness.features().window_per_level
        await until(lambda: worker.consumer.held == (3 if windows else 1))
        gate.set()
        order = [(await runs.next()).envelope.priority for _ in range(5)]

    assert order.index(Priority.URGENT) == (0 if windows else 1)
    await assert_empty(harness, queue)


async def test_a_layer_that_cannot_say_when_it_is_ready_is_asked_again(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    """Its Redis was away for a moment: what was delivered just then would wait in this worker for minutes, started by nobody."""

    class Gate:
        asked = 0

        def ready_in_s(self) -> float:
            self.asked += 1
            if self.asked == 1:
                msg = "redis is away"
                raise ConnectionError(msg)
            return 0.0

        async def consume(self, attempt: Attempt[Any], proceed: Any) -> Outcome:
            return await proceed(attempt)

    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app: App[Any] = App("contract", broker=harness.url, middleware=[Gate()])

    @app.handler(job=work)
    async def handle(job: Any, attempt: Attempt[Any]) -> None:
        await runs(job, attempt)

    ids = await publish(app, *(work(n=n) for n in range(20)))
    async with app.worker(queues=[queue.name]):
        assert {(await runs.next()).job_id for _ in range(20)} == set(ids)
    assert "the worker asks it again in 1 s: ConnectionError: redis is away" in caplog.text


async def test_any_concurrency_is_taken(harness: Harness) -> None:
    """A worker of small jobs that is given 40 000 slots: twice that is no prefetch that AMQP could carry."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app = make_app(harness, work, runs)

    await publish(app, work(n=1))
    async with working(app, queues=[queue.name], concurrency=[Concurrency(process=40_000)]):
        await runs.next()
    await assert_empty(harness, queue)
