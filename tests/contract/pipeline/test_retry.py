"""Retried: the same job again, with one attempt more."""

from __future__ import annotations

import time

from leveret import Priority, Retry
from leveret.failure import failures_of
from tests.contract.harness import Harness
from tests.contract.pipeline.apps import Runs, assert_empty, job_class, make_app, publish


async def test_a_retry_is_the_same_job_with_one_attempt_more(harness: Harness) -> None:
    """Id, level, correlation and a tenant's header must be there on the third attempt as on the first."""
    queue, runs = harness.queue(), Runs(lambda job, attempt: Retry(0.25) if attempt.number < 3 else None)
    work = job_class(queue)
    app = make_app(harness, work, runs)

    async with app.worker(queues=[queue.name]):
        started = time.monotonic()
        [job_id] = await publish(
            app, work(n=7), priority=Priority.HIGH, headers={"x-tenant-id": "a"}, correlation_id="c"
        )
        attempts = [await runs.next() for _ in range(3)]
        took_s = time.monotonic() - started

    assert [(attempt.number, attempt.envelope.passes) for attempt in attempts] == [(1, 0), (2, 1), (3, 2)]
    assert {(attempt.job_id, attempt.envelope.correlation_id, attempt.envelope.priority) for attempt in attempts} == {
        (job_id, "c", Priority.HIGH)
    }
    assert all(attempt.envelope.headers["x-tenant-id"] == "a" for attempt in attempts)
    assert attempts[0].first_seen == attempts[2].first_seen
    assert [failure.attempt for failure in failures_of(attempts[2].envelope)] == [1, 2]
    assert took_s >= 0.5
    assert runs.count == 3
    await assert_empty(harness, queue)
