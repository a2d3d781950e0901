"""Handles: what a publisher learns of its jobs from the store, and what it costs those who ask for nothing."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from random import getrandbits
from typing import Any

import msgspec
import pytest

from leveret import (
    App,
    Attempt,
    BrokerUnavailable,
    ConfigurationError,
    Envelope,
    Handle,
    InvalidJob,
    Job,
    JobAborted,
    JobExpired,
    JobFailed,
    Keep,
    Outgoing,
    Publish,
    Publisher,
    PublishManyError,
    Queue,
    Receipt,
    ResultUnavailable,
    StoreUnavailable,
)
from leveret.brokers.memory import MemoryBroker, MemoryStore, open_store
from leveret.headers import pack_headers
from leveret.publishing import blocking
from leveret.publishing.sender import Sender
from leveret.results import results as module
from leveret.results.results import Results
from leveret.runtime import Runtime
from leveret.store import Change, Record, State, Store
from leveret.testing import attempt, running

from .levers import Breakable, memory_jobs
from .stores import at_once, down

images = Queue("images")
DAY_S = 86_400.0


class Size:
    """A type that needs the job's hooks."""

    def __init__(self, width: int) -> None:
        self.width = width


def _encode(size: Size) -> int:
    return size.width


def _decode(_: type[Any], width: Any) -> Size:
    return Size(int(width))


class Measure(Job[Size], name="image.measure", queue=images, keep=Keep(), enc_hook=_encode, dec_hook=_decode):
    """A job with a result."""

    url: str = ""


class Index(Job, name="image.index", queue=images, keep=Keep(failed_s=60, body=True)):
    """A job whose end is kept, and that has no result."""

    url: str = ""


class Sum(Job[int], name="sum", queue=images, keep=Keep()):
    """A job that is made of others."""


class Term(Job[int], name="term", queue=images, keep=Keep()):
    """One of them."""

    n: int


class Send(Job, name="mail.send", queue=images):
    """A job of which nothing is kept."""


class Shop:
    """A publisher on a broker and a store in memory, and what the store has."""

    def __init__(self, *layers: Any, tells: bool = True) -> None:
        self.jobs = MemoryStore()
        self.runtime = Runtime(app="shop")
        self.records = memory_jobs()
        self.store = Breakable(self.records, tells=tells)
        self.opened = 0
        self._layers = layers

    @asynccontextmanager
    async def publisher(self) -> AsyncGenerator[Publisher, None]:
        """Publish to them."""

        def results() -> Results:
            self.opened += 1
            return Results(self.store, self.runtime)

        sender = Sender(MemoryBroker(self.jobs, self.runtime), self._layers, self.runtime, open_results=results)
        publisher = Publisher(sender)
        yield publisher
        publisher.close()
        await sender.close()

    @property
    def waiting(self) -> list[Envelope]:
        """The jobs in the queue."""
        levels = self.jobs.contents.levels("images")
        return [stored.envelope for level in levels.values() for _, stored in level]

    async def record(self, handle: Receipt) -> Record:
        """Return the newest record of a job."""
        [record, *_] = await self.records.find(handle.job_id)
        return record

    async def change(self, handle: Receipt, state: State, **fields: Any) -> None:
        """Let the newest publish of a job come to a state."""
        record = await self.record(handle)
        told = {name: getattr(record, name) for name in ("job_id", "publish", "queue", "job", "passes", "attempt")}
        await self.records.write([Change(**{**told, "state": state, "keep_s": DAY_S, "at_ms": 1, **fields})])


async def published(shop: Shop, publisher: Publisher, job: Job[Any], **options: Any) -> Handle[Any]:
    """Publish a job, and return its handle once the store has its record."""
    handle = await publisher.publish(job, **options)
    while not await shop.records.find(handle.job_id):
        await asyncio.sleep(0)
    return handle


async def test_a_result_arrives_as_its_type() -> None:
    """A program would get a dict where its type says Size."""
    shop = Shop()
    async with shop.publisher() as publisher:
        handle = await publisher.publish(Measure("a.png"))
        waiting = asyncio.create_task(handle.result(timeout_s=30))
        await handle.status()
        await shop.change(handle, "done", result=b"7", content_type="application/json")
        size = await waiting
        again = await publisher.handle(handle.job_id, Measure).result(timeout_s=30)

    assert isinstance(size, Size)
    assert (size.width, again.width) == (7, 7)


async def test_a_job_without_a_result_can_be_awaited() -> None:
    """Its end is a result, too."""
    shop = Shop()
    async with shop.publisher() as publisher:
        handle = await published(shop, publisher, Index())
        await shop.change(handle, "done")

        assert await handle.result(timeout_s=30) is None


@pytest.mark.parametrize(
    ("state", "fields", "error", "says"),
    [
        (
            "failed",
            {"error": "OSError: full", "reason": "out of attempts"},
            JobFailed,
            "OSError: full; out of attempts",
        ),
        ("aborted", {}, JobAborted, "was aborted"),
        ("expired", {}, JobExpired, "had expired"),
        ("done", {"reason": "its 9 bytes are more than 8"}, ResultUnavailable, "its 9 bytes are more than 8"),
        ("done", {"result": b'"x"', "content_type": "application/json"}, ResultUnavailable, "the result isn't Size"),
    ],
)
async def test_an_end_without_a_result_says_why(
    state: State, fields: dict[str, Any], error: type[Exception], says: str
) -> None:
    """A time-out would be all that the program sees."""
    shop = Shop()
    async with shop.publisher() as publisher:
        handle = await published(shop, publisher, Measure(), job_id="m-1")
        await shop.change(handle, state, **fields)

        with pytest.raises(error, match=says) as raised:
            await handle.result(timeout_s=30)

    assert "image.measure m-1" in str(raised.value)
    if isinstance(raised.value, JobFailed):
        assert (raised.value.error, raised.value.reason, raised.value.attempt) == (
            "OSError: full",
            "out of attempts",
            1,
        )


class Frozen:
    """A store that neither answers nor hears a cancellation, until it thaws."""

    def __init__(self) -> None:
        self.thawed = False

    async def answer(self) -> None:
        """Wait through every cancellation."""
        while not self.thawed:
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()


@pytest.mark.parametrize("newest", [False, True])
async def test_no_result_waits_longer_than_its_time_limit(newest: bool) -> None:
    """A request would hang with the store, and a store that hangs doesn't hear a cancellation."""
    shop, frozen = Shop(), Frozen()
    async with shop.publisher() as publisher:
        handle = await published(shop, publisher, Measure())
        if newest:
            handle = publisher.handle(handle.job_id, Measure)
        shop.store.answer = frozen.answer
        began = asyncio.get_running_loop().time()
        with pytest.raises(TimeoutError, match=r"image.measure .* after 0.02 s"):
            await handle.result(timeout_s=0.02)
        took_s = asyncio.get_running_loop().time() - began
        shop.store.answer, frozen.thawed = at_once, True

    assert took_s < 4, "it waited for the store"


@pytest.mark.parametrize("by_id", [False, True])
async def test_many_results_are_awaited_without_a_task_for_each(by_id: bool) -> None:
    """Of ten thousand that time out together the last would be late by the time that it takes to end as many tasks."""
    shop, count = Shop(), 50
    async with shop.publisher() as publisher:
        handles = [await published(shop, publisher, Measure()) for _ in range(count)]
        if by_id:
            handles = [publisher.handle(handle.job_id, Measure) for handle in handles]
        before = asyncio.all_tasks()
        waits = [asyncio.create_task(handle.result(timeout_s=60)) for handle in handles]
        while sum(map(len, shop.store.questions)) < count:
            await asyncio.sleep(0)
        others = asyncio.all_tasks() - before - set(waits)
        for wait in waits:
            wait.cancel()

    assert len(others) < count / 2


async def test_a_time_out_says_that_the_store_is_down() -> None:
    """Somebody would look for a slow handler."""
    shop = Shop()
    async with shop.publisher() as publisher:
        handle = await published(shop, publisher, Measure())
        shop.store.answer = down
        with pytest.raises(TimeoutError, match="the store doesn't answer: nobody listens at tests://store"):
            await handle.result(timeout_s=0.2)


async def test_a_status_is_what_the_store_knows() -> None:
    """`queued` and `delayed` are written without a wait: asked for at once, they must be there."""
    shop = Shop()
    async with shop.publisher() as publisher:
        queued = await (await publisher.publish(Measure())).status()
        handle = await publisher.publish(Measure(), delay_s=60)
        delayed = await handle.status()
        record = await shop.record(handle)
        await shop.change(handle, "retrying", passes=1, attempt=2, error="OSError: full")
        retrying = await handle.status()
        unknown = await publisher.handle("never published", Measure).status()

    assert (queued.state, queued.attempt, delayed.state) == ("queued", 1, "delayed")
    assert (retrying.state, retrying.attempt, retrying.error) == ("retrying", 2, "OSError: full")
    assert (unknown.job_id, unknown.state) == ("never published", "unknown")
    assert record.keep_until_ms - record.at_ms == pytest.approx((7 * DAY_S + 60) * 1000, abs=60_000)


async def test_a_record_has_a_body_only_where_it_is_asked_for() -> None:
    """Bodies hold what nobody wants to see in a second database."""
    shop = Shop()
    async with shop.publisher() as publisher:
        with_body = await published(shop, publisher, Index("a.png"))
        without = await published(shop, publisher, Measure("a.png"))

    assert (await shop.record(with_body)).body == b'{"url":"a.png"}'
    assert (await shop.record(without)).body is None


async def test_an_abort_reaches_a_job_that_was_just_published() -> None:
    """It would say that there is no such job, and the job would run."""
    shop = Shop()
    async with shop.publisher() as publisher:
        waits = await publisher.publish(Measure())
        runs, ended = await published(shop, publisher, Measure()), await published(shop, publisher, Measure())
        await shop.change(runs, "running")
        await shop.change(ended, "done")

        said = [await handle.abort() for handle in (waits, waits, runs, ended)]
        unknown = await publisher.handle("never published", Measure).abort()
        aborting = (await runs.status()).aborting
        with pytest.raises(JobAborted):
            await waits.result(timeout_s=30)

    assert said == ["aborted", "aborted", "asked", "finished"]
    assert unknown == "unknown"
    assert aborting


async def test_a_handle_sees_its_own_publish_and_an_id_the_newest() -> None:
    """An id may be published twice: the second caller would get the result of the first."""
    shop = Shop()
    async with shop.publisher() as publisher:
        first = await published(shop, publisher, Measure(), job_id="same")
        await shop.change(first, "done", result=b"1", content_type="application/json")
        second = await publisher.publish(Measure(), job_id="same")

        states = [(await handle.status()).state for handle in (first, second, publisher.handle("same", Measure))]
        await shop.change(second, "done", result=b"2", content_type="application/json")
        widths = [
            (await handle.result(timeout_s=30)).width for handle in (first, second, publisher.handle("same", Measure))
        ]

    assert states == ["done", "queued", "queued"]
    assert widths == [1, 2, 2]


async def test_an_id_that_the_store_does_not_know_yet_can_be_awaited() -> None:
    """Another process publishes it in a moment, or its record is on the way."""
    shop = Shop()
    async with shop.publisher() as publisher:
        waiting = asyncio.create_task(publisher.handle("later", Measure).result(timeout_s=30))
        while "newest" not in shop.store.begun:
            await asyncio.sleep(0)
        handle = await published(shop, publisher, Measure(), job_id="later")
        await shop.change(handle, "done", result=b"3", content_type="application/json")

        assert (await waiting).width == 3


async def test_a_handle_by_id_is_of_no_other_class() -> None:
    """An order's number is the id of several jobs: one would get the result of another, or abort it."""
    shop = Shop()
    async with shop.publisher() as publisher:
        await published(shop, publisher, Sum(), job_id="order-7")
        other = await published(shop, publisher, Measure(), job_id="order-7")
        handle = publisher.handle("order-7", Sum)

        answers = (await handle.abort(), (await handle.status()).state, (await shop.record(other)).state)
        await shop.change(other, "done", result=b"7", content_type="application/json")
        with pytest.raises(
            ResultUnavailable,
            match=r"the last job with this id is of another class, image.measure; give handle\(\) that class",
        ):
            await handle.result(timeout_s=5)

    assert answers == ("unknown", "unknown", "queued")


async def test_all_handles_by_id_share_a_question() -> None:
    """Ten thousand of them would be ten thousand queries a second, and no state of a job would get through."""
    shop = Shop()
    async with shop.publisher() as publisher:
        known = await published(shop, publisher, Measure())
        handles = [publisher.handle(job_id, Measure) for job_id in (known.job_id, known.job_id, "no", "none")]
        shop.store.begun.clear()

        states = [status.state for status in await asyncio.gather(*(handle.status() for handle in handles))]
        asked = shop.store.begun.count("newest")
        gone = asyncio.create_task(handles[2].result(timeout_s=60))
        waits = asyncio.create_task(handles[3].result(timeout_s=60))
        while shop.store.begun.count("newest") < asked + 2:
            await asyncio.sleep(0.001)
        gone.cancel()

    assert (states, asked) == (["queued", "queued", "unknown", "unknown"], 1)
    with pytest.raises(StoreUnavailable, match="has ended"):
        await waits


@pytest.mark.parametrize("by_id", [False, True])
async def test_who_asks_is_replaced_when_all_tasks_are_cancelled(by_id: bool) -> None:
    """The end of a program cancels every task; a worker that still drains would hear of no result any more."""
    shop = Shop()
    async with shop.publisher() as publisher:
        handle = await published(shop, publisher, Measure())
        own = publisher.handle(handle.job_id, Measure) if by_id else handle
        before = asyncio.all_tasks()
        waits = asyncio.create_task(own.result(timeout_s=30))
        while len(theirs := asyncio.all_tasks() - before) < 2:
            await asyncio.sleep(0)
        for task in theirs:
            task.cancel()
        with suppress(asyncio.CancelledError, StoreUnavailable):
            await waits
        await shop.change(handle, "done", result=b"7", content_type="application/json")

        size = await own.result(timeout_s=5)

    assert size.width == 7


async def test_a_store_that_is_down_holds_up_no_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker is there: an outage of the store would be one of the shop."""
    monkeypatch.setattr(module, "STATUS_S", 0.1)
    shop = Shop()
    shop.store.answer = down
    async with shop.publisher() as publisher:
        handle = await publisher.publish(Measure())
        receipts = await publisher.publish_many([Measure(), Index()])
        with pytest.raises(StoreUnavailable):
            await handle.status()
        with pytest.raises(StoreUnavailable):
            await handle.abort(timeout_s=0.1)
        shop.store.answer = at_once

    assert len(receipts) == 2
    assert len(shop.waiting) == 3


async def test_many_receipts_stay_small_and_their_jobs_are_recorded() -> None:
    """A million handles would be a hundred megabytes."""
    shop = Shop()
    async with shop.publisher() as publisher:
        receipts = await publisher.publish_many([Measure(), Outgoing(Index("b.png"), delay_s=60), Send()])
        states = [(await shop.record(receipt)).state for receipt in receipts[:2] if await _there(shop, receipt)]
        sent = await shop.records.find(receipts[2].job_id)

    assert [type(receipt) for receipt in receipts] == [Receipt] * 3
    assert states == ["queued", "delayed"]
    assert not sent


async def _there(shop: Shop, receipt: Receipt) -> bool:
    while not await shop.records.find(receipt.job_id):
        await asyncio.sleep(0)
    return True


async def test_a_job_that_the_broker_refused_has_no_record() -> None:
    """Its publisher knows that there is no such job; the store would say that it waits."""
    shop = Shop()
    shop.jobs.refuse("full")
    async with shop.publisher() as publisher:
        with pytest.raises(BrokerUnavailable):
            await publisher.publish(Measure())
        with pytest.raises(PublishManyError):
            await publisher.publish_many([Measure()])
        shop.jobs.accept()
        await published(shop, publisher, Measure())

    assert len(await shop.records.list(limit=10)) == 1


class Doubles:
    """Publishes under another id, as only middleware can."""

    async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
        return await proceed(msgspec.structs.replace(envelope, job_id=f"{envelope.job_id}-changed"))


async def test_a_handle_is_made_after_the_middleware() -> None:
    """It would wait for a job that was never published."""
    shop = Shop(Doubles())
    async with shop.publisher() as publisher:
        handle = await publisher.publish(Measure(), job_id="id")
        status = await handle.status()

    assert (handle.job_id, status.state) == ("id-changed", "queued")


async def test_a_class_without_keep_has_no_header_and_opens_no_store() -> None:
    """Each publish of everybody would pay for what few ask."""
    shop = Shop()
    async with shop.publisher() as publisher:
        handle = await publisher.publish(Send())
        await publisher.publish_many([Send()])
        for ask in (handle.status(), handle.result(timeout_s=1), handle.abort()):
            with pytest.raises(ConfigurationError, match=r"give the class keep=Keep\(\)"):
                await ask
        with pytest.raises(InvalidJob, match=r"nothing is kept of mail.send; give Send keep=Keep\(\)"):
            publisher.handle("id", Send)

    assert shop.opened == 0
    assert msgspec.json.encode(handle) == msgspec.json.encode(Receipt(handle.job_id))
    assert [pack_headers(envelope) for envelope in shop.waiting] == [{}, {}]


@pytest.mark.parametrize(
    ("store", "says"),
    [(None, "this app has no job store. Give App"), ("amqp://shop:hunter2@host/", "keeps no results")],
)
async def test_keep_without_a_store_is_refused_at_the_publish(
    monkeypatch: pytest.MonkeyPatch, store: str | None, says: str
) -> None:
    """The result would be awaited for ever."""
    monkeypatch.delenv("LEVERET_STORE", raising=False)
    app = App("shop", broker="amqp://localhost:1/", store=store)
    async with app.publisher() as publisher:
        with pytest.raises(InvalidJob, match=says) as refused:
            await publisher.publish(Measure())
        with pytest.raises(PublishManyError, match=says):
            await publisher.publish_many([Measure()])
        with pytest.raises(InvalidJob, match=says):
            publisher.handle("id", Measure)

    assert "hunter2" not in str(refused.value)


async def test_a_handle_of_a_publisher_that_ended_says_so() -> None:
    """It would wait for its whole time-out, for a store that nobody asks any more."""
    shop = Shop()
    async with shop.publisher() as publisher:
        handle = await publisher.publish(Measure())
        waiting = asyncio.create_task(handle.result(timeout_s=30))
        await handle.status()
    for ask in (waiting, handle.result(timeout_s=30), handle.status(), handle.abort()):
        with pytest.raises(StoreUnavailable, match=r"has ended; make a handle .*publisher.handle\(job_id, JobClass\)"):
            await ask

    assert shop.store.closed


async def test_a_handle_on_another_loop_says_so() -> None:
    """Its question would wait on a connection of a loop that never reads the answer."""
    shop = Shop()
    async with shop.publisher() as publisher:
        handle = await publisher.publish(Measure())

        def elsewhere() -> None:
            asyncio.run(handle.status())

        with pytest.raises(StoreUnavailable, match="belongs to another event loop"):
            await asyncio.to_thread(elsewhere)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), "5", True])
async def test_a_time_limit_that_is_none_is_refused(timeout_s: Any) -> None:
    """`result(timeout_s=inf)` is the wait that nobody meant."""
    shop = Shop()
    async with shop.publisher() as publisher:
        handle = await publisher.publish(Measure())
        with pytest.raises(ValueError, match="timeout_s must be a number of seconds above 0 and finite"):
            await handle.result(timeout_s=timeout_s)
        with pytest.raises(ValueError, match="timeout_s must be"):
            await handle.abort(timeout_s=timeout_s)


async def test_an_attempt_made_by_a_test_publishes_jobs_with_keep() -> None:
    """The unit test of a handler would need a store."""
    made = attempt()

    handle = await made.publish(Measure("a.png"))

    assert [one.job for one in made.published] == [Measure("a.png")]
    assert made.published[0].envelope.publish
    with pytest.raises(ConfigurationError):
        await handle.status()


class Elsewhere:
    """Changes the records of a memory store from the test's thread."""

    def __init__(self, url: str) -> None:
        self._url = url

    def run(self, work: Callable[[Store], Any]) -> Any:
        """Do something with the store, on a loop of its own."""

        async def use() -> Any:
            return await work(open_store(self._url, Runtime(app="test")))

        return asyncio.run(use())


def test_a_thread_cannot_wait_for_ever() -> None:
    """A float can be longer than a thread can wait: the caller would get an OverflowError that names no argument."""
    with App("shop", broker=f"memory://blocking-{getrandbits(32)}").blocking_publisher() as publisher:
        handle = publisher.publish(Measure())
        assert handle.abort(timeout_s=1e300) == "aborted"
        with pytest.raises(JobAborted):
            handle.result(timeout_s=1e300)
        with pytest.raises(ValueError, match="timeout_s must be a number of seconds above 0 and finite"):
            handle.result(timeout_s=float("inf"))
        with pytest.raises(InvalidJob, match="timeout_s"):
            publisher.publish(Send(), timeout_s=1e300)


@pytest.mark.parametrize("job_id", ["", "a\0b", "\ud800", "x" * 201, b"id", 5, None])
async def test_an_id_that_no_job_has_reaches_no_store(job_id: Any) -> None:
    """Ids come from clients: one could fail the waits of all others, or hide the results of its whole batch."""
    shop = Shop()
    async with shop.publisher() as publisher:
        with pytest.raises(InvalidJob, match="job_id must be a str of 1 to 200 bytes without a null character"):
            publisher.handle(job_id, Measure)
        if job_id is not None:
            with pytest.raises(InvalidJob):
                await publisher.publish(Measure(), job_id=job_id)

    assert shop.store.begun == []


def test_a_blocking_publisher_has_blocking_handles() -> None:
    """A Django view would have to start an event loop to ask for its report."""
    url = f"memory://blocking-{getrandbits(32)}"
    store, app = Elsewhere(url), App("shop", broker=url)
    with app.blocking_publisher() as publisher:
        handle = publisher.publish(Measure("a.png"))
        queued = handle.status()  # waits until the store has what was noted
        [key] = store.run(lambda jobs: jobs.newest([handle.job_id]))
        done = Change(
            job_id=key.job_id,
            publish=key.publish,
            queue="images",
            job="image.measure",
            state="done",
            passes=0,
            attempt=1,
            keep_s=60,
            at_ms=0,
            result=b"7",
            content_type="application/json",
        )
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(handle.result, timeout_s=30)
            store.run(lambda jobs: jobs.write([done]))
            size = waiting.result()
        finished = publisher.handle(handle.job_id, Measure).abort()
        plain = publisher.publish(Send())
        with pytest.raises(ConfigurationError):
            plain.status()

    assert (queued.state, size.width, finished) == ("queued", 7, "finished")
    with pytest.raises(StoreUnavailable, match="has ended"):
        handle.status()


def test_a_blocking_handle_does_not_wait_for_a_loop_that_is_blocked() -> None:
    """Middleware that blocks the loop of all blocking publishers would hold a request beyond what it said."""
    app, goes_on = App("shop", broker=f"memory://blocking-{getrandbits(32)}"), threading.Event()
    with app.blocking_publisher() as publisher:
        handle = publisher.publish(Measure("a.png"))
        loop = blocking._background().loop
        loop.call_soon_threadsafe(goes_on.wait)
        try:
            with pytest.raises(TimeoutError, match="something blocks the event loop of this handle's publisher"):
                handle.abort(timeout_s=0.01)
        finally:
            goes_on.set()

        async def on_the_loop() -> None:
            handle.status()

        with pytest.raises(RuntimeError, match="would wait for itself"):
            asyncio.run_coroutine_threadsafe(on_the_loop(), loop).result(30)


async def _awaits(_: Sum, attempt: Attempt) -> int:
    handles = [await attempt.publish(Term(n)) for n in range(3)]
    return sum([await handle.result(timeout_s=30) for handle in handles])


def _blocks(_: Sum, attempt: Attempt) -> int:
    handles = [attempt.publish_blocking(Term(n)) for n in range(3)]
    return sum(handle.result(timeout_s=30) for handle in handles)


@pytest.mark.parametrize("handler", [_awaits, _blocks])
async def test_a_handler_waits_for_the_jobs_that_it_published(handler: Any) -> None:
    """A job that is made of others would have to look for their results itself."""
    app = App("sums")
    app.handler(handler)

    @app.handler
    async def term(job: Term) -> int:
        return job.n

    async with running(app) as lab:
        assert await lab.result(await lab.publish(Sum())) == 3
