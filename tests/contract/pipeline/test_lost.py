"""Lost: the connection ends while a job runs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from leveret import Attempt
from tests.contract.harness import Harness
from tests.contract.pipeline.apps import Runs, assert_empty, job_class, make_app, publish


@pytest.mark.features(connected=True)
async def test_a_lost_connection_neither_cancels_a_handler_nor_loses_its_job(harness: Harness) -> None:
    """What runs may have charged a card already: it finishes, and the broker delivers the job again."""
    gate = asyncio.Event()
    finished: list[int] = []

    async def wait(job: Any, attempt: Attempt[Any]) -> None:
        await gate.wait()
        finished.append(attempt.number)

    queue, runs = harness.queue(), Runs(wait)
    work = job_class(queue)
    app = make_app(harness, work, runs)

    [job_id] = await publish(app, work(n=1))
    async with app.worker(queues=[queue.name]):
        first = await runs.next()
        harness.cut()
        again = await runs.next()
        gate.set()

    assert (first.job_id, again.job_id) == (job_id, job_id)
    assert finished == [1, 1]
    await assert_empty(harness, queue)
