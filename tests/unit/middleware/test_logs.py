"""`Logs`, and what the worker logs with and without it: one structured record per ending."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Any

import pytest

from leveret import App, Attempt, Bury, Done, Expired, Outcome, Retry, Snooze
from leveret.attemptlog import duration
from leveret.clock import ManualClock
from leveret.middleware import Logs, Retries, Timeout
from leveret.testing import running
from tests.unit.runs import Greet, attempt, chain, runtime


def taking(
    clock: ManualClock, seconds: float, outcome: Outcome | BaseException
) -> Callable[[Attempt[Any]], Awaitable[Outcome]]:
    async def handler(_: Attempt[Any]) -> Outcome:
        clock.advance(seconds)
        if isinstance(outcome, BaseException) and not isinstance(outcome, (Retry, Snooze, Bury)):
            raise outcome
        return outcome

    return handler


def records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "leveret.attempt"]


async def lines(
    caplog: pytest.LogCaptureFixture, outcome: Outcome | BaseException, *, seconds: float = 0.0123, **fields: Any
) -> list[logging.LogRecord]:
    """Run one attempt that ends like this, and return what `Logs` wrote."""
    caplog.set_level(logging.INFO, "leveret.attempt")
    caplog.clear()
    clock = ManualClock()
    step = chain(Logs(), handler=taking(clock, seconds, outcome), bound=runtime(clock))
    raised = outcome if isinstance(outcome, BaseException) and not isinstance(outcome, (Retry, Snooze, Bury)) else None
    with pytest.raises(type(raised)) if raised else nullcontext():
        await step(attempt(2, clock=clock, **fields))
    return records(caplog)


class Raises:
    """Middleware that raises the outcome which its handler returned."""

    async def consume(self, attempt: Attempt[Any], proceed: Any) -> Outcome:
        outcome = await proceed(attempt)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


@pytest.mark.parametrize(
    ("outcome", "text"),
    [(Done(), "done after 12.3 ms"), (Snooze(30), "snoozed after 12.3 ms, again in 30 s")],
)
async def test_a_run_that_ends_well_is_one_line(caplog: pytest.LogCaptureFixture, outcome: Outcome, text: str) -> None:
    """People filter by level, and a line in two halves isn't found."""
    (record,) = await lines(caplog, outcome)
    assert (record.levelno, record.getMessage()) == (logging.INFO, f"job greet id-1 attempt 2: {text}")


@pytest.mark.parametrize("outcome", [Retry(1), Bury("no"), Expired(), ValueError("no"), asyncio.CancelledError()])
async def test_what_the_worker_logs_is_left_to_the_worker(
    caplog: pytest.LogCaptureFixture, outcome: Outcome | BaseException
) -> None:
    """An alert on errors would count each failure twice."""
    assert not await lines(caplog, outcome)


async def test_a_snooze_that_middleware_raises_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    """A job that waits for its turn would vanish from the log."""
    caplog.set_level(logging.INFO, "leveret.attempt")
    with pytest.raises(Snooze):
        await chain(Logs(), Raises(), handler=taking(ManualClock(), 0.0, Snooze(30)))(attempt())
    (record,) = records(caplog)
    assert vars(record)["outcome"] == "snoozed"


async def test_every_value_is_in_the_record(caplog: pytest.LogCaptureFixture) -> None:
    """A JSON formatter would have to parse the text."""
    (record,) = await lines(caplog, Snooze(4.0), seconds=2.5, correlation_id="id-0")
    expected = {
        "job": "greet",
        "job_id": "id-1",
        "queue": "emails",
        "attempt": 2,
        "correlation_id": "id-0",
        "redelivered": False,
        "outcome": "snoozed",
        "duration_s": 2.5,
        "delay_s": 4.0,
    }
    assert {name: vars(record)[name] for name in expected} == expected
    assert record.getMessage() == "job greet id-1 attempt 2: snoozed after 2.5 s, again in 4 s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 ms"),
        (1, "1 s"),
        (59.5, "59.5 s"),
        (60, "1 min"),
        (125.4, "2 min 5 s"),
        (3600, "1 h"),
        (5400, "1 h 30 min"),
        (90_061, "1 d 1 h"),
        (4_147_200, "48 d"),
    ],
)
def test_a_duration_is_readable(seconds: float, text: str) -> None:
    """Nobody divides 4147200.00 s by a day in the head."""
    assert duration(seconds) == text


async def test_what_nobody_reads_is_not_made(caplog: pytest.LogCaptureFixture) -> None:
    """With the logger at ERROR a line costs nothing."""
    caplog.set_level(logging.ERROR, "leveret.attempt")
    clock = ManualClock()
    assert await chain(Logs(), handler=taking(clock, 0.0, Done()), bound=runtime(clock))(attempt()) == Done()
    assert not caplog.records


class Mute(Exception):
    """Has a text that can't be made."""

    def __str__(self) -> str:
        raise ValueError


def mute() -> None:
    raise Mute


def fail() -> None:
    raise LookupError("no\nway")


def chained() -> None:
    try:
        fail()
    except LookupError as error:
        raise Bury("no such order") from error


def give(outcome: Outcome) -> Callable[[], Outcome]:
    return lambda: outcome


@pytest.mark.parametrize("logs", [[], [Logs()]], ids=["without Logs", "with Logs"])
@pytest.mark.parametrize(
    ("layers", "act", "level", "text", "fields"),
    [
        (
            [Retries()],
            fail,
            logging.WARNING,
            r"failed after 250.0 ms, retried in \d+\.\d ms: LookupError: no way",
            {"outcome": "retry", "error": "LookupError: no way"},
        ),
        ([Retries()], mute, logging.WARNING, "failed after .*: Mute: the message can't be shown", {"outcome": "retry"}),
        (
            [],
            fail,
            logging.ERROR,
            "buried in emails.dead after 250.0 ms: LookupError: no way",
            {"outcome": "buried", "reason": "LookupError: no way", "error": "LookupError: no way"},
        ),
        (
            [Retries(max_attempts=1)],
            fail,
            logging.ERROR,
            r"buried in emails.dead after 250.0 ms: LookupError: no way \(attempt 1 of 1\)",
            {"outcome": "buried", "reason": "LookupError: no way (attempt 1 of 1)", "error": "LookupError: no way"},
        ),
        (
            [],
            chained,
            logging.ERROR,
            "buried in emails.dead after 250.0 ms: no such order",
            {"outcome": "buried", "reason": "no such order", "error": "LookupError: no way"},
        ),
        ([], give(Retry(5)), logging.WARNING, "ended after 250.0 ms, retried in 5 s", {"delay_s": 5.0}),
        (
            [],
            give(Bury("half\na pair")),
            logging.ERROR,
            "buried in emails.dead after 250.0 ms: half a pair",
            {"outcome": "buried", "reason": "half a pair"},
        ),
        ([], give(Expired()), logging.WARNING, "expired before it ran; the job is dropped", {"outcome": "expired"}),
        ([], give(Done()), logging.INFO, "done after 250.0 ms", {"outcome": "done"}),
        ([], give(Snooze(30)), logging.INFO, "snoozed after 250.0 ms, again in 30 s", {"delay_s": 30.0}),
    ],
)
async def test_each_ending_is_one_record(
    caplog: pytest.LogCaptureFixture,
    logs: list[Any],
    layers: list[Any],
    act: Callable[[], Outcome | None],
    level: int,
    text: str,
    fields: dict[str, object],
) -> None:
    """Without the middleware nobody would see a failure; with it, an alert would count each failure twice."""
    caplog.set_level(logging.INFO)
    app: App[Any] = App("logged", middleware=[*logs, *layers])

    @app.handler
    async def greet(job: Greet, attempt: Attempt) -> Outcome | None:
        if attempt.envelope.passes:
            return None
        lab.advance(0.25)
        return act()

    async with running(app) as lab:
        receipt = await lab.publish(Greet(), correlation_id="id-0")
        await lab.drain()

    found = records(caplog)
    if level == logging.INFO and not logs:
        assert not found
        return
    record, *again = found
    assert [vars(later)["outcome"] for later in again] in ([], ["done"])
    assert record.levelno == level
    assert record.getMessage().startswith(f"job greet {receipt.job_id} attempt 1: ")
    assert pytest.approx(vars(record)["duration_s"]) == 0.25
    common = {"job": "greet", "queue": "emails", "attempt": 1, "correlation_id": "id-0", "redelivered": False}
    found_fields = {name: vars(record)[name] for name in (*common, *fields)}
    assert found_fields == {**common, **fields}
    assert re.search(text, record.getMessage())
    assert bool(record.exc_info) is ("error" in fields or act is mute)
    assert not [other for other in caplog.records if other.name == "leveret.consumer"]


async def test_the_payload_is_never_in_a_record(caplog: pytest.LogCaptureFixture) -> None:
    """It holds what customers wrote."""
    caplog.set_level(logging.INFO)
    outcomes: list[Outcome | ValueError] = [Done(), Snooze(1), Retry(1), Bury("no"), ValueError("no")]
    app = App("secret", middleware=[Logs(), Retries(), Timeout(30)])

    @app.handler
    async def greet(job: Greet, attempt: Attempt) -> Outcome:
        outcome = outcomes.pop() if outcomes else Done()
        if isinstance(outcome, ValueError):
            raise outcome
        return outcome

    async with running(app) as lab:
        for _ in range(len(outcomes)):
            await lab.publish(Greet(who="secret"))
        await lab.drain()

    assert len(records(caplog)) >= 5
    assert "secret" not in "".join(repr(vars(record)) for record in records(caplog))
