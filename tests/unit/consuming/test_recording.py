"""What a job store hears of a worker's jobs, and what it decides."""

import asyncio
import random
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Hashable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Never, NoReturn, Protocol, TypeVar, cast

import msgspec
import pytest
from typing_extensions import TypeAliasType

from leveret import Attempt, Bury, Done, Job, Keep, Outcome, Retry, Settings, Snooze
from leveret.broker import Delivery
from leveret.consuming.recording import Recording
from leveret.consuming.settlement import Settlement
from leveret.consuming.worker import working
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable, ConfigurationError
from leveret.middleware import Retries, Rule
from leveret.outcome import Aborted, Ending, Expired, Kind
from leveret.results.recorder import Recorder
from leveret.runtime import Runtime
from leveret.store import Change, Key, Progress, State, Store
from tests.unit import runs

from .kept import Bench, Blocks, Paint, Plain, Resize, Thumbnail, ended, images, queued, turns, until


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


async def test_an_aborted_job_never_starts() -> None:
    """An abort that was confirmed would have no effect."""
    bench, runs = Bench(), list[Paint]()

    @bench.handler
    async def paint(job: Paint) -> None:
        runs.append(job)

    key = await bench.publish(Paint())
    await bench.store.write([queued(key)])
    assert await bench.store.abort(key) == "aborted"
    async with bench.works() as work:
        await ended(work, Kind.ABORTED)

    assert not runs
    assert (await bench.record(key)).state == "aborted"
    assert bench.contents.state(bench.clock).unsettled == 0


async def test_an_abort_hits_no_other_publish_of_the_same_id() -> None:
    """A job that was published again after the abort would never run."""
    bench, runs = Bench(), list[int]()

    @bench.handler
    async def paint(job: Paint, attempt: Attempt) -> None:
        runs.append(attempt.envelope.publish)

    aborted, other = await bench.publish(Paint(), publish=1), await bench.publish(Paint(), publish=2)
    await bench.store.write([queued(aborted)])
    await bench.store.abort(aborted)
    async with bench.works() as work:
        await ended(work, Kind.ABORTED)
        await ended(work, Kind.DONE)

    assert runs == [2]
    assert (await bench.record(other)).state == "done"


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


async def test_a_running_job_is_cancelled_and_not_retried() -> None:
    """An abort would wait for the job's end, or come to nothing with the next attempt."""
    bench, blocks = Bench(middleware=[Retries(Rule(Exception, immediate=3))]), Blocks()

    @bench.handler
    async def paint(job: Paint, attempt: Attempt) -> None:
        await blocks(attempt)

    async with bench.works() as work:
        key = await bench.publish(Paint())
        await blocks.begun.wait()
        assert await bench.store.abort(key) == "asked"
        await bench.passes(0.5)  # workers hear within a second
        await ended(work, Kind.ABORTED)

    assert (blocks.runs, blocks.ends) == (1, ["finally"])
    record = await bench.record(key)
    assert (record.state, record.asked) == ("aborted", False)
    assert bench.contents.state(bench.clock).dead == 0


async def test_a_failure_of_the_clean_up_after_an_abort_is_the_end_of_the_job() -> None:
    """A job that somebody aborted would be retried, in place or later."""
    bench, blocks = Bench(middleware=[Retries(Rule(Exception, immediate=3))]), Blocks()

    @bench.handler
    async def paint(job: Paint, attempt: Attempt) -> None:
        try:
            await blocks(attempt)
        except asyncio.CancelledError:
            msg = "the brush is gone"
            raise RuntimeError(msg) from None

    async with bench.works() as work:
        key = await bench.publish(Paint())
        await blocks.begun.wait()
        await bench.store.abort(key)
        await bench.passes(0.5)
        while not work.consumer.counts:  # the pause before a try in place
            await bench.passes(0.05)
        await ended(work, Kind.ABORTED)

    assert blocks.runs == 1
    assert (await bench.record(key)).state == "aborted"


async def test_a_def_sees_that_it_is_to_end() -> None:
    """A thread can't be cancelled: it would run on for hours."""
    bench, begun, aborting = Bench(), threading.Event(), threading.Event()

    @bench.handler
    def paint(job: Paint, attempt: Attempt) -> None:
        begun.set()
        while not attempt.aborting:
            aborting.wait(0.001)
        msg = "stopped half-way"
        raise RuntimeError(msg)

    async with bench.works() as work:
        key = await bench.publish(Paint())
        await until(begun.is_set)
        await bench.store.abort(key)
        await bench.passes(0.5)
        await ended(work, Kind.ABORTED)

    assert (await bench.record(key)).state == "aborted"


async def test_a_job_that_runs_to_its_end_is_done_whoever_aborts_it() -> None:
    """The store would say "aborted" of a job whose effect is there."""
    bench, blocks, after = Bench(), Blocks(), asyncio.Event()

    async def lingers(attempt: Attempt, proceed: Any) -> Outcome:
        said: Outcome = await proceed(attempt)
        await after.wait()
        return said

    @bench.handler(middleware=[lingers])
    async def paint(job: Paint, attempt: Attempt) -> None:
        await blocks(attempt)

    async with bench.works() as work:
        key = await bench.publish(Paint())
        await blocks.begun.wait()
        blocks.goes_on.set()
        await turns()
        assert await bench.store.abort(key) == "asked"
        await bench.passes(0.5)
        after.set()
        await ended(work, Kind.DONE)

    assert blocks.ends == ["to its end", "finally"]
    record = await bench.record(key)
    assert (record.state, record.asked) == ("done", False)


async def test_a_job_whose_middleware_waits_is_cancelled_before_its_handler() -> None:
    """A lock that is held for hours would hold up the abort."""
    bench, waits, runs = Bench(), asyncio.Event(), list[Paint]()

    async def locks(attempt: Attempt, proceed: Any) -> Outcome:
        waits.set()
        await asyncio.Event().wait()
        return await proceed(attempt)

    @bench.handler(middleware=[locks])
    def paint(job: Paint) -> None:
        runs.append(job)

    async with bench.works() as work:
        key = await bench.publish(Paint())
        await waits.wait()
        await bench.store.abort(key)
        await bench.passes(0.5)
        await ended(work, Kind.ABORTED)

    assert not runs


async def test_an_abort_that_meets_starts_ends_and_retries_leaves_one_truth() -> None:
    """The store would say "aborted" of a job that ran to its end, or "done" of one that was cut short."""
    bench, rng, finished, answers = Bench(), random.Random(22), set[Key](), dict[Key, str]()

    @bench.handler
    async def paint(job: Paint, attempt: Attempt) -> None:
        await bench.clock.sleep(rng.uniform(0, 2))
        if attempt.number == 1 and rng.random() < 0.3:
            raise Retry(rng.uniform(0, 1))
        finished.add(Key(attempt.job_id, attempt.envelope.publish))

    async def aborts(key: Key) -> None:
        await bench.clock.sleep(rng.uniform(0, 4))
        answers[key] = await bench.store.abort(key)

    async with bench.works() as work, asyncio.TaskGroup() as tasks:
        keys = [Key(f"id-{n}", publish) for n in range(100) for publish in (1, 2)]  # each id twice
        for key in keys:
            await bench.publish(Paint(), key.job_id, publish=key.publish)
        await bench.store.write([queued(key) for key in keys])
        for key in keys:
            if rng.random() < 0.7:
                tasks.create_task(aborts(key))
        while work.consumer.counts[Kind.DONE] + work.consumer.counts[Kind.ABORTED] < len(keys) or work.consumer.busy:
            await bench.passes(0.05)

    states = {key: (await bench.record(key)).state for key in keys}
    assert set(states.values()) == {"done", "aborted"}
    assert {key for key, state in states.items() if state == "done"} == finished
    assert {states[key] for key, answer in answers.items() if answer == "aborted"} == {"aborted"}
    assert {states[key] for key, answer in answers.items() if answer == "finished"} == {"done"}
    assert {states[key] for key in keys if key not in answers} == {"done"}
    assert set(answers.values()) == {"aborted", "asked", "finished"}


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


class Beside:
    """A delivery of a broker that shares its transactions with the store; it keeps what each settlement was to enter."""

    consumers = 0
    queue = images

    def __init__(self, *lives: bool, refuses: bool = False) -> None:
        self.envelope = Envelope(job_id="id-1", job="image.resize", queue="images", body=b"{}", publish=7)
        self.changes: Sequence[Change | Progress] = ()
        self.entered: list[tuple[str, Sequence[tuple[State, int, int]]]] = []
        self._lives = [*lives] or [True]
        self._refuses = refuses

    @property
    def live(self) -> bool:
        return self._lives.pop(0) if self._lives[1:] else self._lives[0]

    def done(self) -> None:
        self._settle("done")

    async def again(self, _: Envelope) -> bool:
        return self._settle("again")

    async def bury(self, _: Envelope) -> bool:
        if self._refuses:
            raise BrokerUnavailable("its dead letters are full")
        return self._settle("bury")

    def _settle(self, how: str) -> bool:
        states: list[tuple[State, int, int]] = [
            (each.state, each.passes, each.attempt) for each in self.changes if isinstance(each, Change)
        ]
        self.entered.append((how, states))
        return True


async def settle(delivery: Beside, ending: Ending, *, stops: bool = False) -> list[Change | Progress]:
    """End a run of a worker that shares; return what its recorder was told."""
    bench, told = Bench(), Heard()

    @bench.handler
    async def resize(job: Resize) -> Thumbnail:
        return Thumbnail(64)

    runtime = runs.runtime()
    recording = Recording(cast("Recorder", told), bench.handlers(), runtime, shared=True)
    settlement = Settlement([], runtime, recording=recording)
    if stops:
        settlement.replacing.stop()
    settled, attempt = cast("Delivery", cast("Any", delivery)), runs.attempt()
    ending = await recording.end(settled, attempt, ending)
    rest = settlement.end(settled, attempt, ending, None)
    if rest is not None:
        await rest
    return told.notes


class Heard:
    """A recorder that only listens."""

    def __init__(self) -> None:
        self.notes: list[Change | Progress] = []

    def note(self, what: Change | Progress) -> None:
        self.notes.append(what)

    async def end(self, change: Change, *, required: bool = False) -> bool:
        self.notes.append(change)
        return not required


@pytest.mark.parametrize(
    ("ending", "how", "state"),
    [
        (Done(Thumbnail(64)), "done", ("done", 0, 1)),
        (Done("no thumbnail"), "bury", ("failed", 0, 1)),
        (Aborted(), "done", ("aborted", 0, 1)),
        (Expired(False), "done", ("expired", 0, 1)),
        (Expired(True), "bury", ("expired", 0, 1)),
        (Retry(5), "again", ("retrying", 1, 2)),
        (Snooze(5), "again", ("delayed", 1, 1)),
        (Bury("no"), "bury", ("failed", 0, 1)),
    ],
)
async def test_beside_the_brokers_jobs_each_settlement_enters_its_state(
    ending: Ending, how: str, state: tuple[State, int, int]
) -> None:
    """Written apart, a worker that dies between the two leaves a state that isn't so."""
    delivery = Beside()

    notes = await settle(delivery, ending)

    assert (delivery.entered, notes) == ([(how, [state])], [])


async def test_a_burial_that_waits_in_the_broker_enters_nothing() -> None:
    """A job would be "failed" whose letter is nowhere."""
    delivery = Beside(refuses=True)

    notes = await settle(delivery, Bury("no"), stops=True)

    assert (delivery.entered, notes) == ([("again", [])], [])


@pytest.mark.parametrize("lives", [[False], [True, False]], ids=["before", "in the last moment"])
async def test_an_end_whose_lease_was_lost_is_written_by_itself(lives: list[bool]) -> None:
    """This worker acknowledges the redelivery without a run: the job would "run" for ever."""
    delivery = Beside(*lives)

    notes = await settle(delivery, Done(Thumbnail(64)))

    assert delivery.entered == []
    assert [each.state for each in notes if isinstance(each, Change)] == ["done"]


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


def annotated(job: Any, returns: Any) -> Any:
    """Return a handler with an annotation."""

    async def handle(job: Any) -> Any: ...

    handle.__annotations__ = {"job": job, "return": returns} if returns is not ... else {"job": job}
    return handle


class Wide(Thumbnail):
    height: int = 0


class Mean(Job[float | None], name="image.mean", queue=images, keep=Keep()):
    """A job whose result may be None."""


Nothing = TypeAliasType("Nothing", Retry | None)


class Says(Protocol):
    """None is one, to the type checkers."""

    def __str__(self) -> str: ...


class Names(Job[dict[str, list[int]]], name="image.names", queue=images, keep=Keep()):
    """A job with a generic result."""


@pytest.mark.parametrize(
    ("job", "returns"),
    [
        (Resize, Thumbnail),
        (Resize, Wide),
        (Resize, Thumbnail | Retry | Bury),
        (Resize, Done),
        (Resize, Any),
        (Resize, ...),
        (Paint, None),
        (Paint, Outcome | None),
        *((Plain, says) for says in (..., Any, object, None, NoReturn, Never, Retry, Outcome | None, Any | Bury)),
        (Plain, TypeVar("T")),
        (Plain, Nothing),
        (Plain, Says),
        (Plain, Hashable),
        (Mean, int),
        (Mean, None),
        (Mean, float | None),
        (Names, dict[str, list[int]]),
        (Names, dict[str, Any]),
        (Names, dict),
    ],
)
async def test_an_annotation_that_may_be_the_result_passes(job: Any, returns: Any) -> None:
    """A right handler would be refused."""
    bench = Bench()
    bench.handler(annotated(job, returns))
    async with bench.works():
        pass


@pytest.mark.parametrize("job", [Resize, Plain])
async def test_an_annotation_that_cannot_be_resolved_passes(job: Any) -> None:
    """A type that is imported for the checkers only would be refused, though every value of it is right."""
    bench, handle = Bench(), annotated(job, "Nowhere")
    bench.handler(job=job)(handle)
    async with bench.works():
        pass


@pytest.mark.parametrize(
    ("job", "returns", "says"),
    [
        (Resize, int, "returns int, but the result of Resize is Thumbnail; correct one of them"),
        (Resize, None, "returns None, but the result of Resize is Thumbnail"),
        (Resize, Thumbnail | None, "but the result of Resize is Thumbnail"),
        (Wide, Thumbnail, ""),
        (Mean, str, "returns str, but the result of Mean is float | None"),
        (
            Names,
            dict[str, list[str]],
            r"returns dict\[str, list\[str\]\], but the result of Names is dict\[str, list\[int\]\]",
        ),
        (Names, list[int], r"returns list\[int\]"),
        (Paint, Thumbnail, r"Paint has no result; return None or an outcome, or derive Paint from Job\[Thumbnail\]$"),
        (Plain, int, r"returns int, but Plain has no result; .* derive Plain from Job\[int\] with keep=Keep\(\)$"),
        (Plain, int | str | None, r"derive Plain from Job\[int \| str\] with keep=Keep\(\)$"),
        (Plain, list[int], r"derive Plain from Job\[list\[int\]\] with keep=Keep\(\)$"),
        (Plain, Retry | bool, r"returns leveret.outcome.Retry \| bool, but Plain has no result"),
    ],
)
async def test_an_annotation_that_cannot_be_the_result_is_refused_at_the_start(
    job: Any, returns: Any, says: str
) -> None:
    """Every job of that class would be buried, in production."""
    if job is Wide:
        job, says = _Widened, "returns Thumbnail, but the result of _Widened is Wide"
    bench = Bench()
    bench.handler(annotated(job, returns))
    with pytest.raises(ConfigurationError, match=says):
        async with bench.works():
            pass


class _Widened(Job[Wide], name="image.widened", queue=images, keep=Keep()):
    """A job whose result is a subclass."""


async def test_a_result_that_nothing_can_decode_is_refused_at_the_start() -> None:
    """Every job of that class would be buried, in production."""

    class Locks(Job[threading.Event | threading.Barrier], name="image.locks", queue=images, keep=Keep()):
        pass

    bench = Bench()

    @bench.handler
    async def locks(job: Locks) -> threading.Event:
        return threading.Event()

    with pytest.raises(
        ConfigurationError, match=r"the result of Locks, .* can't be decoded: Type unions may not contain"
    ):
        async with bench.works():
            pass
