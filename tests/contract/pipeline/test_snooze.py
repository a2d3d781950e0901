"""Snoozed: the same job again, at no cost."""

from __future__ import annotations

from leveret import Snooze
from tests.contract.harness import Harness
from tests.contract.pipeline.apps import Runs, assert_empty, job_class, make_app, publish


async def test_a_snooze_costs_no_attempt(harness: Harness) -> None:
    """A job that is put off because of a rate limit must not run out of attempts."""
    queue, runs = harness.queue(), Runs(lambda job, attempt: Snooze(0.25) if attempt.envelope.passes == 0 else None)
    work = job_class(queue)
    app = make_app(harness, work, runs)

    [job_id] = await publish(app, work(n=1))
    async with app.worker(queues=[queue.name]):
        first, second = await runs.next(), await runs.next()

    assert (first.job_id, first.number, second.job_id, second.number) == (job_id, 1, job_id, 1)
    assert second.envelope.passes == 1
    await assert_empty(harness, queue)
