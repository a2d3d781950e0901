"""Results in a test of an app: the lab's clock moves their waits, their progress and their aborts."""

import asyncio

import pytest

from leveret import App, Attempt, Done, Job, JobAborted, Keep, Queue, Retry
from leveret.testing import attempt, running, running_sync


class Draw(Job[int], name="draw", queue=Queue("pictures"), keep=Keep()):
    n: int


app = App("draws", broker="memory://")


@app.handler
async def draw(job: Draw, attempt: Attempt) -> int:
    attempt.progress(0.5, "half")
    if job.n < 0:
        await asyncio.Event().wait()
    if job.n > 100 and attempt.number == 1:
        raise Retry(60)
    return job.n


async def test_a_test_sees_states_and_results() -> None:
    """An app with results could be tested on a real broker only."""
    async with running(app) as lab:
        handle = await lab.publish(Draw(101), delay_s=5)
        delayed = await handle.status()
        lab.advance(5)
        await lab.run_due()
        waits = await handle.status()
        await lab.drain()

        assert (delayed.state, waits.state) == ("delayed", "retrying")
        assert await handle.result(timeout_s=5) == 101
        status = await handle.status()
        assert (status.state, status.attempt, status.progress, status.note) == ("done", 2, 0.5, "half")
        assert [run.outcome for run in lab.attempts(handle.job_id)] == [Retry(60), Done(101)]


async def test_a_test_aborts_a_job_that_runs() -> None:
    """A test of an abort would have to wait for real time."""
    async with running(app) as lab:
        handle = await lab.publish(Draw(-1))
        runs = asyncio.ensure_future(lab.run_due())
        async with asyncio.timeout(20):
            while (await handle.status()).state != "running":
                await asyncio.sleep(0)
        assert await handle.abort() == "asked"
        lab.advance(1)
        await runs

        with pytest.raises(JobAborted):
            await handle.result(timeout_s=5)


async def test_a_lab_is_asked_by_the_id_of_a_job() -> None:
    """A test of code that publishes by itself has the ids of its jobs, and no handles."""
    async with running(app) as lab:
        first, second = await lab.publish(Draw(7)), await lab.publish(Draw(8), delay_s=60)

        assert await lab.abort(second.job_id) == "aborted"
        assert await lab.result(first) == 7
        states = [(await lab.status(job_id)).state for job_id in (first.job_id, second.job_id, "never published")]
        assert states == ["done", "aborted", "unknown"]
        assert await lab.abort("never published") == "unknown"
        with pytest.raises(JobAborted):
            await lab.result(second)


def test_a_lab_without_async_has_results() -> None:
    """A `TestCase` of Django would see receipts only."""
    with running_sync(app) as lab:
        handle = lab.publish(Draw(101), delay_s=5)
        delayed = lab.status(handle.job_id)
        lab.advance(5)
        lab.run_due()

        assert (delayed.state, handle.status().state) == ("delayed", "retrying")
        assert lab.result(handle) == 101
        assert lab.abort(handle.job_id) == handle.abort() == "finished"


async def test_a_handler_that_is_called_directly_may_say_how_far_it_is() -> None:
    """A unit test of a handler would need a store."""
    assert await draw(Draw(7), attempt()) == 7
