"""Results: what a handle learns of a job on each broker, and what an abort does to it."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest

from leveret import App, Attempt, Bury, Job, JobAborted, JobFailed, Keep, Queue, Retry, Snooze
from leveret.cli.dead import replayed
from leveret.consuming.worker import working
from leveret.outcome import Kind
from tests.contract.harness import PATIENCE_S, Harness
from tests.contract.pipeline.apps import Runs, assert_empty, letters_of, until


@pytest.fixture(params=["apart", "beside"])
def store(request: pytest.FixtureRequest, harness: Harness) -> str:
    """A store in another place; and one beside the broker's jobs, which shares its transactions if the broker can."""
    return harness.url if request.param == "beside" else f"memory://{uuid.uuid4().hex}"


def kept_app(harness: Harness, store: str, queue: Queue, runs: Runs) -> tuple[App[Any], Any]:
    """An app on this broker whose only job has a number as its result, and its class."""

    class Work(Job[int], name="contract.work", queue=queue, keep=Keep()):
        n: int

    app: App[Any] = App("contract", broker=harness.url, store=store)

    @app.handler(job=Work)
    async def handle(job: Any, attempt: Attempt[Any]) -> Any:
        return await runs(job, attempt)

    return app, Work


async def test_a_result_comes_from_the_attempt_that_succeeds(harness: Harness, store: str) -> None:
    """A job that a retry or a snooze has sent back must still be the publish that its handle asks for."""

    def say(job: Any, attempt: Attempt[Any]) -> Any:
        said: list[Any] = [Retry(0.25), Snooze(0.25), job.n + 1]
        return said[attempt.envelope.passes]

    queue, runs = harness.queue(), Runs(say)
    app, work = kept_app(harness, store, queue, runs)

    async with app.publisher() as publisher, app.worker(queues=[queue.name]):
        handle = await publisher.publish(work(n=7), timeout_s=PATIENCE_S)
        assert await handle.result(timeout_s=PATIENCE_S) == 8
        status = await handle.status()

    assert (status.state, status.attempt, runs.count) == ("done", 2, 3)
    await assert_empty(harness, queue)


async def test_a_buried_job_has_failed_until_it_is_replayed(harness: Harness, store: str) -> None:
    """A waiter would wait until its patience ends; after a replay it would never see the result."""
    queue, runs = harness.queue(), Runs(lambda job, attempt: Bury("no paper") if attempt.envelope.passes == 0 else 5)
    app, work = kept_app(harness, store, queue, runs)

    async with app.publisher() as publisher, app.worker(queues=[queue.name]):
        handle = await publisher.publish(work(n=7), timeout_s=PATIENCE_S)
        with pytest.raises(JobFailed, match="no paper"):
            await handle.result(timeout_s=PATIENCE_S)
        await letters_of(harness, queue, 1)
        async with harness.admin().dead(queue) as letters:
            async for letter in letters:
                await letters.replay(letter, replayed(letter.envelope))
        await until(lambda: runs.count == 2)
        async with asyncio.timeout(PATIENCE_S):
            while (await handle.status()).state != "done":
                await asyncio.sleep(0.01)
        assert await handle.result(timeout_s=PATIENCE_S) == 5


async def test_a_job_that_is_aborted_while_it_waits_never_runs(harness: Harness, store: str) -> None:
    """Somebody pressed "cancel", was told that it worked, and the mail goes out."""
    queue, runs = harness.queue(), Runs(lambda *_: 1)
    app, work = kept_app(harness, store, queue, runs)

    async with app.publisher() as publisher:
        waits = await publisher.publish(work(n=1), timeout_s=PATIENCE_S)
        delayed = await publisher.publish(work(n=2), delay_s=0.25, timeout_s=PATIENCE_S)
        assert (await waits.abort(), await delayed.abort()) == ("aborted", "aborted")
        async with working(app, queues=[queue.name]) as worker:
            await until(lambda: worker.consumer.counts[Kind.ABORTED] == 2)
        for handle in (waits, delayed):
            with pytest.raises(JobAborted):
                await handle.result(timeout_s=PATIENCE_S)

    assert runs.count == 0
    await assert_empty(harness, queue)


async def test_a_purge_of_the_broker_leaves_the_records_as_they_were(harness: Harness, store: str) -> None:
    """The store would say of a job that nobody has any more that it ended, or a worker would wait for it."""
    queue, runs = harness.queue(), Runs(lambda job, _: job.n)
    app, work = kept_app(harness, store, queue, runs)

    async with app.publisher() as publisher:
        purged = await publisher.publish(work(n=1), timeout_s=PATIENCE_S)
        assert (await purged.status()).state == "queued"
        assert await harness.admin().purge(queue) == 1
        async with app.worker(queues=[queue.name]):
            later = await publisher.publish(work(n=2), timeout_s=PATIENCE_S)
            assert await later.result(timeout_s=PATIENCE_S) == 2
            with pytest.raises(TimeoutError, match="nothing is known of its end"):
                await purged.result(timeout_s=0.05)
            status = await purged.status()

    assert (status.state, runs.count) == ("queued", 1)


async def test_a_job_that_is_aborted_while_it_runs_ends(harness: Harness, store: str) -> None:
    """It would run for hours, or come back as a retry or as a suspect."""
    ends = list[str]()

    async def forever(*_: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("finally")

    queue, runs = harness.queue(), Runs(forever)
    app, work = kept_app(harness, store, queue, runs)

    async with app.publisher() as publisher, working(app, queues=[queue.name]) as worker:
        handle = await publisher.publish(work(n=1), timeout_s=PATIENCE_S)
        await runs.next()
        assert await handle.abort() == "asked"
        with pytest.raises(JobAborted):
            await handle.result(timeout_s=PATIENCE_S)
        await until(lambda: worker.consumer.counts[Kind.ABORTED] == 1)

    assert (runs.count, ends) == (1, ["finally"])
    await assert_empty(harness, queue)


async def test_the_last_progress_of_a_job_that_is_done_is_there(harness: Harness, store: str) -> None:
    """Written beside the end it would come too late for it, and a finished job would stay at 40 %."""

    def say(job: Any, attempt: Attempt[Any]) -> int:
        attempt.progress(1.0, "all tiles")
        return 1

    queue, runs = harness.queue(), Runs(say)
    app, work = kept_app(harness, store, queue, runs)

    async with app.publisher() as publisher, app.worker(queues=[queue.name]):
        handle = await publisher.publish(work(n=1), timeout_s=PATIENCE_S)
        assert await handle.result(timeout_s=PATIENCE_S) == 1
        status = await handle.status()

    assert (status.progress, status.note) == (1.0, "all tiles")
