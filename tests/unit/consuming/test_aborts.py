"""Jobs that somebody aborts, before they run and while they do."""

import asyncio
import random
import threading
from typing import Any

from leveret import Attempt, Outcome, Retry
from leveret.middleware import Retries, Rule
from leveret.outcome import Kind
from leveret.store import Key

from .kept import Bench, Blocks, Paint, ended, queued, turns, until


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
