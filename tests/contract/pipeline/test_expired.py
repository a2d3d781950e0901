"""Expired: too late to run, and not worth a dead letter."""

from __future__ import annotations

import time

from tests.contract.harness import Harness, depth, make_envelope, soon, timed
from tests.contract.pipeline.apps import Runs, assert_empty, job_class, make_app, publish


async def test_an_expired_job_does_not_run_and_is_not_buried(harness: Harness) -> None:
    """A one-time password an hour late is worse than none; nobody needs to look at it either."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app = make_app(harness, work, runs)
    stale = make_envelope(queue, b'{"n": 1}', job="contract.work", expires_at_ms=int((time.time() - 1) * 1000))
    await harness.open().publish(queue, timed(stale, soon()))

    [good] = await publish(app, work(n=2), expires_s=60)
    async with app.worker(queues=[queue.name]):
        assert (await runs.next()).job_id == good

    assert runs.count == 1
    assert (await depth(harness.admin(), queue)).dead == 0
    await assert_empty(harness, queue)
