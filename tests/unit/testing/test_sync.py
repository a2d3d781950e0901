"""`running_sync`: tests without `async`, whose `def` handlers run in the test's own thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime, timedelta, timezone

import pytest

from leveret import App, Attempt, ConfigurationError, Job, Queue, Retry
from leveret.middleware import Retries, Timeout
from leveret.testing import SyncLab, running_sync

NOON = datetime(2026, 3, 2, 12, tzinfo=timezone.utc)


class Step(Job, name="step", queue=Queue("steps")):
    """A job."""

    name: str = "first"


class Child(Job, name="child", queue=Queue("steps")):
    """A job that another publishes."""

    name: str = "first"


def test_a_def_handler_sees_the_threads_own_things() -> None:
    """Django keeps a transaction in a thread-local, and refuses a connection where a loop runs: both are why this form exists."""
    app, local, seen = App("unit"), threading.local(), list[object]()
    local.transaction = "open"

    @app.handler
    def look(job: Step) -> None:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        seen.extend([local.transaction, threading.get_ident()])

    with running_sync(app) as lab:
        lab.publish(Step())
        lab.drain()
        assert len(lab.done) == 1
    assert seen == ["open", threading.get_ident()]


def test_around_sync_is_in_the_same_thread() -> None:
    """It opens and closes the connection that the handler uses."""
    threads: list[int] = []

    @contextmanager
    def around() -> Generator[None, None, None]:
        threads.append(threading.get_ident())
        yield

    app = App("unit", around_sync=around)

    @app.handler
    def look(job: Step) -> None: ...

    with running_sync(app) as lab:
        lab.publish(Step())
        lab.drain()
    assert threads == [threading.get_ident()]


def test_a_handler_publishes_over_every_way_without_a_deadlock() -> None:
    """The handler runs on the thread that drives the loop: a publish that waited for that thread would wait for ever."""
    app = App("unit")
    publisher = app.blocking_publisher()

    @app.handler
    def publish(job: Step, attempt: Attempt) -> None:
        attempt.publish_blocking(Child("attempt"))
        publisher.publish(Child("blocking"))

    @app.handler
    def child(job: Child) -> None: ...

    with running_sync(app) as lab:
        publisher.publish(Step("body"))
        assert lab.published_of(Step) == (Step("body"),)
        lab.drain()
        assert lab.published_of(Child) == (Child("attempt"), Child("blocking"))
        assert len(lab.done) == 3


def test_a_publish_within_a_handler_starts_no_other_handler_in_it() -> None:
    """Two handlers in one thread, one inside the other, would share a transaction that neither expects to share."""
    app, order = App("unit"), list[str]()

    @app.handler
    def publish(job: Step, attempt: Attempt) -> None:
        order.append("begins")
        attempt.publish_blocking(Child())
        order.append("ends")

    @app.handler
    def child(job: Child) -> None:
        order.append("child")

    with running_sync(app) as lab:
        for _ in range(3):
            lab.publish(Step())
        lab.drain()
    assert order.count("child") == 3
    places = [index for index, word in enumerate(order) if word == "begins"]
    assert all(order[index + 1] == "ends" for index in places)


def test_async_handlers_and_lifespans_work() -> None:
    """An app has both kinds of handlers; a task group of its lifespan must be left by the task that entered it."""
    entered: list[str] = []

    @asynccontextmanager
    async def life() -> AsyncGenerator[str, None]:
        async with asyncio.timeout(30), asyncio.TaskGroup():
            entered.append("in")
            yield "resources"
        entered.append("out")

    app = App("unit", lifespan=life, middleware=[Retries(base_s=60), Timeout(30)])

    @app.handler
    async def handle(job: Step, attempt: Attempt[str]) -> None:
        if attempt.number == 1:
            raise ConnectionError
        await asyncio.sleep(0.001)
        await attempt.publish(Child(attempt.resources))

    @app.handler
    async def child(job: Child) -> None:
        await asyncio.to_thread(time.sleep, 0.001)

    with running_sync(app) as lab:
        lab.publish(Step())
        lab.drain()
        assert lab.published_of(Child) == (Child("resources"),)
        assert len(lab.done) == 2
    assert entered == ["in", "out"]
    with running_sync(app, resources="fake") as lab:
        lab.publish(Step())
        lab.drain()
        assert lab.published_of(Child) == (Child("fake"),)
    assert entered == ["in", "out"]


def test_time_and_cron_are_as_in_a_lab() -> None:
    """Cron functions look into the database too, so they run in the test's thread."""
    app, threads = App("unit"), list[int]()

    @app.handler
    def once_more(job: Step, attempt: Attempt) -> Retry | None:
        return Retry(delay_s=60) if attempt.number == 1 else None

    @app.cron("0 13 * * *")
    def daily() -> Step:
        threads.append(threading.get_ident())
        return Step("daily")

    with running_sync(app, now=NOON) as lab:
        lab.advance_to(NOON + timedelta(hours=1))
        assert lab.published_of(Step) == (Step("daily"),)
        assert threads == [threading.get_ident()]
        lab.run_due()
        [waiting] = lab.delayed
        assert waiting.until == NOON + timedelta(hours=1, minutes=1)
        lab.advance(60)
        lab.run_due()
        assert [run.number for run in lab.attempts("unit.daily@2026-03-02T13:00:00Z")] == [1, 2]
        assert lab.now == waiting.until


async def test_inside_a_loop_it_is_a_clear_error() -> None:
    """It would fail in the middle of something, with asyncio's words."""
    with (
        pytest.raises(RuntimeError, match=r"running_sync can't be used inside an event loop.*async with running"),
        running_sync(App("unit")),
    ):
        pass


def test_a_handler_that_drains_the_lab_fails_with_the_reason() -> None:
    """It would wait for itself, for 30 s."""
    app, labs = App("unit"), list[SyncLab]()

    @app.handler
    def drains(job: Step) -> None:
        labs[0].drain()

    @app.handler
    async def drains_too(job: Child) -> None:
        labs[0].drain()

    with running_sync(app) as lab:
        labs.append(lab)
        lab.publish(Step())
        lab.publish(Child())
        lab.drain()
        reasons = sorted(run.outcome.reason for run in lab.buried)
    assert "a handler can't wait for the lab to run jobs" in reasons[0]
    assert "not inside an `async def`" in reasons[1]


def test_an_error_of_the_app_ends_the_block_and_leaves_nothing() -> None:
    """A lab that couldn't open must not capture the app for the tests that follow."""
    app = App("unit", modules=["no_such_module"])
    with pytest.raises(ConfigurationError, match="no_such_module"), running_sync(app):
        pass
    assert not app.is_captured
    with pytest.raises(ZeroDivisionError), running_sync(App("other")):
        raise ZeroDivisionError


def test_a_handlers_keyboard_interrupt_ends_the_test() -> None:
    """^C while a handler runs in the test's thread must not be taken for a failure of the job."""
    app = App("unit")

    @app.handler
    def interrupted(job: Step) -> None:
        raise KeyboardInterrupt

    with running_sync(app) as lab:
        lab.publish(Step())
        with pytest.raises(KeyboardInterrupt):
            lab.drain()
    assert not app.is_captured


def test_a_threads_own_loop_is_left_alone() -> None:
    """A test that uses asyncio beside the lab would find its loop closed."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        with running_sync(App("unit")) as lab:
            lab.drain()
        assert asyncio.get_event_loop() is loop
        assert not loop.is_closed()
    finally:
        asyncio.set_event_loop(None)
        loop.close()
