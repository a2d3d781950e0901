"""Snoozed: the same job again, at no cost."""

from __future__ import annotations

from typing import Any

from leveret import App, Attempt, Consume, Outcome, Snooze
from tests.contract.harness import Harness, make_envelope, soon, timed
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


async def test_a_snooze_by_middleware_keeps_the_count_of_crashes(harness: Harness) -> None:
    """A job that kills its workers was never buried on a queue with a rate limit: each snooze set its count to 0."""
    queue, runs = harness.queue(), Runs(lambda job, attempt: Snooze(0.25) if attempt.envelope.passes == 1 else None)

    async def full(attempt: Attempt[Any], proceed: Consume) -> Outcome:
        return Snooze(0.25) if attempt.envelope.passes == 0 else await proceed(attempt)

    app: App[Any] = App("contract", broker=harness.url, middleware=[full])
    app.handler(job=job_class(queue))(runs.__call__)
    crashed = make_envelope(queue, b'{"n": 1}', job="contract.work", crashes=1)
    await harness.open().publish(queue, timed(crashed, soon()))
    async with app.worker(queues=[queue.name]):
        first, second = await runs.next(), await runs.next()

    assert (first.envelope.passes, first.envelope.crashes) == (1, 1)
    assert (second.envelope.passes, second.envelope.crashes) == (2, 0)
    await assert_empty(harness, queue)
