"""The lab in this process: time, cron schedules, records, and what the lab takes from the memory broker, which it may not import."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from leveret import App, Attempt, Bury, ConfigurationError, Job, Outgoing, Queue, Retry
from leveret.brokers import memory
from leveret.brokers.memory import MemoryBroker, MemoryStore
from leveret.clock import ManualClock
from leveret.middleware import Retries, Timeout
from leveret.runtime import Runtime
from leveret.testing import Lab, attempt, running, running_sync
from leveret.testing.memory import Memory, Store

BERLIN = ZoneInfo("Europe/Berlin")
EIGHT = datetime(2026, 3, 2, 8, 0, 0, tzinfo=BERLIN)


class Note(Job, name="note", queue=Queue("notes")):
    """A job."""

    text: str = "hello"


class Other(Job, name="other", queue=Queue("notes")):
    """Another job of the same queue."""


def noting(**options: Any) -> tuple[App[None], list[str]]:
    """Return an app whose handler writes down the texts that it gets, and the list."""
    app, texts = App("unit", **options), list[str]()

    @app.handler
    async def write(job: Note) -> None:
        texts.append(job.text)

    return app, texts


def test_the_memory_broker_has_what_the_lab_takes_from_it() -> None:
    """The lab casts the module to `Memory`: without this assignment no checker would see a method that was renamed there."""
    module: Memory[MemoryStore] = memory
    made = module.MemoryStore()
    store: Store = made

    state = store.state(ManualClock())

    assert (state.delayed, state.next_due_in_s) == (0, None)
    assert isinstance(state.version, int)
    assert store.delayed(ManualClock()) == []
    assert isinstance(module.MemoryBroker(made, Runtime(app="unit")), MemoryBroker)


async def test_the_clock_begins_at_the_real_time() -> None:
    """An app that compares a job's time with datetime.now() would find its jobs years away."""
    before = datetime.now(timezone.utc)
    async with running(App("unit")) as lab:
        assert before <= lab.now <= datetime.now(timezone.utc) + timedelta(milliseconds=1)
        assert lab.now.utcoffset() == timedelta()


async def test_a_lab_shows_its_time_and_its_numbers() -> None:
    """A failed assertion about the lab prints it."""
    app, _ = noting()
    async with running(app, now=EIGHT) as lab:
        await lab.publish(Note())
        await lab.drain()
        assert repr(lab) == "<lab of app 'unit' at 2026-03-02 07:00:00 UTC, 1 published, 1 runs: 1 done, 0 buried>"


async def test_the_clock_begins_at_a_given_time() -> None:
    """A test that says "on the 29th of February" must be able to."""
    async with running(App("unit"), now=EIGHT) as lab:
        assert lab.now == EIGHT
        lab.advance(timedelta(hours=1))
        assert lab.now == EIGHT + timedelta(hours=1)
        lab.advance(0.25)
        assert lab.now == EIGHT + timedelta(hours=1, seconds=0.25)


@pytest.mark.parametrize("now", [datetime(2026, 3, 2), "2026-03-02", 0])  # noqa: DTZ001 - a naive one is the point
async def test_a_naive_time_is_refused(now: Any) -> None:
    """It would mean another time on each machine that runs the tests."""
    with pytest.raises(ConfigurationError, match="now must be an aware datetime"):
        async with running(App("unit"), now=now):
            pass
    async with running(App("unit"), now=EIGHT) as lab:
        with pytest.raises(ConfigurationError, match="advance_to: the moment must be an aware datetime"):
            lab.advance_to(now)


async def test_the_clock_goes_forward_only() -> None:
    """Jobs that are due would be delayed again, and a mistyped date would pass as "now"."""
    async with running(App("unit"), now=EIGHT) as lab:
        with pytest.raises(ValueError, match=r"2026-03-02 07:59:59\+01:00 is in the past, the lab's clock is at"):
            lab.advance_to(EIGHT - timedelta(seconds=1))
        with pytest.raises(ValueError, match="can't be advanced by -1 s"):
            lab.advance(-1)
        assert lab.now == EIGHT


@pytest.mark.parametrize("by", [float("inf"), "5", True, None])
async def test_the_clock_moves_by_a_number_of_seconds(by: Any) -> None:
    """An endless advance hung in the schedules, and a text ended in a TypeError far from the test's line."""
    async with running(App("unit"), now=EIGHT) as lab:
        with pytest.raises(ValueError, match=r"the lab's clock can't be advanced by .* s; give a timedelta"):
            lab.advance(by)
        assert lab.now == EIGHT


async def test_time_ends_with_the_year_9999() -> None:
    """Python's datetimes end there, in an OverflowError that names neither the test's line nor the lab."""
    with pytest.raises(ConfigurationError, match=r"^running: now is beyond the year 9999"):
        async with running(App("unit"), now=datetime.max.replace(tzinfo=timezone.utc)):
            pass
    async with running(App("unit"), now=EIGHT) as lab:
        with pytest.raises(ValueError, match=r"^advance: the moment is beyond the year 9999"):
            lab.advance(1e15)
        assert lab.now == EIGHT


@pytest.mark.timeout(20)
@pytest.mark.parametrize("method", ["run_due", "drain"])
async def test_a_handler_that_runs_the_lab_is_refused_at_once(method: str) -> None:
    """It waits for itself, and the test for half a minute."""
    app = App("unit")

    class Loop(Job, name="loop", queue=Queue("loops")):
        pass

    @app.handler(job=Loop)
    async def loop(_: Loop) -> None:
        await getattr(lab, method)()

    async with running(app) as lab:
        await lab.publish(Loop())
        await lab.run_due()
        [run] = lab.buried
        assert "a handler can't wait for the lab to run jobs" in run.outcome.reason


@pytest.mark.parametrize("begins", [EIGHT, datetime.now(timezone.utc), EIGHT + timedelta(microseconds=123_456)])
async def test_a_job_is_due_after_exactly_its_delay(begins: datetime) -> None:
    """Off by a rounding error, `advance(60)` would leave a job of 60 s waiting, on some days."""
    app, texts = noting()
    async with running(app, now=begins) as lab:
        for seconds in (0.1, 0.7, 60, 1 / 3, 86_400 * 40):
            await lab.publish(Note("by delay"), delay_s=seconds)
            moment = lab.now + timedelta(seconds=seconds)
            await lab.publish(Note("by time"), at=moment)
            lab.advance(seconds) if seconds != 0.7 else lab.advance_to(moment + timedelta(milliseconds=1))
            await lab.run_due()
            assert texts == ["by delay", "by time"], seconds
            texts.clear()


async def test_tomorrow_at_nine() -> None:
    """The sentence that tests of applications want to say."""
    app, texts = noting()
    nine = EIGHT + timedelta(days=1, hours=1)
    async with running(app, now=EIGHT) as lab:
        await lab.publish(Note("reminder"), at=nine)
        [waiting] = lab.delayed
        assert (waiting.job, waiting.until, waiting.until.utcoffset()) == (Note("reminder"), nine, timedelta())

        lab.advance_to(nine - timedelta(seconds=1))
        await lab.run_due()
        assert not texts

        lab.advance_to(nine)
        await lab.run_due()
        assert texts == ["reminder"]
        assert not lab.delayed


async def test_run_due_waits_for_nothing_and_drain_for_everything() -> None:
    """A test of what happens before a retry couldn't be written with `drain` alone."""
    app = App("unit")

    @app.handler
    async def at_the_third(job: Note, attempt: Attempt) -> Retry | None:
        return None if attempt.number == 3 else Retry(delay_s=60)

    async with running(app, now=EIGHT) as lab:
        receipt = await lab.publish(Note())
        await lab.publish(Note("later"), delay_s=10)
        await lab.run_due()
        assert [run.number for run in lab.attempts(receipt.job_id)] == [1]
        assert [(one.until - EIGHT).total_seconds() for one in lab.delayed] == [10, 60]
        assert lab.now == EIGHT

        await lab.drain()
        assert [run.number for run in lab.attempts(receipt.job_id)] == [1, 2, 3]
        assert lab.now == EIGHT + timedelta(seconds=130)


async def test_run_due_runs_what_a_job_publishes_for_now() -> None:
    """A chain of jobs that needs no wait is one thing to a test."""
    app, texts = noting()

    @app.handler
    async def two(job: Other, attempt: Attempt) -> None:
        await attempt.publish(Note("now"))
        await attempt.publish(Note("later"), delay_s=1)

    async with running(app) as lab:
        await lab.publish(Other())
        await lab.run_due()
        assert texts == ["now"]
        assert lab.published_of(Note) == (Note("now"), Note("later"))


async def test_a_job_that_retries_at_once_for_ever_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither run_due nor drain would ever return, and the test would hang without a word."""
    monkeypatch.setattr("leveret.testing.memory.MOST_RUNS", 50)
    app = App("unit")

    @app.handler
    async def again(job: Note) -> Retry:
        return Retry()

    async with running(app) as lab:
        await lab.publish(Note())
        with pytest.raises(RuntimeError, match="50 runs without an end"):
            await lab.run_due()


async def test_an_advance_past_a_timeout_ends_the_run() -> None:
    """The clock of runs and the clock of the lab are one."""
    app, begun = App("unit", middleware=[Timeout(30)]), asyncio.Event()

    @app.handler
    async def hangs(job: Note) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with running(app) as lab:
        receipt = await lab.publish(Note())
        running_due = asyncio.ensure_future(lab.run_due())
        await begun.wait()
        assert not lab.attempts(receipt.job_id)
        lab.advance(31)
        await running_due
        [buried] = lab.buried
        assert "TimeoutError" in buried.outcome.reason


class Digest(Job, name="digest", queue=Queue("digests")):
    """A recurring job."""

    slot: str


def recurring() -> App[None]:
    """Return an app with a daily schedule, one that says nothing on Tuesdays, and a disabled one."""
    app = App("shop")

    @app.cron("0 9 * * *", tz="Europe/Berlin")
    def daily(slot: datetime) -> Digest | None:
        return None if slot.weekday() == 1 else Digest(f"{slot:%a %H:%M %Z}")

    app.cron("0 12 * * *", Outgoing(Digest("noon"), delay_s=60), name="noon", tz="Europe/Berlin")
    app.cron("* * * * *", Digest("never"), name="disabled", enabled=False)

    @app.handler
    async def send(job: Digest, attempt: Attempt) -> None:
        attempt.log.info("sent")

    return app


async def test_advance_fires_the_schedules_that_it_passes() -> None:
    """Without it, no test of an application shows that its recurring jobs are published, with what, and when."""
    async with running(recurring(), now=EIGHT) as lab:
        lab.advance_to(EIGHT + timedelta(days=3))  # Monday to Thursday, 8:00

        assert [(one.job, one.envelope.job_id) for one in lab.published] == [
            (Digest("Mon 09:00 CET"), "shop.daily@2026-03-02T08:00:00Z"),
            (Digest("noon"), "shop.noon@2026-03-02T11:00:00Z"),
            (Digest("noon"), "shop.noon@2026-03-03T11:00:00Z"),
            (Digest("Wed 09:00 CET"), "shop.daily@2026-03-04T08:00:00Z"),
            (Digest("noon"), "shop.noon@2026-03-04T11:00:00Z"),
        ]
        # each was published at its slot, by the lab's clock
        assert [datetime.fromtimestamp(one.envelope.created_s, BERLIN).hour for one in lab.published] == [
            9,
            12,
            12,
            9,
            12,
        ]
        await lab.run_due()
        assert len(lab.done) == 5


async def test_a_slot_is_fired_once_and_by_advance_alone() -> None:
    """A slot at the very end of an advance would come twice or never; and drain would publish jobs for ever."""
    app = recurring()
    async with running(app, now=EIGHT) as lab:
        lab.advance(3600)
        assert lab.published_of(Digest) == (Digest("Mon 09:00 CET"),)
        lab.advance(3600)
        assert len(lab.published) == 1
        await lab.publish(Digest("late"), delay_s=86_400)
        await lab.drain()  # passes two slots
        assert len(lab.published) == 2
        assert lab.now == EIGHT + timedelta(days=1, hours=2)
        lab.advance(3 * 3600)
        assert [one.job for one in lab.published[2:]] == [Digest("noon")]


async def test_jobs_that_fall_due_on_the_way_keep_their_order_among_the_slots() -> None:
    """At equal priority the earlier job runs first, as in production."""
    app = recurring()
    async with running(app, now=EIGHT) as lab:
        await lab.publish(Digest("half past eight"), delay_s=1800)
        await lab.publish(Digest("half past nine"), delay_s=5400)
        lab.advance(7200)
        await lab.run_due()
        assert [run.job for run in lab.done] == [
            Digest("half past eight"),
            Digest("Mon 09:00 CET"),
            Digest("half past nine"),
        ]


async def test_an_error_of_a_cron_function_is_the_tests_error() -> None:
    """Production logs it and skips the slot; a test that only logged it would pass."""
    app = App("unit")

    @app.cron("* * * * *")
    def fails() -> Note:
        msg = "no database"
        raise LookupError(msg)

    async with running(app, now=EIGHT) as lab:
        with pytest.raises(LookupError, match="no database"):
            lab.advance(60)


async def test_an_advance_past_too_many_slots_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A year of minutes would take minutes, and a gigabyte of records."""
    monkeypatch.setattr("leveret.testing.memory.MOST_SLOTS", 50)
    app = App("unit")
    app.cron("* * * * *", Note(), name="often")
    async with running(app, now=EIGHT) as lab:
        with pytest.raises(ValueError, match=r"more than 50 cron slots .* advance in shorter steps"):
            lab.advance(51 * 60)
        assert (lab.now, lab.published) == (EIGHT, ())
        lab.advance(50 * 60)
        assert len(lab.published) == 50


async def test_a_lab_leaves_the_schedules_out_if_asked() -> None:
    """A test of an expiry a day later would otherwise publish 8 640 jobs of a schedule that fires every ten seconds."""
    app = recurring()
    async with running(app, now=EIGHT, cron=False) as lab:
        lab.advance_to(EIGHT + timedelta(days=3))
        assert not lab.published


def test_a_plain_lab_leaves_the_schedules_out_too() -> None:
    """The two forms of a lab differ in nothing else than `async`."""
    with running_sync(recurring(), now=EIGHT, cron=False) as lab:
        lab.advance_to(EIGHT + timedelta(days=3))
        assert not lab.published


def test_a_lab_that_is_not_entered_says_how() -> None:
    """Python's own text is about an _AsyncGeneratorContextManager, which no user has heard of."""
    block: Any = running(App("unit"))
    with pytest.raises(
        AttributeError, match=r"running\(app\) has no 'drain' before .* write `async with running\(app\) as lab:`"
    ):
        block.drain()
    with pytest.raises(TypeError, match="plain `with`: write `async with running"), block:
        pass


async def test_an_app_without_handlers_only_publishes() -> None:
    """A web service that publishes to another service's workers has tests too."""
    app = App("web", middleware=[Retries()])
    async with running(app) as lab:
        await asyncio.to_thread(app.blocking_publisher().publish, Note("one"))
        async with app.publisher() as publisher:
            await publisher.publish(Note("two"), delay_s=60)
        await lab.run_due()
        await lab.drain()
        assert lab.published_of(Note) == (Note("one"), Note("two"))
        assert not lab.done


async def test_records_have_the_types_of_their_jobs_and_outcomes() -> None:
    """`tests/typing` sees the types; here they are true."""
    app, _ = noting()

    @app.handler
    async def bury(job: Other) -> Bury:
        return Bury("no use")

    async with running(app) as lab:
        await lab.publish(Note())
        await lab.publish(Other())
        await lab.drain()
        assert [note.text for note in lab.published_of(Note)] == ["hello"]
        assert [run.outcome.reason for run in lab.buried] == ["no use"]
        assert [run.job for run in lab.done] == [Note()]


def test_an_attempt_shows_what_a_def_handler_published() -> None:
    """A handler whose only effect is a job couldn't be tested by calling it."""

    def handler(job: Note, attempt: Attempt) -> None:
        attempt.publish_blocking(Other())
        attempt.publish_blocking(Note("child"), delay_s=60)

    made = attempt()
    handler(Note(), made)

    assert made.published_of(Note) == (Note("child"),)
    assert [one.envelope.job for one in made.published] == ["other", "note"]
    assert made.published[1].envelope.due_ms is not None


async def test_an_attempt_shows_what_an_async_handler_published() -> None:
    """As for a `def` handler; and one that forgets its await has published nothing."""

    async def handler(job: Note, attempt: Attempt[str]) -> None:
        await attempt.publish(Note(attempt.resources))
        await asyncio.to_thread(attempt.publish_blocking, Other())

    made = attempt(resources="fake", number=2)
    await handler(Note(), made)

    assert (made.number, [one.job for one in made.published]) == (2, [Note("fake"), Other()])
    made.publish(Note("forgotten")).close()
    assert len(made.published) == 2


def test_the_public_type_of_a_lab_is_abstract() -> None:
    """A test that takes either fixture is annotated with it; made by hand, it would be a lab without an app."""
    with pytest.raises(TypeError, match="abstract"):
        Lab()  # type: ignore[abstract]  # pyright: ignore[reportAbstractUsage]
