"""The traceback of a failed run, on its log record and in its dead letter: it begins where a user can mend something."""

import asyncio
import dataclasses
import logging
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from leveret import App, Attempt, Consume, Outcome, Retry
from leveret.failure import failures_of
from leveret.middleware import Logs, RateLimit, Retries, Timeout
from leveret.testing import running
from leveret.tracebacks import exc_info, place_of
from tests.unit.runs import Greet


async def note(attempt: Attempt, proceed: Consume) -> Outcome:
    """Middleware of a user's."""
    return await proceed(attempt)


def fail() -> None:
    raise LookupError("no such order")


def chain_up() -> None:
    try:
        fail()
    except LookupError as error:
        raise OSError("the shop is closed") from error


def meanwhile() -> None:
    try:
        fail()
    except LookupError:
        int("key")


def leave() -> None:
    raise SystemExit(3)


def stop() -> None:
    raise StopIteration


async def in_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(fail))


def in_async(act: Callable[[], Any]) -> Callable[[Greet], Any]:
    async def handle(job: Greet) -> None:
        result = act()
        if result is not None:
            await result

    return handle


def in_thread(act: Callable[[], Any]) -> Callable[[Greet], Any]:
    def handle(job: Greet) -> None:
        act()

    return handle


async def failure(caplog: pytest.LogCaptureFixture, handler: Callable[..., Any], *layers: Any) -> logging.LogRecord:
    """Run a job whose handler fails, and return the only record of the failure."""
    caplog.clear()
    app: App[Any] = App("fails", middleware=[Logs(), *layers])
    app.handler(job=Greet)(handler)
    async with running(app) as lab:
        await lab.publish(Greet())
        await lab.drain()
    (record,) = [record for record in caplog.records if record.name == "leveret.attempt"]
    return record


def frames(record: logging.LogRecord) -> list[list[str]]:
    """The functions of each traceback of the record, in the order in which they are printed."""
    assert record.exc_info
    found: list[list[str]] = []
    for line in traceback.format_exception(*record.exc_info):
        for part in line.splitlines():
            if part.lstrip(" |+-").startswith("Traceback (most") or part.lstrip(" |+-").startswith("Exception Group T"):
                found.append([])
            elif part.lstrip(" |").startswith('File "'):
                found[-1].append(part.rpartition(", in ")[2])
    return found


@pytest.mark.parametrize("make", [in_async, in_thread])
@pytest.mark.parametrize(
    ("act", "shows"),
    [
        (fail, [["handle", "fail"]]),
        (chain_up, [["chain_up", "fail"], ["handle", "chain_up"]]),
        (meanwhile, [["meanwhile", "fail"], ["handle", "meanwhile"]]),
        (leave, [["handle", "leave"]]),
    ],
    ids=lambda act: getattr(act, "__name__", ""),
)
async def test_a_traceback_begins_at_the_first_frame_of_the_user(
    caplog: pytest.LogCaptureFixture, make: Callable[[Any], Any], act: Callable[[], Any], shows: list[list[str]]
) -> None:
    """With a dozen of leveret's frames first, who is woken at night reads those; the more so for each cause in a chain."""
    record = await failure(caplog, make(act), RateLimit(1000), Timeout(30))
    assert frames(record) == shows
    assert record.levelno == logging.ERROR


async def test_what_a_future_cannot_hold_leads_to_the_user_too(caplog: pytest.LogCaptureFixture) -> None:
    """The error's text alone names no line."""
    assert frames(await failure(caplog, in_thread(stop))) == [["handle", "stop"]]


async def test_a_group_leads_to_the_frames_of_its_members(caplog: pytest.LogCaptureFixture) -> None:
    """A TaskGroup's own frame says only that some task failed."""
    group, member = frames(await failure(caplog, in_async(in_group)))
    assert group == ["handle", "in_group", "__aexit__"]
    assert member == ["fail"]


async def test_middleware_of_a_user_is_a_users_frame(caplog: pytest.LogCaptureFixture) -> None:
    """It may be what fails, or what changes the job on its way."""
    (shown,) = frames(await failure(caplog, in_async(fail), note, Timeout(30)))
    assert shown[0] == "note"
    assert shown[-2:] == ["handle", "fail"]


async def test_an_error_keeps_its_own_traceback(caplog: pytest.LogCaptureFixture) -> None:
    """An outer tool, such as a tracer, may still read it whole."""
    record = await failure(caplog, in_async(fail), Timeout(30))
    assert record.exc_info
    kind, error, trace = record.exc_info
    assert kind is LookupError
    assert error is not None
    assert error.__traceback__ is not trace


async def test_an_error_of_leverets_own_keeps_the_line_that_raised_it(caplog: pytest.LogCaptureFixture) -> None:
    """No frame of a user's is left, and the error may be a bug of ours."""

    async def handle(job: Greet) -> Any:
        return 7

    assert frames(await failure(caplog, handle)) == [["run"]]


async def test_a_time_out_shows_where_the_handler_waited(caplog: pytest.LogCaptureFixture) -> None:
    """A handler that hangs is the failure whose place nobody can guess."""

    async def hang() -> None:
        asyncio.get_running_loop().call_soon(lab.advance, 2)
        await asyncio.Event().wait()

    async def handle(job: Greet) -> None:
        await hang()

    async def swallow(job: Greet) -> None:
        try:
            await hang()
        except asyncio.CancelledError:
            return

    for handler in (handle, swallow):
        caplog.clear()
        app: App[Any] = App("hangs", middleware=[Timeout(1)])
        app.handler(job=Greet)(handler)
        async with running(app) as lab:
            await lab.publish(Greet())
            await lab.drain()
            (buried,) = lab.buried
        (record,) = [record for record in caplog.records if record.name == "leveret.attempt"]
        (shown,) = frames(record)
        assert shown[:2] == [handler.__name__, "hang"]
        assert isinstance(buried.error, TimeoutError)
        assert record.exc_info
        text = "".join(traceback.format_exception(*record.exc_info))
        assert "await asyncio.Event().wait()" in text
        assert "CancelledError" not in text  # it would read as a second failure
        assert text.splitlines()[-1].startswith("TimeoutError: greet was ended by its Timeout of 1 s")


async def test_a_time_out_shows_where_the_thread_was(caplog: pytest.LogCaptureFixture) -> None:
    """A thread goes on, so where it is when its run fails says nothing about what took so long."""
    loop, go_on = asyncio.get_running_loop(), threading.Event()

    def linger() -> None:
        loop.call_soon_threadsafe(loop.call_later, 0.05, lab.advance, 2)
        go_on.wait(10)

    def handle(job: Greet) -> None:
        linger()
        time.sleep(0)

    class Released(logging.Handler):
        """Lets the thread end once its time-out was logged."""

        def emit(self, record: logging.LogRecord) -> None:
            if "is past its time limit" in record.getMessage():
                go_on.set()

    app: App[Any] = App("hangs", middleware=[Timeout(1)])
    app.handler(job=Greet)(handle)
    released = Released()
    logging.getLogger("leveret.consumer").addHandler(released)
    try:
        async with running(app) as lab:
            await lab.publish(Greet())
            await lab.drain()
    finally:
        logging.getLogger("leveret.consumer").removeHandler(released)
    (record,) = [record for record in caplog.records if record.name == "leveret.attempt"]
    (shown,) = frames(record)
    assert shown[:3] == ["handle", "linger", "wait"]
    assert record.exc_info
    assert "go_on.wait(10)" in "".join(traceback.format_exception(*record.exc_info))


async def test_a_dead_letter_has_the_traceback_of_its_record(caplog: pytest.LogCaptureFixture) -> None:
    """`leveret dead show` is where a failure of last week is looked into."""
    envelopes: list[Any] = []
    app: App[Any] = App("fails", middleware=[Retries(max_attempts=2)])

    def handle(job: Greet, attempt: Attempt) -> None:
        envelopes.append(attempt.envelope)
        chain_up()

    app.handler(job=Greet)(handle)
    async with running(app) as lab:
        await lab.publish(Greet())
        await lab.drain()
    (first, _) = [record for record in caplog.records if record.name == "leveret.attempt"]
    assert first.exc_info
    (kept,) = failures_of(envelopes[1])
    assert kept.traceback == "".join(traceback.format_exception(*first.exc_info))
    assert isinstance(lab.attempts(envelopes[0].job_id)[0].outcome, Retry)


def test_errors_are_alike_by_class_and_innermost_line_of_a_user() -> None:
    """Two failures that count as one would hide each other in a storm."""

    def caught(act: Callable[[], Any]) -> BaseException:
        with pytest.raises((LookupError, OSError)) as raised:
            act()
        return raised.value

    first, second, other = caught(fail), caught(fail), caught(chain_up)
    assert place_of(exc_info(first)) == place_of(exc_info(second))
    assert place_of(exc_info(first)) != place_of(exc_info(other))
    ended = TimeoutError()
    ended.__cause__ = first
    first.__cause__ = ended  # a circle, as a careless program may make it
    assert place_of(exc_info(ended))[1:] == place_of(exc_info(second))[1:]
    nowhere, again = TimeoutError(), TimeoutError()
    nowhere.__cause__, again.__cause__ = again, nowhere
    assert place_of(exc_info(nowhere)) == (TimeoutError, "", 0)


@dataclasses.dataclass(frozen=True)
class Declined(Exception):
    """A user's error that can't be changed."""

    code: int


class Unwritable(Exception):
    """A user's error whose name can't be encoded."""


Unwritable.__qualname__ = "Half\ud800"


def frozen_cause() -> None:
    try:
        raise Declined(1)
    except Declined as error:
        msg = "declined"
        raise RuntimeError(msg) from error


def unwritable() -> None:
    raise Unwritable


@pytest.mark.parametrize("act", [frozen_cause, unwritable])
async def test_an_error_whose_traceback_cannot_be_made_costs_no_settlement(act: Callable[[], None]) -> None:
    """The job stayed unsettled, kept its place in the window, and ran again at each restart without a limit."""
    app = App("unit", middleware=[Retries(max_attempts=2)])

    @app.handler
    async def greet(job: Greet) -> None:
        act()

    async with running(app) as lab:
        receipt = await lab.publish(Greet())
        await lab.drain()

    assert [run.number for run in lab.attempts(receipt.job_id)] == [1, 2]
    assert len(lab.buried) == 1
