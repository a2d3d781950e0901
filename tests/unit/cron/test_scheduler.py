"""The driver behind `leveret cron`, under a manual clock, on a memory broker that can refuse."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import pytest

from leveret import App, BrokerUnavailable, ConfigurationError, Envelope, Job, Outgoing, Publish, Queue, Receipt
from leveret.brokers.memory import MemoryBroker, MemoryStore
from leveret.clock import ManualClock
from leveret.cron.scheduler import Scheduler
from leveret.publishing.sender import Sender
from leveret.runtime import Runtime

ticks = Queue("ticks")
START = 1_800_000_000.0  # 2027-01-15 08:00:00Z


class Tick(Job, name="tick", queue=ticks):
    slot: str = ""


class SettableClock(ManualClock):
    """A clock that somebody sets, as NTP does; timers don't care."""

    def set_back(self, seconds: float) -> None:
        """Correct it."""
        self._start -= seconds


class Lab:
    """A scheduler that runs, its clock, and what it published."""

    def __init__(self, app: App[Any]) -> None:
        self.clock = SettableClock(START)
        self.store = MemoryStore()
        runtime = Runtime(app=app.name, clock=self.clock)
        self.published: list[str] = []

        def observe(_: Job, envelope: Envelope) -> None:
            self.published.append(envelope.job_id.removeprefix("shop.tick@2027-01-15T"))

        sender = Sender(MemoryBroker(self.store, runtime), app.layers, runtime, observe)
        enabled = [schedule for schedule in app.schedules if schedule.enabled]
        self.scheduler = Scheduler(app.name, enabled, sender, runtime)

    async def advance(self, seconds: float) -> None:
        """Move the clock on while the scheduler sleeps; return once it has seen that, done what was due, and sleeps again."""
        await self.until(lambda: self.clock.sleepers > 0)
        self.clock.advance(seconds)
        for _ in range(5):
            await asyncio.sleep(0)
        await self.until(lambda: self.clock.sleepers > 0)

    async def until(self, happened: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not happened():
                await asyncio.sleep(0.001)


@asynccontextmanager
async def running(app: App[Any]) -> AsyncGenerator[Lab, None]:
    lab = Lab(app)
    task = asyncio.create_task(lab.scheduler.run())
    try:
        yield lab
    finally:
        lab.scheduler.stop()
        async with asyncio.timeout(10):
            await task


def every_minute(emit: Callable[..., Any] | None = None, **options: Any) -> App[None]:
    app = App("shop", **options)
    app.cron("* * * * *", name="tick")(emit or Tick)
    return app


async def test_each_slot_is_published_once_with_its_own_id() -> None:
    """The id is what makes a repeat after a restart the same job."""
    async with running(every_minute()) as lab:
        for _ in range(3):
            await lab.advance(60)

        assert lab.published == ["08:01:00Z", "08:02:00Z", "08:03:00Z"]


async def test_a_slot_that_fell_due_during_the_one_before_is_late_and_not_lost() -> None:
    """A confirm that takes a second too long must not cost the next job."""
    async with running(every_minute()) as lab:
        await lab.advance(130)
        assert lab.published == ["08:01:00Z", "08:02:00Z"]

        await lab.advance(50)
        assert lab.published[2:] == ["08:03:00Z"]


async def test_after_a_long_sleep_it_does_not_catch_up(caplog: pytest.LogCaptureFixture) -> None:
    """A laptop that wakes in the morning must not publish a night's worth of jobs at once."""
    async with running(every_minute()) as lab:
        await lab.advance(3600)
        await lab.advance(60)

        assert lab.published == ["08:01:00Z", "09:01:00Z"]
    assert "missed the slots from 2027-01-15 08:02:00+00:00 to now" in caplog.text


@pytest.mark.parametrize("published", [0, 2], ids=["before its first slot", "after some"])
async def test_a_clock_that_was_ahead_and_is_set_right_costs_no_slot(
    published: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A machine that starts with a wrong clock is corrected by NTP: a cron that waits for the wrong time is silent for an hour, or a year."""
    async with running(every_minute()) as lab:
        for _ in range(published):
            await lab.advance(60)
        await lab.until(lambda: lab.clock.sleepers > 0)
        lab.clock.set_back(3600)
        for _ in range(3):
            await lab.advance(60)

        assert lab.published[published:] == [f"07:0{published + number}:00Z" for number in (1, 2, 3)]
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "schedule tick: the clock was set back to 2027-01-15 07:0" in warning


async def test_a_small_correction_of_the_clock_publishes_no_slot_twice(caplog: pytest.LogCaptureFixture) -> None:
    """NTP takes back some seconds on most machines, some day: a report that goes out twice for it is one too many."""
    async with running(every_minute()) as lab:
        await lab.advance(60)
        lab.clock.set_back(59)
        await lab.advance(59)
        await lab.advance(60)

        assert lab.published == ["08:01:00Z", "08:02:00Z"]
    assert not caplog.records


async def test_a_slot_that_cannot_be_published_is_tried_again_until_the_next_is_due(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A broker that is away for half a minute costs nothing; one that is away for longer is told of, slot by slot."""
    async with running(every_minute()) as lab:
        lab.store.refuse("no disk")
        await lab.advance(60)
        assert (lab.published, lab.scheduler.emitting) == ([], 1)
        lab.store.accept()
        await lab.advance(15)
        assert lab.published == ["08:01:00Z"]

        lab.store.refuse("no disk")
        for _ in range(8):
            await lab.advance(15)
        lab.store.accept()
        await lab.advance(60)

    assert "08:02:00Z" not in lab.published
    assert "missed slot 2027-01-15 08:02:00+00:00, the job couldn't be published" in caplog.text
    assert len(lab.published) >= 2
    assert sum("isn't published yet, retrying" in line and "08:01" in line for line in caplog.text.splitlines()) == 1


async def test_a_function_that_raises_costs_its_own_slot_alone(caplog: pytest.LogCaptureFixture) -> None:
    """One bad line in one schedule must not end them all."""

    def emit(slot: datetime) -> Tick | None:
        if slot.minute == 1:
            raise RuntimeError("no such table")
        return Tick(str(slot)) if slot.minute != 2 else None

    async with running(every_minute(emit)) as lab:
        for _ in range(3):
            await lab.advance(60)

        assert lab.published == ["08:03:00Z"]  # 08:02 returned None: nothing to publish
    assert (
        "missed slot 2027-01-15 08:01:00+00:00, the cron function raised: RuntimeError('no such table')" in caplog.text
    )


class Moody:
    """A publish layer that raises what it is told to."""

    def __init__(self, error: Exception) -> None:
        self.error: Exception | None = error

    async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
        if self.error is not None:
            raise self.error
        return await proceed(envelope)


async def test_a_layer_that_raises_costs_its_own_slot_alone(caplog: pytest.LogCaptureFixture) -> None:
    """A tracing backend that is away must not stop the cron."""
    layer = Moody(RuntimeError("no backend"))
    async with running(every_minute(middleware=[layer])) as lab:
        await lab.advance(60)
        layer.error = None
        await lab.advance(60)

        assert lab.published == ["08:02:00Z"]
    assert "missed slot 2027-01-15 08:01:00+00:00, publish middleware raised" in caplog.text


def refused_by_a_broker() -> BrokerUnavailable:
    error = BrokerUnavailable("login refused")
    error.__cause__ = ConfigurationError("login refused")
    return error


@pytest.mark.parametrize("error", [ConfigurationError("login refused"), refused_by_a_broker()], ids=["raw", "cause"])
async def test_what_waiting_would_not_mend_ends_it_as_it_is(error: Exception) -> None:
    """A refused login must be one line and exit 2, not a group of exceptions."""
    lab = Lab(every_minute(middleware=[Moody(error)]))
    task = asyncio.create_task(lab.scheduler.run())
    await lab.until(lambda: lab.clock.sleepers > 0)
    lab.clock.advance(60)

    with pytest.raises(ConfigurationError, match="login refused"):
        await task


async def test_a_function_may_choose_options_and_an_id_of_its_own() -> None:
    """An Outgoing is what it is everywhere else; what it leaves out is the slot's."""
    ids = iter(["own", None])
    async with running(every_minute(lambda: Outgoing(Tick(), delay_s=5, job_id=next(ids)))) as lab:
        await lab.advance(60)
        await lab.advance(60)

        assert lab.published == ["own", "08:02:00Z"]
        assert lab.store.state(lab.clock).delayed == 1


async def test_one_schedule_that_blocks_does_not_hold_up_another() -> None:
    """Each has a thread of its own: a slow query in one is not the other's delay."""
    release = asyncio.Event()
    loop = asyncio.get_running_loop()
    app = every_minute()
    app.cron("* * * * *", name="slow")(lambda: asyncio.run_coroutine_threadsafe(release.wait(), loop).result() and None)
    async with running(app) as lab:
        await lab.until(lambda: lab.clock.sleepers == 2)
        lab.clock.advance(60)
        await lab.until(lambda: lab.published == ["08:01:00Z"])
        assert lab.scheduler.emitting == 1
        release.set()


async def test_a_stop_tries_nothing_again(caplog: pytest.LogCaptureFixture) -> None:
    """A stop during an outage must not wait for the broker to come back."""
    caplog.set_level(logging.INFO)
    async with running(every_minute()) as lab:
        lab.store.refuse("no disk")
        await lab.advance(60)
        assert lab.scheduler.emitting == 1

    assert "missed slot 2027-01-15 08:01:00+00:00, stopped before the job could be published" in caplog.text
