"""`Logs`: one structured line an attempt."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Any, cast

import pytest

from leveret import Attempt, Bury, Done, Expired, Outcome, Retry, Snooze
from leveret.clock import ManualClock
from leveret.middleware import Logs, Retries
from tests.unit.runs import attempt, chain, runtime


def taking(
    clock: ManualClock, seconds: float, outcome: Outcome | BaseException
) -> Callable[[Attempt[Any]], Awaitable[Outcome]]:
    async def handler(_: Attempt[Any]) -> Outcome:
        clock.advance(seconds)
        if isinstance(outcome, BaseException) and not isinstance(outcome, (Retry, Snooze, Bury)):
            raise outcome
        return outcome

    return handler


async def line(
    caplog: pytest.LogCaptureFixture,
    outcome: Outcome | BaseException,
    *layers: Any,
    seconds: float = 0.0123,
    **fields: Any,
) -> logging.LogRecord:
    """Run one attempt that ends like this, and return its only line."""
    caplog.set_level(logging.INFO, "leveret.attempt")
    caplog.clear()
    clock = ManualClock()
    step = chain(*(layers or (Logs(),)), handler=taking(clock, seconds, outcome), bound=runtime(clock))
    raised = outcome if isinstance(outcome, BaseException) and not isinstance(outcome, (Retry, Snooze, Bury)) else None
    with pytest.raises(type(raised)) if raised else nullcontext():
        await step(attempt(2, **fields))
    (record,) = [record for record in caplog.records if record.name == "leveret.attempt"]
    return record


def caused(outcome: Retry | Bury, error: Exception) -> Outcome:
    outcome.__cause__ = error
    return outcome


@pytest.mark.parametrize(
    ("outcome", "level", "text"),
    [
        (Done(), logging.INFO, "done after 12.3 ms"),
        (Snooze(30), logging.INFO, "snoozed after 12.3 ms, again in 30.00 s"),
        (Expired(), logging.WARNING, "expired after 12.3 ms"),
        (Retry(), logging.WARNING, "retry after 12.3 ms"),
        (
            caused(Retry(1.5), ValueError("no\nway")),
            logging.WARNING,
            "retry after 12.3 ms, again in 1.50 s: ValueError: no way",
        ),
        (
            caused(Bury("no way\n(attempt 5 of 5)"), ValueError("no way")),
            logging.ERROR,
            "buried after 12.3 ms: no way (attempt 5 of 5)",
        ),
        (ValueError("no\nway"), logging.ERROR, "failed after 12.3 ms: ValueError: no way"),
        (asyncio.CancelledError(), logging.WARNING, "cancelled after 12.3 ms"),
    ],
)
async def test_each_ending_is_one_line_at_its_level(
    caplog: pytest.LogCaptureFixture, outcome: Outcome | BaseException, level: int, text: str
) -> None:
    """People filter by level: a burial that is INFO isn't seen, a line in two halves isn't found."""
    record = await line(caplog, outcome)
    assert (record.levelno, record.getMessage()) == (level, f"job greet id-1 attempt 2: {text}")


async def test_an_error_whose_text_cannot_be_made_is_retried_like_any_other(caplog: pytest.LogCaptureFixture) -> None:
    """The line would raise outside of `Retries`, and bury the job at its first attempt."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    outcome = await chain(Logs(), Retries(), handler=taking(ManualClock(), 0.0, Mute()))(attempt())
    (record,) = [record for record in caplog.records if record.name == "leveret.attempt"]
    assert isinstance(outcome, Retry)
    assert cast("Any", record).error.startswith("test_an_error_whose_text")
    assert cast("Any", record).error.endswith("Mute: the message can't be shown: __str__ raises")


async def test_every_value_is_in_the_record(caplog: pytest.LogCaptureFixture) -> None:
    """A JSON formatter would have to parse the text."""
    error = OSError("gone")
    record = await line(caplog, caused(Retry(4.0), error), seconds=2.5, correlation_id="id-0")
    expected = {
        "job": "greet",
        "job_id": "id-1",
        "queue": "emails",
        "attempt": 2,
        "correlation_id": "id-0",
        "redelivered": False,
        "outcome": "retry",
        "duration_s": 2.5,
        "delay_s": 4.0,
        "error": "OSError: gone",
    }
    assert {name: vars(record)[name] for name in expected} == expected
    assert record.getMessage() == "job greet id-1 attempt 2: retry after 2.50 s, again in 4.00 s: OSError: gone"
    record = await line(caplog, Bury("no such customer"))
    assert (cast("Any", record).outcome, cast("Any", record).reason) == ("buried", "no such customer")


async def test_the_payload_is_never_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """It holds what customers wrote."""
    for outcome in (Done(), Retry(1), Bury("no"), ValueError("no")):
        record = await line(caplog, outcome, body=b'{"who":"secret"}')
        assert "secret" not in repr(vars(record))


async def test_outside_of_retries_it_sees_what_became_of_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    """The usual order: the line says retry or burial, with the error."""
    record = await line(caplog, Done(), Logs(), Retries())
    assert record.getMessage() == "job greet id-1 attempt 2: done after 12.3 ms"
    caplog.clear()
    clock = ManualClock()
    await chain(Logs(), Retries(max_attempts=2), handler=taking(clock, 0.0, ValueError("no")), bound=runtime(clock))(
        attempt(2)
    )
    (record,) = [record for record in caplog.records if record.name == "leveret.attempt"]
    assert (record.levelno, cast("Any", record).error) == (logging.ERROR, "ValueError: no")


async def test_what_nobody_reads_is_not_made(caplog: pytest.LogCaptureFixture) -> None:
    """With the logger at ERROR a line costs nothing."""
    caplog.set_level(logging.ERROR, "leveret.attempt")
    clock = ManualClock()
    assert await chain(Logs(), handler=taking(clock, 0.0, Done()), bound=runtime(clock))(attempt()) == Done()
    assert not caplog.records
