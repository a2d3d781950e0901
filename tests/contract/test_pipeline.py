"""What becomes of a job on every broker, from an app's publisher through a worker: done, retried, buried, dropped, given back."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import time
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from leveret import (
    App,
    Attempt,
    BrokerUnavailable,
    Bury,
    InvalidJob,
    Job,
    Outcome,
    Priority,
    Publish,
    Queue,
    Retry,
    Settings,
    Snooze,
)
from leveret.admin import DeadLetter
from leveret.consuming.slots import Limits
from leveret.consuming.worker import Working, working
from leveret.envelope import Envelope, Receipt
from leveret.failure import failures_of
from leveret.middleware import RateLimit, Retries, Timeout
from tests.contract.harness import PATIENCE_S, Harness, depth, make_envelope, soon

Say = Callable[[Any, Attempt[Any]], Any]
"""What a handler does with (job, attempt)."""


def job_class(queue: Queue) -> Any:
    """The job that all these tests send: a number, and a text that may be left out."""

    class Work(Job, name="contract.work", queue=queue):
        n: int
        text: str = ""

        def __post_init__(self) -> None:
            if self.n < 0:
                msg = "n is a count"
                raise ValueError(msg)

    return Work


class Runs:
    """A handler that keeps each of its attempts, for a test to wait for, and then does as it is told."""

    def __init__(self, say: Say | None = None) -> None:
        self._say = say
        self._arrived: asyncio.Queue[Attempt[Any]] = asyncio.Queue()
        self.count = 0

    async def __call__(self, job: Any, attempt: Attempt[Any]) -> Any:
        self.count += 1
        self._arrived.put_nowait(attempt)
        said = self._say(job, attempt) if self._say is not None else None
        return await said if asyncio.iscoroutine(said) else said

    async def next(self) -> Attempt[Any]:
        """Return the next attempt that started."""
        return await asyncio.wait_for(self._arrived.get(), PATIENCE_S)


def make_app(harness: Harness, work: Any, runs: Runs, settings: Settings | None = None) -> App[Any]:
    """An app on this broker with one handler."""
    app: App[Any] = App("contract", broker=harness.url, settings=settings)

    @app.handler(job=work)
    async def handle(job: Any, attempt: Attempt[Any]) -> Outcome | None:
        return await runs(job, attempt)

    return app


async def publish(app: App[Any], *jobs: Job, **options: Any) -> list[str]:
    """Publish in order; return the ids."""
    async with app.publisher() as publisher:
        return [(await publisher.publish(job, timeout_s=PATIENCE_S, **options)).job_id for job in jobs]


async def until(true: Callable[[], bool]) -> None:
    """Wait for what has no event to wait on."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.01)


async def letters_of(harness: Harness, queue: Queue, count: int) -> list[Envelope]:
    """Return the dead letters of `queue` once there are `count`."""
    admin = harness.admin()
    async with asyncio.timeout(PATIENCE_S):
        while (await depth(admin, queue)).dead < count:
            await asyncio.sleep(0.02)
    async with admin.dead(queue) as letters:
        found: list[DeadLetter] = [letter async for letter in letters]
    return [letter.envelope for letter in found]


async def assert_empty(harness: Harness, queue: Queue) -> None:
    """Nothing waits in `queue`, and nobody holds any of it."""
    row = await depth(harness.admin(), queue)
    assert (row.ready, row.unsettled or 0, row.delayed or 0) == (0, 0, 0)


async def test_a_job_that_ran_is_gone(harness: Harness) -> None:
    """Run once is the whole point."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app = make_app(harness, work, runs)

    ids = await publish(app, *(work(n=n) for n in range(20)))
    async with app.worker(queues=[queue.name]):
        attempts = [await runs.next() for _ in range(20)]

    assert [attempt.job_id for attempt in attempts] == ids
    assert [attempt.job for attempt in attempts] == [work(n=n) for n in range(20)]
    assert runs.count == 20
    await assert_empty(harness, queue)


async def test_each_of_many_jobs_has_its_receipt_and_runs_once(harness: Harness) -> None:
    """Many more than are unconfirmed at once: one that is skipped is reported lost, or is lost; one sent twice runs twice."""
    work, ran = job_class(harness.queue()), list[int]()
    app: App[Any] = App("contract", broker=harness.url)
    count = 12_000

    @app.handler(job=work)
    async def handle(job: Any) -> None:
        ran.append(job.n)

    async with app.publisher() as publisher:
        receipts = await publisher.publish_many((work(n) for n in range(count)), timeout_s=60)
    async with working(app) as running:
        async with asyncio.timeout(60):
            while len(ran) < count or running.consumer.busy:
                await running.consumer.changed()

    assert len({receipt.job_id for receipt in receipts}) == count
    assert sorted(ran) == list(range(count))


async def test_a_retry_is_the_same_job_with_one_attempt_more(harness: Harness) -> None:
    """Id, level, correlation and a tenant's header must be there on the third attempt as on the first."""
    queue, runs = harness.queue(), Runs(lambda job, attempt: Retry(0.25) if attempt.number < 3 else None)
    work = job_class(queue)
    app = make_app(harness, work, runs)

    [job_id] = await publish(app, work(n=7), priority=Priority.HIGH, headers={"x-tenant-id": "a"}, correlation_id="c")
    async with app.worker(queues=[queue.name]):
        started = time.monotonic()
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
        assert (first, others) == (("test_pipeline.py", "handle"), [])
    else:
        assert ("test_pipeline.py", "handle") in (first, *others), "where it hung"
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


async def test_an_expired_job_does_not_run_and_is_not_buried(harness: Harness) -> None:
    """A one-time password an hour late is worse than none; nobody needs to look at it either."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app = make_app(harness, work, runs)
    stale = make_envelope(queue, b'{"n": 1}', job="contract.work", expires_at_ms=int((time.time() - 1) * 1000))
    await harness.open().publish(queue, stale, delay_s=0, deadline=soon())

    [good] = await publish(app, work(n=2), expires_s=60)
    async with app.worker(queues=[queue.name]):
        assert (await runs.next()).job_id == good

    assert runs.count == 1
    assert (await depth(harness.admin(), queue)).dead == 0
    await assert_empty(harness, queue)


async def test_a_delayed_job_runs_when_it_is_due(harness: Harness) -> None:
    """And can tell how late it is."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app = make_app(harness, work, runs)

    async with app.worker(queues=[queue.name]):
        started, asked = time.monotonic(), time.time()
        await publish(app, work(n=1), delay_s=0.5)
        attempt = await runs.next()

    assert time.monotonic() - started >= 0.5
    assert attempt.envelope.due_ms == pytest.approx((asked + 0.5) * 1000, abs=2000)
    await assert_empty(harness, queue)


async def test_a_job_published_by_a_handler_belongs_to_the_same_line(harness: Harness) -> None:
    """One correlation id finds all that followed from one request."""

    async def follow(job: Any, attempt: Attempt[Any]) -> None:
        if job.n < 3:
            await attempt.publish(type(job)(n=job.n + 1))

    queue, runs = harness.queue(), Runs(follow)
    work = job_class(queue)
    app = make_app(harness, work, runs)

    [first] = await publish(app, work(n=1))
    async with app.worker(queues=[queue.name]):
        attempts = [await runs.next() for _ in range(3)]

    assert [attempt.envelope.correlation_id for attempt in attempts] == [None, first, first]
    assert len({attempt.job_id for attempt in attempts}) == 3
    await assert_empty(harness, queue)


async def test_a_blocking_publisher_reaches_a_worker(harness: Harness) -> None:
    """Django and scripts publish from a thread that has no loop."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app = make_app(harness, work, runs)
    publisher = app.blocking_publisher()

    try:
        async with app.worker(queues=[queue.name]):
            receipt = await asyncio.to_thread(publisher.publish, work(n=1), timeout_s=PATIENCE_S)
            assert (await runs.next()).job_id == receipt.job_id
    finally:
        await asyncio.to_thread(publisher.close)
    await assert_empty(harness, queue)


async def test_a_def_handler_publishes_with_the_blocking_publisher_and_never_on_a_loop_of_its_own(
    harness: Harness,
) -> None:
    """The worker's connection, made on a loop that ends, would fail each publish, retry and burial until the restart."""
    queue, ran, refused = harness.queue(), asyncio.Queue[tuple[int, int]](), list[BaseException]()
    work = job_class(queue)
    app: App[Any] = App("contract", broker=harness.url)
    publisher, loop = app.blocking_publisher(), asyncio.get_running_loop()

    @app.handler(job=work)
    def handle(job: Any, attempt: Attempt[Any]) -> Retry | None:
        loop.call_soon_threadsafe(ran.put_nowait, (job.n, attempt.number))
        if job.n == 2:
            return None
        if attempt.number == 1:
            try:
                asyncio.run(attempt.publish(work(n=2)))
            except BrokerUnavailable as error:
                refused.append(error)
            return Retry(0)
        publisher.publish(work(n=2), timeout_s=PATIENCE_S)
        return None

    try:
        await publish(app, work(n=1))
        async with app.worker(queues=[queue.name]):
            got = [await asyncio.wait_for(ran.get(), PATIENCE_S) for _ in range(3)]
    finally:
        await asyncio.to_thread(publisher.close)

    assert got == [(1, 1), (1, 2), (2, 1)]
    assert "app.blocking_publisher()" in str(refused[0])
    await assert_empty(harness, queue)


async def test_an_urgent_job_overtakes_low_ones_that_are_held(harness: Harness) -> None:
    """Held here or waiting there: urgent is urgent."""
    gate = asyncio.Event()

    async def wait(job: Any, attempt: Attempt[Any]) -> None:
        await gate.wait()

    queue, runs = harness.queue(), Runs(wait)
    work = job_class(queue)
    app = make_app(harness, work, runs)

    async with working(app, queues=[queue.name], limits=Limits(concurrency=1)) as worker:
        await publish(app, work(n=0))
        await runs.next()
        await publish(app, *(work(n=n) for n in range(1, 5)), priority=Priority.LOW)
        await publish(app, work(n=9), priority=Priority.URGENT)
        # a window of 2 for each level, one of which runs; a classic queue has one window for all
        await until(lambda: worker.consumer.held == (1 if harness.one_window else 3))
        gate.set()
        order = [(await runs.next()).envelope.priority for _ in range(5)]

    assert order.index(Priority.URGENT) == (1 if harness.one_window else 0)
    await assert_empty(harness, queue)


NESTED = b'{"n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD: dict[str, tuple[bytes, dict[str, Any]]] = {
    "random bytes": (os.urandom(300), {}),
    "the wrong shape": (b'{"n": "seven"}', {}),
    "a field that is missing": (b"{}", {}),
    "an empty body": (b"", {}),
    "100 000 nested brackets": (NESTED, {}),
    "a __post_init__ that raises": (b'{"n": -1}', {}),
    "a wrong content type": (b'{"n": 1}', {"content_type": "application/x-python-pickle"}),
    "a content encoding": (b'{"n": 1}', {"content_encoding": "gzip"}),
    "an odd header of leveret's": (b'{"n": 1}', {"headers": {"lv-attempt": "many"}}),
}


async def test_what_cannot_be_decoded_is_buried_byte_for_byte_and_the_good_jobs_run(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    """One bad producer must neither stop a queue nor lose what it sent; the log has a line for each."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app = make_app(harness, work, runs)
    good = await publish(app, work(n=0))  # and so the queue is there

    for number, (body, properties) in enumerate(BAD.values(), 1):
        await harness.put(queue, body, job="contract.work", job_id=f"bad-{number}", **properties)
        good += await publish(app, work(n=number))
    with caplog.at_level(logging.WARNING, "leveret"):
        async with app.worker(queues=[queue.name]):
            ran = {(await runs.next()).job_id for _ in good}
            letters = await letters_of(harness, queue, len(BAD))

    assert ran == set(good)
    found = {letter.job_id: letter for letter in letters}
    assert found.keys() == {f"bad-{number}" for number in range(1, len(BAD) + 1)}
    for number, (body, properties) in enumerate(BAD.values(), 1):
        letter = found[f"bad-{number}"]
        assert letter.body == body
        assert letter.content_encoding == properties.get("content_encoding")
        [failure] = failures_of(letter)
        assert failure.message
    assert all("\n" not in record.getMessage() for record in caplog.records)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("leveret")]
    assert {sum(job_id + " " in line for line in told) for job_id in found} == {1}
    await assert_empty(harness, queue)


async def test_a_job_without_a_name_is_the_queues_only_one(harness: Harness) -> None:
    """A producer in another language need know nothing of leveret."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app = make_app(harness, work, runs)

    async with app.worker(queues=[queue.name]):
        await publish(app, work(n=1))
        await runs.next()
        await harness.put(queue, b'{"n": 2}')
        foreign = await runs.next()

    assert foreign.job == work(n=2)
    assert foreign.job_id


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
    await harness.open().publish(queue, unknown, delay_s=0, deadline=soon())
    [good] = await publish(app, work(n=2))
    async with app.worker(queues=[queue.name]):
        assert (await runs.next()).job_id == good
        [letter] = await letters_of(harness, queue, 1)

    assert (letter.job_id, letter.body, letter.attempt, letter.passes) == (unknown.job_id, unknown.body, 1, 1)
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
        await until(lambda: worker.consumer.counts["unknown"] == 1)
    async with new.worker(queues=[queue.name]):
        attempt = await new_runs.next()

    assert (attempt.job_id, attempt.number, attempt.envelope.passes) == (job_id, 1, 1)
    assert old_runs.count == 0
    await assert_empty(harness, queue)


async def test_a_worker_that_stops_gives_back_what_it_has_not_started(harness: Harness) -> None:
    """A deploy must neither lose a held job nor run it twice; the one that runs may finish."""
    gate, leaving = asyncio.Event(), asyncio.Event()

    async def wait(job: Any, attempt: Attempt[Any]) -> None:
        await gate.wait()

    queue, runs, next_runs = harness.queue(), Runs(wait), Runs()
    work = job_class(queue)
    app, next_app = make_app(harness, work, runs), make_app(harness, work, next_runs)
    ids = await publish(app, *(work(n=n) for n in range(5)))

    async def first_worker() -> Working:
        async with working(app, queues=[queue.name], limits=Limits(concurrency=1)) as worker:
            await runs.next()
            await until(lambda: worker.consumer.held == 1)
            leaving.set()
        return worker

    stopping = asyncio.create_task(first_worker())
    await leaving.wait()
    async with next_app.worker(queues=[queue.name]):
        others = {(await next_runs.next()).job_id for _ in range(4)}  # while the first still runs its one
        gate.set()
        worker = await stopping

    assert worker.drained
    assert others == set(ids[1:])
    assert (runs.count, next_runs.count) == (1, 4)
    await assert_empty(harness, queue)


async def test_without_any_grace_what_waits_is_given_back_all_the_same(harness: Harness) -> None:
    """What never started needs no time to end: cut off, it would make the exit code say that jobs were torn."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app: App[Any] = App("contract", broker=harness.url, middleware=[RateLimit(1, every_s=3600)])

    @app.handler(job=work)
    async def handle(job: Any, attempt: Attempt[Any]) -> None:
        await runs(job, attempt)

    await publish(app, *(work(n=n) for n in range(4)))
    async with working(app, queues=[queue.name], grace_s=0) as worker:
        await runs.next()
        await until(lambda: worker.consumer.held == 1 and not worker.consumer.busy)

    assert worker.drained
    assert (worker.consumer.counts["notstarted"], worker.consumer.counts["cutoff"]) == (1, 0)
    assert (await depth(harness.admin(), queue)).ready == 3


async def test_what_is_cut_off_after_the_grace_is_delivered_again(harness: Harness) -> None:
    """A handler that doesn't end keeps no deploy waiting, and its job isn't lost."""

    async def hang(job: Any, attempt: Attempt[Any]) -> None:
        await asyncio.Event().wait()

    queue, runs, next_runs = harness.queue(), Runs(hang), Runs()
    work = job_class(queue)
    [job_id] = await publish(app := make_app(harness, work, runs), work(n=1))

    async with working(app, queues=[queue.name], grace_s=0.05) as worker:
        await runs.next()
    async with make_app(harness, work, next_runs).worker(queues=[queue.name]):
        again = await next_runs.next()

    assert not worker.drained
    assert (again.job_id, again.number) == (job_id, 1)
    if harness.open().features.counts_redelivery:
        assert again.redelivered
    await assert_empty(harness, queue)


async def test_a_program_that_ends_leaves_what_runs_to_the_next_one(harness: Harness) -> None:
    """`asyncio.run` cancels every task at once: what a worker in a background task was running would be in the dead letters."""
    queue, started, next_runs = harness.queue(), list[str](), Runs()
    work = job_class(queue)
    app: App[Any] = App("contract", broker=harness.url, middleware=[Retries()])

    @app.handler(job=work)
    async def hang(job: Any, attempt: Attempt[Any]) -> None:
        started.append(attempt.job_id)
        await asyncio.Event().wait()

    async def service() -> None:
        async with app.worker(queues=[queue.name]):
            await asyncio.Event().wait()

    async def program() -> None:
        serving = asyncio.create_task(service())
        await until(lambda: len(started) == 20)
        assert not serving.done()

    ids = await publish(app, *(work(n=n) for n in range(20)))
    await asyncio.to_thread(asyncio.run, program())
    async with make_app(harness, work, next_runs).worker(queues=[queue.name]):
        again = {(await next_runs.next()).job_id for _ in range(20)}

    assert again == set(ids)
    assert (await depth(harness.admin(), queue)).dead == 0


async def test_no_handler_outlives_a_worker_whose_end_is_cancelled(harness: Harness) -> None:
    """It would go on with a pool that is closed, beside the second run of its job."""
    queue, runs, pool, ended = harness.queue(), Runs(), list[str](), list[bool]()
    work = job_class(queue)

    @asynccontextmanager
    async def lifespan() -> AsyncGenerator[None, None]:
        pool.append("open")
        yield
        pool.clear()

    app: App[Any] = App("contract", broker=harness.url, lifespan=lifespan)

    @app.handler(job=work)
    async def hang(job: Any, attempt: Attempt[Any]) -> None:
        try:
            await runs(job, attempt)
            await asyncio.Event().wait()
        finally:
            ended.append(bool(pool))

    async def service() -> None:
        async with app.worker(queues=[queue.name]):
            await asyncio.Event().wait()

    [job_id] = await publish(app, work(n=1))
    serving = asyncio.create_task(service())
    await runs.next()
    while not serving.done():  # the first leaves the block, the others fall into its end
        serving.cancel()
        await asyncio.wait({serving}, timeout=0.05)

    assert ended == [True]
    next_runs = Runs()
    async with make_app(harness, work, next_runs).worker(queues=[queue.name]):
        assert (await next_runs.next()).job_id == job_id


async def test_a_layer_that_cannot_say_when_it_is_ready_is_asked_again(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    """Its Redis was away for a moment: what was delivered just then would wait in this worker for minutes, started by nobody."""

    class Gate:
        asked = 0

        def ready_in_s(self) -> float:
            self.asked += 1
            if self.asked == 1:
                msg = "redis is away"
                raise ConnectionError(msg)
            return 0.0

        async def consume(self, attempt: Attempt[Any], proceed: Any) -> Outcome:
            return await proceed(attempt)

    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app: App[Any] = App("contract", broker=harness.url, middleware=[Gate()])

    @app.handler(job=work)
    async def handle(job: Any, attempt: Attempt[Any]) -> None:
        await runs(job, attempt)

    ids = await publish(app, *(work(n=n) for n in range(20)))
    async with app.worker(queues=[queue.name]):
        assert {(await runs.next()).job_id for _ in range(20)} == set(ids)
    assert "is asked again in 1 s: ConnectionError: redis is away" in caplog.text


async def test_any_concurrency_is_taken(harness: Harness) -> None:
    """A worker of small jobs that is given 40 000 slots: twice that is no prefetch that AMQP could carry."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app = make_app(harness, work, runs)

    await publish(app, work(n=1))
    async with working(app, queues=[queue.name], limits=Limits(concurrency=40_000)):
        await runs.next()
    await assert_empty(harness, queue)


async def test_a_worker_that_was_cut_off_is_let_go(harness: Harness) -> None:
    """An embedded worker, or a test suite's hundredth, that stays in memory with its connection and resources fills it."""

    class Shop: ...

    class Hang:
        async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
            if envelope.cause is not None:
                retrying.set()
                await asyncio.Event().wait()
            return await proceed(envelope)

    @asynccontextmanager
    async def lifespan() -> AsyncGenerator[Shop, None]:
        yield (shop := Shop())
        shops.append(weakref.ref(shop))

    queue, retrying, shops = harness.queue(), asyncio.Event(), list[weakref.ref[Shop]]()
    work = job_class(queue)
    app = App("contract", broker=harness.url, middleware=[Hang()], lifespan=lifespan)

    @app.handler(job=work)
    async def handle(job: Any) -> Outcome | None:
        return Snooze(60)

    await publish(app, work(n=1))
    async with working(app, queues=[queue.name], grace_s=0.05) as worker:
        await retrying.wait()
    assert not worker.drained
    del worker
    [shop] = shops

    def is_gone() -> bool:
        gc.collect()
        return shop() is None

    await until(is_gone)


async def test_a_lost_connection_neither_cancels_a_handler_nor_loses_its_job(harness: Harness) -> None:
    """What runs may have charged a card already: it finishes, and the broker delivers the job again."""
    if not harness.connected:
        pytest.skip("it has no connection that could be lost")
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


class Told(logging.Handler):
    """Sets an event when the consumer says that it can't publish a settlement."""

    def __init__(self) -> None:
        super().__init__()
        self.event = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "can't be published" in record.getMessage():
            self.event.set()


@pytest.mark.parametrize("says", ["retry", "bury"])
async def test_a_settlement_that_cannot_be_confirmed_is_tried_again_until_it_is(harness: Harness, says: str) -> None:
    """Dropped or acked in the meantime, the job would be lost with a broker that was only away for a moment."""
    published = asyncio.Event()

    async def fail(job: Any, attempt: Attempt[Any]) -> Outcome | None:
        if attempt.number == 1:
            await published.wait()  # a job may be delivered before its publisher has the confirm
            await harness.break_publishing()
            return Retry(0) if says == "retry" else Bury("no")
        return None

    queue, runs, told = harness.queue(), Runs(fail), Told()
    work = job_class(queue)
    app = make_app(harness, work, runs)
    logger = logging.getLogger("leveret.consumer")
    logger.addHandler(told)

    try:
        async with working(app, queues=[queue.name]) as worker:
            await until(lambda: worker.consumption.ready)
            [job_id] = await publish(app, work(n=1))
            published.set()
            await runs.next()
            await asyncio.wait_for(told.event.wait(), PATIENCE_S)
            assert worker.consumer.unsettled == 1
            await harness.heal()
            if says == "retry":
                again = await runs.next()
                assert (again.job_id, again.number) == (job_id, 2)
            else:
                letters = await letters_of(harness, queue, 1)
                assert {letter.job_id for letter in letters} == {job_id}
            await until(lambda: worker.consumer.unsettled == 0)
    finally:
        logger.removeHandler(told)
    await assert_empty(harness, queue)


@pytest.mark.parametrize("ends", ["returns", "waits"])
async def test_a_handler_that_cancels_its_own_task_is_settled_all_the_same(harness: Harness, ends: str) -> None:
    """A cancel that is still pending would hit the publish of its retry, and the job would hang until its connection is closed."""

    async def cancels(job: Any, attempt: Attempt[Any]) -> Outcome | None:
        if attempt.number == 2:
            return None
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        if ends == "waits":
            await asyncio.sleep(0)
        return Retry(0)

    queue, runs = harness.queue(), Runs(cancels)
    work = job_class(queue)
    app = make_app(harness, work, runs)

    async with working(app, queues=[queue.name]):
        [job_id] = await publish(app, work(n=1))
        await runs.next()
        if ends == "returns":
            assert (await runs.next()).job_id == job_id
        else:
            [letter] = await letters_of(harness, queue, 1)
            assert "CancelledError" in letter.errors
    await assert_empty(harness, queue)


@pytest.mark.parametrize("how", ["raises", "fills"])
async def test_a_retry_that_can_never_be_published_is_buried(harness: Harness, how: str) -> None:
    """Tried again and again, it would hold its place in the window for ever; and nobody would see the job."""
    if how == "fills" and not harness.url.startswith("amqp"):
        pytest.skip("it has no limit to the headers")

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
    assert "its retry can't be published" in failures_of(letter)[-1].reason


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
