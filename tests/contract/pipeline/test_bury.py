"""Buried: the job is a dead letter that says why."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import msgspec
import pytest

from leveret import App, Attempt, Bury, InvalidJob, Outcome, Priority, Publish, Retry
from leveret.consuming.worker import working
from leveret.envelope import Envelope, Receipt
from leveret.failure import failures_of
from leveret.middleware import RateLimit, Retries, Timeout
from tests.contract.harness import Harness
from tests.contract.pipeline.apps import Runs, assert_empty, job_class, letters_of, make_app, publish, until


async def test_an_exception_buries_the_job_with_what_was_raised(harness: Harness) -> None:
    """Who looks into the dead letters must find the job as it was sent, and why it is there."""

    def fail(job: Any, attempt: Attempt[Any]) -> None:
        if job.n == 1:
            raise LookupError("no such\norder")

    queue, runs = harness.queue(), Runs(fail)
    work = job_class(queue)
    app = make_app(harness, work, runs)

    [bad, good] = await publish(
        app, work(n=1, text="é"), work(n=2), priority=Priority.LOW, headers={"x-tenant-id": "a"}
    )
    async with app.worker(queues=[queue.name]):
        assert {(await runs.next()).job_id, (await runs.next()).job_id} == {bad, good}

    [letter] = await letters_of(harness, queue, 1)
    [failure] = failures_of(letter)
    assert (letter.job_id, letter.job, letter.queue, letter.origin) == (bad, "contract.work", queue.name, queue.name)
    assert (letter.priority, letter.headers, letter.attempt) == (Priority.LOW, {"x-tenant-id": "a"}, 1)
    assert msgspec.json.decode(letter.body) == {"n": 1, "text": "é"}
    assert (failure.attempt, failure.error, failure.message) == (1, "LookupError", "no such order")
    assert "fail" in failure.traceback
    await assert_empty(harness, queue)


@pytest.mark.parametrize("n", [1, 2], ids=["the handler's error", "the layer's own"])
async def test_a_traceback_begins_where_users_can_mend_something(harness: Harness, n: int) -> None:
    """The way through the layers is the same each time: with it first, who is woken reads our files, and each failure costs twice the CPU."""
    queue = harness.queue()
    work = job_class(queue)
    app: App[Any] = App(
        "contract", broker=harness.url, middleware=[Retries(max_attempts=1), RateLimit(1000), Timeout(0.2)]
    )

    @app.handler(job=work)
    async def handle(job: Any) -> None:
        if job.n == 1:
            raise LookupError
        await asyncio.Event().wait()

    await publish(app, work(n=n))
    async with app.worker(queues=[queue.name]):
        [letter] = await letters_of(harness, queue, 1)

    [failure] = failures_of(letter)
    first, *others = re.findall(r'File ".*/(\S+)", line \d+, in (\S+)', failure.traceback)
    if n == 1:
        assert (first, others) == (("test_bury.py", "handle"), [])
    else:
        assert ("test_bury.py", "handle") in (first, *others), "where it hung"
        assert failure.traceback.endswith("TimeoutError: contract.work was ended by its Timeout of 0.2 s\n")


async def test_bury_keeps_its_reason(harness: Harness) -> None:
    """A handler that gives up says why, for the person who looks."""
    queue, runs = harness.queue(), Runs(lambda job, attempt: Bury("the order was cancelled"))
    work = job_class(queue)
    app = make_app(harness, work, runs)

    await publish(app, work(n=1))
    async with app.worker(queues=[queue.name]):
        await runs.next()

    [letter] = await letters_of(harness, queue, 1)
    assert [failure.reason or failure.message for failure in failures_of(letter)] == ["the order was cancelled"]
    await assert_empty(harness, queue)


@pytest.mark.parametrize("how", ["raises", pytest.param("fills", marks=pytest.mark.features(bounds_headers=True))])
async def test_a_retry_that_can_never_be_published_is_buried(harness: Harness, how: str) -> None:
    """Tried again and again, it would hold its place in the window for ever; and nobody would see the job."""

    class Spoils:
        """Makes of each retry something that can't be sent."""

        async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
            if envelope.cause is None:
                return await proceed(envelope)
            if how == "raises" and envelope.cause == "retry":
                raise InvalidJob("no such tenant", job_id=envelope.job_id)
            return await proceed(
                envelope.with_headers({f"x-{number}": "x" * 1000 for number in range(200)} if how == "fills" else {})
            )

    queue, runs = harness.queue(), Runs(lambda job, attempt: Retry(0))
    work = job_class(queue)
    app: App[Any] = App("contract", broker=harness.url, middleware=[Spoils()])

    @app.handler(job=work)
    async def handle(job: Any, attempt: Attempt[Any]) -> Outcome | None:
        return await runs(job, attempt)

    async with working(app, queues=[queue.name]) as worker:
        [job_id] = await publish(app, work(n=1))
        [letter] = await letters_of(harness, queue, 1)
        await until(lambda: worker.consumer.busy == 0)
        assert worker.consumer.unsettled == 0
    await assert_empty(harness, queue)

    assert (letter.job_id, letter.attempt) == (job_id, 1)
    assert "the retry can't be published" in failures_of(letter)[-1].reason


class Unspeakable(Exception):
    """Can't be shown."""

    def __str__(self) -> str:
        raise RuntimeError("nor this")


@pytest.mark.parametrize(
    "error",
    [ValueError("bad name \udcff.txt"), Unspeakable(), Bury("half a pair \ud800")],
    ids=["surrogate", "no text", "reason"],
)
@pytest.mark.parametrize("layers", [[], [Retries(max_attempts=2, base_s=0.01)]], ids=["bare", "retries"])
async def test_an_error_whose_text_cannot_be_written_is_an_error_like_any_other(
    harness: Harness, error: Exception, layers: list[Any]
) -> None:
    """A file name that isn't UTF-8 in an error's text left its job unsettled, and with enough of them the queue stood still."""

    def fails(job: Any, attempt: Attempt[Any]) -> None:
        raise error

    queue = harness.queue()
    work = job_class(queue)
    app: App[Any] = App("contract", broker=harness.url, middleware=layers)
    app.handler(job=work)(fails)

    async with working(app, queues=[queue.name]) as worker:
        [job_id] = await publish(app, work(n=1))
        [letter] = await letters_of(harness, queue, 1)
        await until(lambda: worker.consumer.busy == 0)
    await assert_empty(harness, queue)

    assert letter.job_id == job_id
    assert failures_of(letter)[-1].reason
