"""What a job store hears of a worker's jobs, and what it decides."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from leveret import Attempt, Bury, Done, Job, Keep, Outcome, Settings, Snooze
from leveret.consuming.worker import working
from leveret.errors import ConfigurationError
from leveret.middleware import Retries
from leveret.outcome import Kind
from leveret.runtime import Runtime
from leveret.store import Progress, Store

from .kept import Bench, Blocks, Paint, Plain, Resize, Thumbnail, ended, images, turns, until


async def test_a_result_is_in_the_store_before_its_job_is_acknowledged() -> None:
    """A worker that dies in between would leave a job that is done, and nobody who can say so."""
    bench = Bench()

    @bench.handler
    async def resize(job: Resize) -> Thumbnail:
        return Thumbnail(64)

    async with bench.works() as work:
        bench.store.goes_on.clear()
        key = await bench.publish(Resize())
        await turns()
        assert work.consumer.busy == 1
        assert work.consumer.running == 0  # the slot is free meanwhile
        assert not work.consumer.counts

        bench.store.goes_on.set()
        await ended(work, Kind.DONE)

    record = await bench.record(key)
    assert (record.state, record.result, record.content_type) == ("done", b'{"width":64}', "application/json")
    assert bench.store.life() == [("running", 0, 1), ("done", 0, 1)]
    assert bench.store.closed


async def test_the_life_of_a_job_that_fails() -> None:
    """A user who asks why would see a state that is long past."""
    bench = Bench(middleware=[Retries(max_attempts=2, base_s=1, cap_s=1)])

    @bench.handler
    async def resize(job: Resize) -> Thumbnail:
        msg = "no such image"
        raise LookupError(msg)

    async with bench.works() as work:
        key = await bench.publish(Resize())
        await ended(work, Kind.RETRY)
        waits = await bench.record(key)
        await bench.passes(2)
        await ended(work, Kind.BURY)

    assert (waits.state, waits.error) == ("retrying", "LookupError: no such image")
    assert bench.store.life() == [("running", 0, 1), ("retrying", 1, 2), ("running", 1, 2), ("failed", 1, 2)]
    record = await bench.record(key)
    assert (record.error, record.reason) == (
        "LookupError: no such image",
        "LookupError: no such image (attempt 2 of 2)",
    )


async def test_a_failure_is_told_only_once_the_dead_letters_have_the_job() -> None:
    """Its redelivery to another worker would be acknowledged, and the job lost."""
    bench = Bench()

    @bench.handler
    async def paint(job: Paint) -> Outcome:
        bench.contents.refuse()
        raise Bury("no paint")

    async with bench.works() as work:
        await bench.publish(Paint())
        await until(lambda: work.consumer.unsettled == 1)
        assert bench.store.life() == [("running", 0, 1)]

        bench.contents.accept()
        while work.consumer.unsettled:
            await bench.passes(1)
        await ended(work, Kind.BURY)

    assert bench.store.life() == [("running", 0, 1), ("failed", 0, 1)]


async def test_a_snoozed_job_is_delayed() -> None:
    """It would look as if it ran for hours."""
    bench = Bench()

    @bench.handler
    async def paint(job: Paint, attempt: Attempt) -> Snooze | None:
        return Snooze(60) if attempt.envelope.passes == 0 else None

    async with bench.works() as work:
        key = await bench.publish(Paint())
        await ended(work, Kind.SNOOZE)
        assert (await bench.record(key)).state == "delayed"
        await bench.passes(60)
        await ended(work, Kind.DONE)

    assert bench.store.life() == [("running", 0, 1), ("delayed", 1, 1), ("running", 1, 1), ("done", 1, 1)]


async def test_a_value_that_is_no_result_buries_the_job_at_once() -> None:
    """Its waiter would fail instead, far from the handler, or the handler's fault would be retried for hours."""
    bench = Bench(middleware=[Retries()])

    @bench.handler
    async def resize(job: Resize) -> Any:
        return Thumbnail("wide")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    async with bench.works() as work:
        key = await bench.publish(Resize())
        await ended(work, Kind.BURY)

    record = await bench.record(key)
    assert (record.state, record.reason) == (
        "failed",
        "the result isn't Thumbnail: Expected `int`, got `str` - at `$.width`",
    )
    assert bench.contents.state(bench.clock).dead == 1


async def test_a_handler_that_forgets_its_result_buries_the_job() -> None:
    """Its waiter would get None for a Thumbnail."""
    bench = Bench()

    @bench.handler
    async def resize(job: Resize) -> Any:
        return None

    async with bench.works() as work:
        key = await bench.publish(Resize())
        await ended(work, Kind.BURY)

    assert (await bench.record(key)).reason == "the result isn't Thumbnail: Expected `object`, got `null`"


async def test_a_value_that_cannot_be_encoded_buries_the_job() -> None:
    """The task of the job would die of it, and the worker would hold the delivery for ever."""
    bench = Bench()

    @bench.handler
    async def resize(job: Resize) -> Any:
        return threading.Lock()

    async with bench.works() as work:
        key = await bench.publish(Resize())
        await ended(work, Kind.BURY)

    assert (await bench.record(key)).reason.startswith("the result, of the type lock, can't be encoded: TypeError")


async def test_a_hook_that_would_end_the_process_buries_its_job() -> None:
    """One value would stop the worker, and each worker that gets the job after it."""

    def exits(value: object) -> object:
        raise SystemExit

    class Lock(Job[Any], name="image.lock", queue=images, keep=Keep(), enc_hook=exits):
        pass

    bench = Bench()

    @bench.handler
    async def lock(job: Lock) -> Any:
        return threading.Lock()

    async with bench.works() as work:
        key = await bench.publish(Lock())
        await ended(work, Kind.BURY)

    assert (await bench.record(key)).reason == "SystemExit"


async def test_a_cancellation_that_a_handler_leaves_behind_hits_no_result() -> None:
    """The result would be lost, and the job would run again."""
    bench = Bench()

    @bench.handler
    async def resize(job: Resize) -> Thumbnail:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return Thumbnail(64)

    async with bench.works() as work:
        key = await bench.publish(Resize())
        await ended(work, Kind.DONE)

    assert (await bench.record(key)).result == b'{"width":64}'


async def test_a_cancellation_after_the_handler_leaves_no_job_unsettled() -> None:
    """A timer that a handler left behind would hit the wait for the store: the job would be done, and held for ever."""
    bench = Bench()
    tasks: list[asyncio.Task[Any]] = []

    @bench.handler
    async def resize(_: Resize) -> Thumbnail:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        return Thumbnail(80)

    async with bench.works() as work:
        bench.store.goes_on.clear()
        key = await bench.publish(Resize())
        await until(lambda: bool(tasks))
        for _ in range(2):
            await turns()
            tasks[0].cancel()
        await turns()
        bench.store.goes_on.set()
        await ended(work, Kind.DONE)

    assert (await bench.record(key)).state == "done"


async def test_a_result_that_is_too_large_is_left_out() -> None:
    """One handler would fill the store; or its job, which is done, would fail."""

    class Big(Job[str], name="image.big", queue=images, keep=Keep(max_bytes=10)):
        pass

    bench = Bench()

    @bench.handler
    async def big(job: Big) -> str:
        return "x" * 9

    async with bench.works() as work:
        key = await bench.publish(Big())
        await ended(work, Kind.DONE)

    record = await bench.record(key)
    assert (record.state, record.result) == ("done", None)
    assert record.reason == "the result has 11 bytes, and Keep(max_bytes=10) keeps none above that"


async def test_results_travel_in_the_encoding_of_the_app_and_through_the_middleware() -> None:
    """Middleware that measures or signs results would see nothing."""
    seen: list[Outcome] = []

    async def watches(attempt: Attempt, proceed: Any) -> Outcome:
        seen.append(await proceed(attempt))
        return Done(Thumbnail(7))

    bench = Bench(middleware=[watches], settings=Settings(encoding="msgpack"))

    @bench.handler
    def resize(job: Resize) -> Thumbnail:
        return Thumbnail(64)

    async with bench.works() as work:
        key = await bench.publish(Resize())
        await ended(work, Kind.DONE)

    assert seen == [Done(Thumbnail(64))]
    record = await bench.record(key)
    assert (record.content_type, msgspec.msgpack.decode(record.result or b"")) == ("application/msgpack", {"width": 7})


async def test_an_expired_job_is_expired_in_the_store() -> None:
    """Its waiter would wait for a job that is gone."""
    bench = Bench()

    @bench.handler
    async def paint(job: Paint) -> None: ...

    async with bench.works() as work:
        key = await bench.publish(Paint(), expires_at_ms=1)
        await ended(work, Kind.EXPIRED_ON_ARRIVAL)

    assert (await bench.record(key)).state == "expired"


async def test_jobs_that_never_ran_fail_in_the_store() -> None:
    """Their waiters would wait until their patience ends."""
    bench = Bench(settings=Settings(unknown_grace_s=0.001, crash_limit=2))

    @bench.handler
    async def paint(job: Paint) -> None: ...

    async with bench.works() as work:
        wrong = await bench.publish(Paint(), "wrong", body=b"[")
        strange = await bench.publish(Paint(), "strange", job="image.unknown", unknown_since_ms=1)
        await ended(work, Kind.UNDECODABLE)
        await ended(work, Kind.UNKNOWN)

    assert (await bench.record(wrong)).reason.startswith("the body can't be decoded as Paint")
    assert (await bench.record(strange)).reason.startswith("this worker has no handler for the job 'image.unknown'")
    assert bench.store.life("strange") == [("failed", 0, 1)]


async def test_a_delivery_of_a_job_that_has_ended_is_settled_without_a_run() -> None:
    """A worker that dies between the store and its acknowledgement would cost a second run."""
    bench, runs = Bench(), list[Paint]()

    @bench.handler
    async def paint(job: Paint) -> None:
        runs.append(job)

    async with bench.works() as work:
        await bench.publish(Paint())
        await ended(work, Kind.DONE)
        await bench.publish(Paint(), crashes=1)  # as it comes again if a worker died before the acknowledgement
        await ended(work, Kind.REMEMBERED)
        await bench.publish(Paint(), passes=1)  # a replay from the dead letters
        await ended(work, Kind.DONE, 2)

    assert len(runs) == 2


async def test_a_dead_letter_that_somebody_moves_back_by_hand_runs() -> None:
    """RabbitMQ's own tools move a message as it is: taken for a copy of the failed run, it would be acknowledged and lost."""
    bench, runs = Bench(), list[Paint]()

    @bench.handler
    async def paint(job: Paint) -> None:
        runs.append(job)
        if len(runs) == 1:
            raise Bury("no paint")

    async with bench.works() as work:
        await bench.publish(Paint())
        await ended(work, Kind.BURY)
        await bench.publish(Paint())
        await ended(work, Kind.DONE)

    assert len(runs) == 2


async def test_the_latest_progress_is_written_twice_a_second() -> None:
    """A handler that reports each line of a file would flood the store."""
    bench, blocks = Bench(), Blocks()

    @bench.handler
    async def paint(job: Paint, attempt: Attempt) -> None:
        await blocks(attempt)

    async with bench.works() as work:
        key = await bench.publish(Paint())
        await blocks.begun.wait()
        assert blocks.attempt is not None
        for each in range(100):
            blocks.attempt.progress(each / 100, f"{each} of 100")
        await turns()
        assert (await bench.record(key)).progress is None
        await bench.passes(0.5)
        half = await bench.record(key)
        blocks.attempt.progress(2, "all\nof them")
        blocks.goes_on.set()
        await ended(work, Kind.DONE)

    assert (half.progress, half.note) == (0.99, "99 of 100")
    record = await bench.record(key)
    assert (record.state, record.progress, record.note) == ("done", 1.0, "all of them")
    assert sum(isinstance(each, Progress) for each in bench.store.heard) == 2


async def test_progress_comes_from_threads_too() -> None:
    """A `def` handler could say nothing."""
    bench, said, goes_on = Bench(), threading.Event(), threading.Event()

    @bench.handler
    def paint(job: Paint, attempt: Attempt) -> None:
        attempt.progress(0.5, "half")
        said.set()
        goes_on.wait(20)

    async with bench.works() as work:
        key = await bench.publish(Paint())
        await until(said.is_set)
        await bench.passes(0.5)
        record = await bench.record(key)
        goes_on.set()
        await ended(work, Kind.DONE)

    assert (record.progress, record.note) == (0.5, "half")


@pytest.mark.parametrize(("fraction", "error"), [("0.4", TypeError), (True, TypeError), (float("nan"), ValueError)])
async def test_a_progress_that_is_no_number_is_refused(fraction: Any, error: type[Exception]) -> None:
    """The store would refuse it later, where nobody sees it."""
    bench, raised = Bench(), list[BaseException]()

    @bench.handler
    async def plain(job: Plain, attempt: Attempt) -> None:
        try:
            attempt.progress(fraction)
        except (TypeError, ValueError) as wrong:
            raised.append(wrong)

    async with bench.works() as work:
        await bench.publish(Plain(), publish=0)
        await ended(work, Kind.DONE)

    assert [type(one) for one in raised] == [error]


async def test_jobs_go_on_while_the_store_is_down_and_their_ends_are_told_later() -> None:
    """A store that is restarted would stop the jobs, or lose their results."""
    bench, runs = Bench(), list[Resize]()

    @bench.handler
    async def resize(job: Resize) -> Thumbnail:
        runs.append(job)
        return Thumbnail(64)

    async with bench.works() as work:
        bench.store.records.refuse()
        keys = [await bench.publish(Resize(), f"id-{n}", publish=n + 1) for n in range(20)]
        await ended(work, Kind.DONE, 20)
        assert bench.contents.state(bench.clock).unsettled == 0

        bench.store.records.accept()
        await bench.passes(2)

    assert {(await bench.record(key)).state for key in keys} == {"done"}


async def test_a_required_result_holds_its_job_until_the_store_has_it() -> None:
    """A job whose result must not be lost would be acknowledged without it."""

    class Bill(Job[int], name="image.bill", queue=images, keep=Keep(required=True)):
        pass

    bench = Bench()

    @bench.handler
    async def bill(job: Bill) -> int:
        return 5

    async with bench.works() as work:
        bench.store.records.refuse()
        key = await bench.publish(Bill())
        for _ in range(60):
            await bench.passes(1)
        assert bench.contents.state(bench.clock).unsettled == 1

        bench.store.records.accept()
        await bench.passes(2)
        await ended(work, Kind.DONE)

    assert (await bench.record(key)).result == b"5"
    assert bench.contents.state(bench.clock).unsettled == 0


async def test_a_stop_leaves_a_job_whose_required_result_is_nowhere_to_the_broker() -> None:
    """The job would be lost with its result, or the worker would never end."""

    class Bill(Job[int], name="image.bill", queue=images, keep=Keep(required=True)):
        pass

    bench = Bench()

    @bench.handler
    async def bill(job: Bill) -> int:
        return 5

    runtime = Runtime(app="bench", clock=bench.clock)
    async with working(bench, runtime=runtime, grace_s=0) as work:
        bench.store.records.refuse()
        await bench.publish(Bill())
        await until(lambda: work.consumer.busy == 1 and work.consumer.running == 0)

    assert not work.drained
    assert bench.contents.state(bench.clock).ready == 1


async def test_the_body_is_kept_where_the_class_says_so() -> None:
    """Records would hold what nobody wants to keep twice, or not what somebody asked for."""

    class Copy(Job, name="image.copy", queue=images, keep=Keep(body=True)):
        pass

    bench = Bench()

    @bench.handler
    async def copy(job: Copy) -> None: ...
    @bench.handler
    async def paint(job: Paint) -> None: ...

    async with bench.works() as work:
        copied, painted = await bench.publish(Copy(), "copy"), await bench.publish(Paint(), "paint")
        await ended(work, Kind.DONE, 2)

    assert ((await bench.record(copied)).body, (await bench.record(painted)).body) == (b"{}", None)


async def test_a_class_without_keep_costs_nothing() -> None:
    """Every job of every service would pay for the results of a few."""
    bench, runs = Bench(), list[Plain]()

    @bench.handler
    async def plain(job: Plain) -> None:
        runs.append(job)

    async with bench.works() as work:
        await bench.publish(Plain(), publish=0)
        await bench.publish(Plain(), publish=9)  # of a publisher whose class has `keep`
        await ended(work, Kind.DONE, 2)
        assert bench.stores_opened == 0

    @bench.handler
    async def paint(job: Paint) -> None: ...

    async with bench.works() as work:
        await bench.publish(Plain(), publish=0)
        await bench.publish(Plain(), publish=9)
        await ended(work, Kind.DONE, 2)
        await bench.passes(10)

    assert len(runs) == 4
    assert (bench.store.begins, bench.store.heard) == (0, [])


def test_a_worker_without_kept_classes_imports_nothing_of_results() -> None:
    """Each worker of a service without results would pay for the code."""
    program = """
import asyncio, sys
from leveret import App, Job, Queue
from leveret.consuming.worker import working

class Plain(Job, name="plain", queue=Queue("plain")):
    pass

app = App("plain", broker="memory://")
@app.handler
async def plain(job: Plain) -> None: ...

async def main():
    async with app.publisher() as publisher, working(app) as work:
        await publisher.publish(Plain())
        while not work.consumer.counts:
            await asyncio.sleep(0.001)

asyncio.run(main())
print([name for name in sys.modules if "leveret.results" in name or name in
       ("leveret.store", "leveret.consuming.recording", "leveret.brokers.memory.jobs")])
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)

    assert done.stdout.strip() == "[]"


async def test_a_kept_class_without_a_store_is_refused_at_the_start() -> None:
    """Its waiters would wait for results that nobody keeps."""

    class Nowhere(Bench):
        def open_store(self, runtime: Runtime) -> Store | None:
            return None

    bench = Nowhere()

    @bench.handler
    async def paint(job: Paint) -> None: ...

    with pytest.raises(ConfigurationError, match=r"paint: Paint has keep=, but nothing keeps the results of jobs"):
        async with bench.works():
            pass


async def test_a_store_that_refuses_the_worker_is_known_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker would run for days without its store."""
    bench, entered = Bench(), list[str]()

    @bench.handler
    async def paint(job: Paint) -> None: ...

    async def refuses(_: str) -> None:
        msg = "the store tests://store refuses the password"
        raise ConfigurationError(msg)

    @asynccontextmanager
    async def lifespan() -> AsyncGenerator[None]:
        entered.append("lifespan")
        yield

    monkeypatch.setattr(bench.store, "newest", refuses, raising=False)
    with pytest.raises(ConfigurationError, match="refuses the password"):
        async with working(bench, lifespan=lifespan):
            pass
    assert not entered
    assert bench.store.closed
