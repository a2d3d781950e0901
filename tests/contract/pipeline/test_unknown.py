"""Unknown here: the job waits for a worker that knows it; without one the job is buried."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from leveret import Job, Settings
from leveret.consuming.worker import working
from leveret.failure import failures_of
from leveret.outcome import Kind
from tests.contract.harness import Harness, consume, make_envelope, soon, timed
from tests.contract.pipeline.apps import Runs, assert_empty, job_class, letters_of, make_app, publish, until


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"job": "contract.misspelt"}, "contract.misspelt"), ({"job": "contract.work", "version": 2}, "version 2")],
)
async def test_a_job_that_no_handler_here_knows_waits_and_then_is_buried(
    harness: Harness, fields: dict[str, Any], reason: str
) -> None:
    """A name or version unknown for ever is a mistake that somebody must see; meanwhile the others run."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app = make_app(harness, work, runs, Settings(unknown_grace_s=0.5))

    unknown = make_envelope(queue, **fields)
    await harness.open().publish(queue, timed(unknown, soon()))
    [good] = await publish(app, work(n=2))
    async with app.worker(queues=[queue.name]):
        assert (await runs.next()).job_id == good
        [letter] = await letters_of(harness, queue, 1)

    assert (letter.job_id, letter.body, letter.attempt) == (unknown.job_id, unknown.body, 1)
    assert 1 <= letter.passes <= 2, "a wait of 0.25 s each"
    assert reason in failures_of(letter)[-1].message
    await assert_empty(harness, queue)


async def test_an_unknown_job_runs_once_a_worker_that_knows_it_is_there(harness: Harness) -> None:
    """In a rolling deploy the old workers see the new job first."""
    queue, old_runs, new_runs = harness.queue(), Runs(), Runs()
    work = job_class(queue)
    old = make_app(harness, work, old_runs)

    class Novelty(Job, name="contract.new", queue=queue):
        n: int

    new = make_app(harness, Novelty, new_runs)
    async with working(old, queues=[queue.name]) as worker:
        [job_id] = await publish(new, Novelty(n=1))
        await until(lambda: worker.consumer.counts[Kind.UNKNOWN] == 1)
    async with new.worker(queues=[queue.name]):
        attempt = await new_runs.next()

    assert (attempt.job_id, attempt.number, attempt.envelope.passes) == (job_id, 1, 1)
    assert old_runs.count == 0
    await assert_empty(harness, queue)


async def test_a_worker_that_does_not_know_a_job_keeps_the_count_of_its_crashes(harness: Harness) -> None:
    """Beside a worker of another app, a job that kills its workers was never set aside or buried: each stranger set its count to 0."""
    queue, old_runs, new_runs = harness.queue(), Runs(), Runs()
    old = make_app(harness, job_class(queue), old_runs)

    class Novelty(Job, name="contract.new", queue=queue):
        n: int

    new = make_app(harness, Novelty, new_runs)
    broker = harness.open()
    [job_id] = await publish(new, Novelty(n=1))
    consumption, sink = await consume(broker, queue)
    delivery = await sink.next()
    await consumption.stop_taking()
    assert await delivery.again(timed(msgspec.structs.replace(delivery.envelope, crashes=2, passes=1), soon()))
    await consumption.close()

    async with working(old, queues=[queue.name]) as worker:
        await until(lambda: worker.consumer.counts[Kind.UNKNOWN] == 1)
    async with new.worker(queues=[queue.name]):
        attempt = await new_runs.next()

    assert (attempt.job_id, attempt.envelope.crashes, attempt.envelope.passes) == (job_id, 2, 2)
    await assert_empty(harness, queue)
