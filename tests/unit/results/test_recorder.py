"""The recorder: what it writes, how long a job waits for it, and what it keeps while the store is down."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from leveret.clock import ManualClock
from leveret.errors import ConfigurationError
from leveret.results import recorder as module
from leveret.results.recorder import MOST_KEPT, MOST_KEPT_BYTES, Recorder
from leveret.runtime import Runtime
from leveret.store import Change, Progress, State, Store

from .stores import Answering, at_once, down


def change(job_id: str, state: State = "done", *, passes: int = 0, **fields: Any) -> Change:
    """Return a change of a job."""
    told = {"job_id": job_id, "publish": 7, "queue": "images", "job": "image.resize", "passes": passes, "attempt": 1}
    return Change(**{**told, "state": state, "keep_s": 60.0, "at_ms": 1, **fields})


class BusyClock(ManualClock):
    """A clock of a loop that may be busy."""

    def take(self, seconds: float) -> None:
        """Let one turn of the loop take so long: its timers fire late, each once."""
        self._elapsed += seconds
        self.advance(0)


class Recording:
    """A recorder with its store and its clock."""

    def __init__(self) -> None:
        self.store = Answering()
        self.clock = BusyClock()
        self.recorder = Recorder(cast("Store", self.store), Runtime(app="tests", clock=self.clock))

    async def passes(self, seconds: float) -> None:
        """Let time pass, and what it wakes run."""
        await turns()
        self.clock.advance(seconds)
        await turns()


async def turns() -> None:
    """Let everything run that doesn't wait for the clock or the store."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def recording() -> AsyncGenerator[Recording]:
    """A recorder whose tasks end with the test."""
    recording = Recording()
    yield recording
    recording.store.answer = at_once
    recording.store.goes_on.set()
    await recording.recorder.close()


async def test_what_comes_in_one_turn_is_one_call(recording: Recording) -> None:
    """A store would take a transaction for each state of each job."""
    for number in range(100):
        recording.recorder.note(change(f"id-{number}", "queued"))
    starts = [asyncio.ensure_future(recording.recorder.begin(change(f"id-{n}", "running"))) for n in range(50)]
    recording.store.verdicts["id-7"] = "aborted"
    await asyncio.gather(*starts)
    await recording.recorder.flush()

    assert [len(batch) for batch in recording.store.writes] == [100]
    assert [len(batch) for batch in recording.store.begins] == [50]
    assert recording.store.written[:2] == [("id-0", "queued"), ("id-1", "queued")]
    assert [start.result() for start in starts[6:9]] == ["go", "aborted", "go"]


async def test_an_end_waits_for_the_store(recording: Recording) -> None:
    """The job would be acknowledged before its result is anywhere."""
    recording.store.answer = recording.store.hangs
    end = asyncio.ensure_future(recording.recorder.end(change("id-1")))
    await turns()
    assert not end.done()

    recording.store.goes_on.set()

    assert await end
    assert recording.store.written == [("id-1", "done")]


async def test_what_comes_as_a_write_ends_is_written(recording: Recording) -> None:
    """A job would be held unacknowledged, with its result nowhere, until another one has something to write."""
    async with asyncio.timeout(20):
        for number in range(3):
            assert await recording.recorder.end(change(f"id-{number}"))
        recording.recorder.note(change("id-3"))
        await recording.recorder.caught_up()
        recording.recorder.note(change("id-4"))
        await recording.recorder.close()

    assert [job for job, _ in recording.store.written] == [f"id-{number}" for number in range(5)]


async def test_no_job_waits_longer_than_two_seconds_for_a_store_that_hangs(recording: Recording) -> None:
    """A frozen store would stop the jobs."""
    recording.store.answer = recording.store.hangs
    begins = asyncio.ensure_future(recording.recorder.begin(change("id-1", "running")))
    ends = asyncio.ensure_future(recording.recorder.end(change("id-2")))
    await recording.passes(1.9)
    assert not begins.done()
    assert not ends.done()

    later = asyncio.ensure_future(recording.recorder.begin(change("id-3", "running")))
    await recording.passes(0.1)

    assert (await begins, await ends, await later) == ("go", False, "go")
    assert recording.recorder.unasked == 2


async def test_a_store_that_is_down_is_neither_asked_nor_waited_for(recording: Recording) -> None:
    """Each job would wait for it anew."""
    recording.store.answer = down
    assert await recording.recorder.begin(change("id-1", "running")) == "go"
    recording.store.answer = recording.store.hangs

    assert await recording.recorder.begin(change("id-2", "running")) == "go"
    assert not await recording.recorder.end(change("id-2"))
    assert recording.store.begins == []


async def test_what_a_store_missed_is_written_when_it_is_back(recording: Recording) -> None:
    """Results of jobs that ended meanwhile would be gone for good."""
    recording.store.answer = down
    assert not await recording.recorder.end(change("id-1"))
    assert not await recording.recorder.end(change("id-2", "aborted"))
    assert not recording.recorder.well

    recording.store.answer = at_once
    await recording.passes(2)

    assert sorted(recording.store.written) == [("id-1", "done"), ("id-2", "aborted")]
    assert (recording.recorder.well, recording.recorder.kept, recording.recorder.dropped) == (True, 0, 0)
    assert await recording.recorder.begin(change("id-3", "running")) == "go"
    assert len(recording.store.begins) == 1


async def test_only_the_last_change_of_each_publish_is_kept(recording: Recording) -> None:
    """Memory would hold a whole life for each job, and be full three times as soon."""
    recording.store.answer = down
    await recording.recorder.end(change("id-0"))
    states: list[State] = ["queued", "running", "done", "running"]
    for state in states:
        recording.recorder.note(change("id-1", state))
    recording.recorder.note(change("id-1", "retrying", passes=1))
    assert recording.recorder.kept == 2

    recording.store.answer = at_once
    await recording.passes(2)

    assert sorted(recording.store.written) == [("id-0", "done"), ("id-1", "retrying")]


async def test_a_required_end_waits_until_the_store_has_it(recording: Recording) -> None:
    """A job whose result must not be lost would be acknowledged without it."""
    recording.store.answer = down
    end = asyncio.ensure_future(recording.recorder.end(change("id-1"), required=True))
    await recording.passes(60)
    assert not end.done()

    recording.store.answer = at_once
    await recording.passes(2)

    assert await end
    assert recording.store.written == [("id-1", "done")]


async def test_a_slow_store_is_written_to_and_not_waited_for(recording: Recording) -> None:
    """A store that takes two seconds an answer would hold up every job by four."""
    recording.store.answer = recording.store.hangs
    first = asyncio.ensure_future(recording.recorder.end(change("id-1")))
    await recording.passes(1.5)
    recording.store.goes_on.set()
    assert await first  # it came in time
    assert not recording.recorder.well

    assert not await recording.recorder.end(change("id-2"))
    await turns()

    assert recording.store.written == [("id-1", "done"), ("id-2", "done")]
    assert recording.recorder.well  # the second answer was quick


async def test_memory_is_bounded_and_what_is_dropped_is_counted(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker would run out of memory while its store is down, or lose results without a word."""
    monkeypatch.setattr(module, "MOST_KEPT", 10)
    recording.store.answer = down
    await recording.recorder.end(change("first"))
    for number in range(20):
        recording.recorder.note(change(f"waits-{number}", "queued"))
    assert (recording.recorder.kept, recording.recorder.dropped) == (5, 16)

    for number in range(20):
        await recording.recorder.end(change(f"ends-{number}"))

    assert (recording.recorder.kept, recording.recorder.dropped) == (10, 31)
    assert (MOST_KEPT, MOST_KEPT_BYTES) == (10_000, 16 << 20)


async def test_a_result_that_does_not_fit_leaves_the_state(recording: Recording) -> None:
    """A waiter of a job that is done would wait for ever."""
    recording.store.answer = down
    for number in range(17):
        await recording.recorder.end(change(f"id-{number}", result=bytes(1 << 20), content_type="application/json"))
    recording.store.answer = at_once
    await recording.passes(2)
    await recording.recorder.flush()

    written = [each for batch in recording.store.writes for each in batch if isinstance(each, Change)]
    with_result = [each for each in written if each.result is not None]
    without = [each for each in written if each.result is None]
    assert len(with_result) == 15
    assert {each.reason for each in without} == {
        "the job store was down, and the result didn't fit into the worker's memory until it was back"
    }
    assert len(without) == 2
    assert recording.recorder.dropped == 0


async def test_a_change_that_the_store_refuses_costs_no_other(
    recording: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    """One bad value would end the records of all jobs for ever."""
    recording.store.refused.add("id-1")
    ends = [asyncio.ensure_future(recording.recorder.end(change(f"id-{n}"))) for n in range(3)]

    assert await asyncio.gather(*ends) == [True, False, True]
    assert recording.store.written == [("id-0", "done"), ("id-2", "done")]
    assert (recording.recorder.well, recording.recorder.dropped) == (True, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "the job store tests://store refused a change of job id-1, which is dropped: ValueError: a store's fault"
    ]


async def test_a_start_that_the_store_refuses_costs_no_other_verdict(
    recording: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    """One bad id would let aborted jobs run, and the store look down."""
    recording.store.refused.add("id-1")
    recording.store.verdicts["id-2"] = "aborted"
    starts = [asyncio.ensure_future(recording.recorder.begin(change(f"id-{n}", "running"))) for n in range(3)]

    assert await asyncio.gather(*starts) == ["go", "go", "aborted"]
    assert (recording.recorder.well, recording.recorder.kept, recording.recorder.dropped) == (True, 0, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "the job store tests://store refused the start of job id-1, which runs without it: ValueError: a store's fault"
    ]


async def test_a_refused_change_beside_a_frozen_store_holds_up_no_job(recording: Recording) -> None:
    """Each of its batch would wait until its own turn had failed: minutes."""

    async def refuses_and_freezes() -> None:
        if recording.store.calls > 1:
            await recording.store.goes_on.wait()

    recording.store.answer = refuses_and_freezes
    recording.store.refused.add("id-0")
    ends = [asyncio.ensure_future(recording.recorder.end(change(f"id-{n}"))) for n in range(3)]
    await recording.passes(2)

    assert [end.done() and end.result() for end in ends] == [False, False, False]
    assert all(end.done() for end in ends)


async def test_a_busy_loop_is_not_taken_for_a_slow_store(recording: Recording) -> None:
    """10 000 publishes at once would cost thousands of them their states, and say in the log that the store is slow."""
    recording.store.answer = recording.store.hangs
    end = asyncio.ensure_future(recording.recorder.end(change("id-1")))
    begin = asyncio.ensure_future(recording.recorder.begin(change("id-2", "running")))
    await turns()
    for _ in range(6):
        recording.clock.take(1.0)
        await turns()
    recording.store.goes_on.set()

    assert (await end, await begin) == (True, "go")
    assert (recording.recorder.well, recording.recorder.unasked) == (True, 0)


async def test_progress_is_dropped_while_the_store_is_down(recording: Recording) -> None:
    """Progress that nobody can see would take the memory of results."""
    recording.store.answer = down
    await recording.recorder.end(change("id-1"))
    recording.recorder.note(Progress(job_id="id-2", publish=7, passes=0, attempt=1, fraction=0.5, note=""))

    assert recording.recorder.kept == 1


async def test_the_log_says_once_a_minute_that_the_store_is_down(
    recording: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    """A log full of one sentence hides all others; an empty one hides the fault."""
    caplog.set_level(logging.INFO)
    recording.store.answer = down
    await recording.recorder.end(change("id-1"))
    for _ in range(59):
        await recording.passes(1)
    said = "the job store tests://store doesn't answer as it should, so jobs don't wait for it: nobody listens at tests://store; "
    assert [record.getMessage() for record in caplog.records] == [f"{said}changes that wait in memory: 1, dropped: 0"]

    for _ in range(4):
        await recording.passes(1)
    assert len(caplog.records) == 2

    recording.store.answer = at_once
    await recording.passes(2)
    assert "answers again after 6" in caplog.records[-1].getMessage()


async def test_a_store_that_is_slow_now_and_then_fills_no_log(
    recording: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    """Two lines a second say less than one."""
    caplog.set_level(logging.INFO)
    for number in range(10):
        recording.store.answer = down
        await recording.recorder.end(change(f"id-{number}"))
        recording.store.answer = at_once
        await recording.passes(2)

    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_a_close_writes_what_is_left(recording: Recording) -> None:
    """The last states of a process that ends would be lost."""
    recording.recorder.note(change("id-1"))

    await recording.recorder.close()

    assert recording.store.written == [("id-1", "done")]
    assert not await recording.recorder.end(change("id-2"))
    assert await recording.recorder.begin(change("id-3", "running")) == "go"


async def test_a_close_does_not_wait_for_a_store_that_is_down(
    recording: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    """A deploy would wait for the store, or lose what it says of the jobs that it loses."""
    recording.store.answer = down
    await recording.recorder.end(change("id-1"))
    required = asyncio.ensure_future(recording.recorder.end(change("id-2"), required=True))
    await turns()
    calls = recording.store.calls

    await asyncio.wait_for(recording.recorder.close(within_s=60), 30)

    assert recording.store.calls == calls + 1  # one last try
    assert recording.recorder.dropped == 2
    assert not await required
    assert (
        caplog.records[-1].getMessage()
        == "the job store tests://store didn't take the last 2 changes of jobs: nobody listens at tests://store"
    )


async def test_a_close_counts_what_a_frozen_store_was_at(
    recording: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    """The log would say nothing of the states that nobody will ever see."""
    recording.store.answer = recording.store.hangs
    recording.recorder.note(change("id-1"))
    await turns()
    recording.recorder.note(change("id-2"))

    await recording.recorder.close(within_s=0.01)

    assert recording.recorder.dropped == 2
    assert [record.getMessage() for record in caplog.records] == [
        "the job store tests://store didn't take the last 2 changes of jobs: the process ended before its answer"
    ]


async def test_what_waits_outlives_the_end_of_the_program(recording: Recording) -> None:
    """asyncio.run cancels every task when its program ends; a worker that still drains would wait for its store for ever."""
    before = asyncio.all_tasks()
    recording.recorder.note(change("id-1"))
    begins = asyncio.ensure_future(recording.recorder.begin(change("id-2", "running")))
    await asyncio.sleep(0)
    for task in asyncio.all_tasks() - before - {begins}:
        task.cancel()

    assert await begins == "go"
    assert await recording.recorder.flush()
    assert ("id-1", "done") in recording.store.written


async def test_a_worker_that_only_begins_runs_deletes_old_records_too(recording: Recording) -> None:
    """Beside the broker's jobs the ends go with their settlements: a worker writes nothing else, and the store would grow for ever."""
    await recording.recorder.begin(change("id-1", "running"))
    await recording.passes(91)

    assert recording.store.trims == 1


async def test_old_records_are_deleted_while_nothing_is_written(recording: Recording) -> None:
    """A store would grow for ever."""
    await recording.recorder.end(change("id-1"))
    await recording.passes(91)
    assert recording.store.trims == 1

    await recording.passes(91)

    assert recording.store.trims == 2


async def test_a_process_that_is_never_idle_deletes_all_old_records(recording: Recording) -> None:
    """Each worker would delete fewer records than it makes, until the disk is full."""
    recording.store.old = 1700
    recording.store.answer = lambda: recording.clock.sleep(0.5)
    for n in range(190):
        recording.recorder.note(change(f"id-{n}"))
        await recording.passes(0.5)

    assert recording.store.old == 0


async def test_a_store_that_refuses_the_login_is_found_at_the_start(recording: Recording) -> None:
    """A worker would run without its store until somebody reads its log."""

    async def refuses() -> None:
        msg = "the password is wrong"
        raise ConfigurationError(msg)

    recording.store.answer = down
    await recording.recorder.check()
    assert not recording.recorder.well

    recording.store.answer = refuses
    with pytest.raises(ConfigurationError, match="the password is wrong"):
        await recording.recorder.check()
