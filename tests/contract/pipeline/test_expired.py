"""Expired: too late to run; dropped, or kept as a dead letter where somebody wants to look."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Literal

import pytest

from leveret import App, Attempt, Job, Queue
from leveret.cli.dead import replayed
from leveret.consuming.worker import working
from leveret.failure import failures_of
from leveret.outcome import Kind
from tests.contract.harness import Harness, depth, make_envelope, soon, timed
from tests.contract.pipeline.apps import Runs, assert_empty, job_class, letters_of, make_app, publish, until


def stale(queue: Queue, **fields: Any) -> Any:
    """Return a job that expired a second ago."""
    usual = {"job": "contract.work", "expires_at_ms": int((time.time() - 1) * 1000)}
    return timed(make_envelope(queue, b'{"n": 1}', **usual | fields), soon())


async def test_an_expired_job_does_not_run_and_is_not_buried(harness: Harness) -> None:
    """A one-time password an hour late is worse than none; nobody needs to look at it either."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app = make_app(harness, work, runs)
    await harness.open().publish(queue, stale(queue))

    [good] = await publish(app, work(n=2), expires_s=60)
    async with app.worker(queues=[queue.name]):
        assert (await runs.next()).job_id == good

    assert runs.count == 1
    assert (await depth(harness.admin(), queue)).dead == 0
    await assert_empty(harness, queue)


async def test_a_job_that_was_expired_when_it_arrived_names_its_age_and_is_counted_apart(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    """A publisher whose clock is two hours slow loses every job that expires: "expired before it ran" sends nobody to the clock."""
    queue = harness.queue()
    app = make_app(harness, job_class(queue), Runs())
    await harness.open().publish(queue, stale(queue, created_s=int(time.time()) - 7200))

    async with working(app, queues=[queue.name]) as worker:
        await until(lambda: worker.consumer.counts[Kind.EXPIRED_ON_ARRIVAL] == 1)

    assert worker.consumer.counts[Kind.EXPIRED] == 0
    [said] = [record.getMessage() for record in caplog.records if "it first arrived" in record.getMessage()]
    assert "when it was 72" in said  # hundred seconds
    assert "the clocks of its publisher and of this worker differ" in said
    assert said.endswith("the job is dropped")


async def test_a_job_that_expires_between_two_runs_is_not_called_expired_on_arrival(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    """A retry that comes too late says nothing of clocks."""
    queue = harness.queue()
    app = make_app(harness, job_class(queue), Runs())
    now_ms = int(time.time() * 1000)
    seen = stale(queue, first_seen_ms=now_ms - 5000, attempt=2, passes=1)
    await harness.open().publish(queue, seen)

    async with working(app, queues=[queue.name]) as worker:
        await until(lambda: worker.consumer.counts[Kind.EXPIRED] == 1)

    assert worker.consumer.counts[Kind.EXPIRED_ON_ARRIVAL] == 0
    assert "expired before it ran; the job is dropped" in caplog.text


@pytest.mark.parametrize(
    ("of_queue", "of_job", "kept"),
    [("dead", None, True), ("drop", "dead", True), ("dead", "drop", False)],
    ids=["the queue keeps", "the job keeps", "the job drops"],
)
async def test_expired_jobs_are_dead_letters_where_the_queue_or_the_job_says_so(
    harness: Harness, of_queue: Literal["drop", "dead"], of_job: Literal["drop", "dead"] | None, kept: bool
) -> None:
    """An order that was never taken must be found again; the job knows better than its queue."""
    made, runs = harness.queue(), Runs()
    queue = Queue(made.name, type=made.type, expired=of_queue)

    class Work(Job, name="contract.work", queue=queue, expired=of_job):
        n: int

    app: App[Any] = App("contract", broker=harness.url)

    @app.handler(job=Work)
    async def handle(job: Any, attempt: Attempt[Any]) -> None:
        await runs(job, attempt)

    late = stale(queue)
    await harness.open().publish(queue, late)
    async with working(app, queues=[queue.name]) as worker:
        await until(lambda: worker.consumer.counts[Kind.EXPIRED_ON_ARRIVAL] == 1)

    await assert_empty(harness, queue)
    assert runs.count == 0
    if not kept:
        assert (await depth(harness.admin(), queue)).dead == 0
        return
    [letter] = await letters_of(harness, queue, 1)
    [failure] = failures_of(letter)
    assert (letter.job_id, letter.body, letter.attempt) == (late.job_id, late.body, 1)
    assert "before it first arrived" in failure.message


async def test_an_expired_job_runs_once_it_is_replayed(harness: Harness) -> None:
    """Replayed with its old expiry, it would be a dead letter again before anybody looked."""
    made, runs = harness.queue(), Runs()
    queue = Queue(made.name, type=made.type, expired="dead")
    app = make_app(harness, job_class(queue), runs)
    late = stale(queue)
    await harness.open().publish(queue, late)

    async with app.worker(queues=[queue.name]):
        await letters_of(harness, queue, 1)
        async with harness.admin().dead(queue) as letters:
            [letter] = [letter async for letter in letters]
            await letters.replay(letter, replayed(letter.envelope))
        assert (await runs.next()).job_id == late.job_id

    assert (await depth(harness.admin(), queue)).dead == 0
    await assert_empty(harness, queue)


async def test_programs_that_differ_in_what_becomes_of_expired_jobs_share_a_queue(harness: Harness) -> None:
    """It is no argument of the broker's queue: a deploy that changes it must not be refused."""
    made, runs = harness.queue(), Runs()
    keeping = Queue(made.name, type=made.type, expired="dead")
    app = make_app(harness, job_class(keeping), runs)

    [job_id] = await publish(make_app(harness, job_class(made), Runs()), job_class(made)(n=1))
    async with app.worker(queues=[made.name]):
        assert (await asyncio.wait_for(runs.next(), 15)).job_id == job_id
