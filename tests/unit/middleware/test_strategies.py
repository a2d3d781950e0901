"""`Retries` with waits and stops that a user gives: functions, and tenacity's strategies."""

import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import tenacity
from tenacity import (
    stop_after_attempt,
    stop_after_delay,
    stop_any,
    stop_before_delay,
    stop_when_event_set,
    wait_chain,
    wait_exception,
    wait_exponential_jitter,
    wait_fixed,
    wait_random,
)

from leveret import App, Attempt, Bury, ConfigurationError, Outcome, Retry
from leveret.clock import ManualClock
from leveret.middleware import Retries, Rule
from leveret.testing import running
from tests.unit.middleware.test_retries import failing, saying
from tests.unit.runs import Greet, attempt, chain, runtime


class TooManyRequests(Exception):
    """A server that says when to come back."""

    def __init__(self, retry_after: Any) -> None:
        super().__init__("429")
        self.retry_after = retry_after


def when_told(attempt: Attempt[Any], error: Any) -> float:
    """A wait with a name."""
    return cast("float", error.retry_after)


async def after(layer: Retries, error: Exception, number: int = 1, *, age_s: float = 0.0) -> Outcome:
    """Return the outcome of a run that failed, of a job that first arrived `age_s` ago."""
    clock = ManualClock()
    first_seen_ms = int((clock.now() - age_s) * 1000)
    step = chain(layer, handler=failing(error), bound=runtime(clock))
    return await step(attempt(number, clock=clock, first_seen_ms=first_seen_ms))


async def test_a_function_computes_the_wait() -> None:
    """A server's `Retry-After` would be ignored: too early is refused again, too late is a needless wait."""
    layer = Retries(Rule(TooManyRequests, wait=lambda attempt, error: error.retry_after * attempt.number))

    assert await after(layer, TooManyRequests(120), 2) == Retry(240)
    assert await after(layer, TooManyRequests(0)) == Retry(0)
    assert await after(layer, TooManyRequests(120), 5) == Bury("TooManyRequests: 429 (attempt 5 of 5)")


async def test_tenacitys_waits_are_called_with_the_brokers_attempt() -> None:
    """A strategy that saw attempt 1 each time would never wait longer."""
    chained = Retries(wait=wait_chain(wait_fixed(1), wait_fixed(60) + wait_fixed(3)), max_attempts=9)
    told = Retries(wait=wait_exception(lambda error: error.retry_after), max_attempts=9)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    jitter = Retries(wait=wait_exponential_jitter(max=60), max_attempts=9)

    assert [await after(chained, ValueError(), number) for number in (1, 2, 7)] == [Retry(1), Retry(63), Retry(63)]
    assert await after(told, TooManyRequests(7)) == Retry(7)
    for number, least, most in ((1, 1, 2), (4, 8, 9), (8, 60, 60)):
        outcome = await after(jitter, ValueError(), number)
        assert isinstance(outcome, Retry)
        assert least <= cast("float", outcome.delay_s) <= most


async def test_tenacitys_stops_decide_when_the_job_is_buried() -> None:
    """The default of five attempts would bury before, or a job would be retried for ever."""
    layer = Retries(Rule(ValueError, wait=wait_fixed(3), stop=stop_after_attempt(8)), max_attempts=2)

    assert await after(layer, ValueError("no"), 7) == Retry(3)
    assert await after(layer, ValueError("no"), 8) == Bury("ValueError: no (attempt 8, stop_after_attempt(8))")
    assert await after(layer, KeyError("x"), 2) == Bury("KeyError: 'x' (attempt 2 of 2)")


async def test_the_time_of_a_stop_starts_at_the_jobs_first_delivery() -> None:
    """Counted from this process's start or this run, an hour would never be over."""
    layer = Retries(stop=stop_any(stop_after_delay(3600), stop_after_attempt(100)), wait=wait_fixed(30))
    before = Retries(stop=stop_before_delay(3600), wait=wait_fixed(30))

    assert await after(layer, ValueError(), 9, age_s=3599) == Retry(30)
    assert await after(layer, ValueError(), 9, age_s=3600) == Bury(
        "ValueError (attempt 9, stop_any(stop_after_delay(3600), stop_after_attempt(100)))"
    )
    assert await after(before, ValueError(), 9, age_s=3569) == Retry(30)
    assert isinstance(await after(before, ValueError(), 9, age_s=3570), Bury)


async def test_a_rule_takes_what_it_does_not_say_from_retries() -> None:
    """A rule with a figure of its own must not be overruled by the strategy for everything else."""
    layer = Retries(
        Rule(KeyError, immediate=0),
        Rule(IndexError, base_s=1, cap_s=1),
        Rule(OSError, max_attempts=2),
        wait=wait_fixed(77),
        stop=stop_after_attempt(3),
    )

    assert await after(layer, KeyError("x"), 2) == Retry(77)
    assert isinstance(await after(layer, KeyError("x"), 3), Bury)
    outcome = await after(layer, IndexError(), 2)
    assert isinstance(outcome, Retry)
    assert cast("float", outcome.delay_s) <= 1
    assert isinstance(await after(layer, IndexError(), 3), Bury)
    assert await after(layer, OSError("no"), 1) == Retry(77)
    assert await after(layer, OSError("no"), 2) == Bury("OSError: no (attempt 2 of 2)")


async def test_a_requested_retry_follows_the_strategies_too() -> None:
    """`Retry()` leaves the wait to `Retries`, and counts: without the stop it would come back for ever."""
    layer = Retries(wait=wait_fixed(7), stop=stop_after_attempt(3))

    assert await chain(layer, handler=saying(Retry()))(attempt(2)) == Retry(7)
    assert await chain(layer, handler=saying(Retry(120)))(attempt(2)) == Retry(120)
    assert await chain(layer, handler=saying(Retry(120)))(attempt(3)) == Bury(
        "a retry was requested (attempt 3, stop_after_attempt(3))"
    )


@pytest.mark.parametrize("given", [None, "30", -1, float("nan"), float("inf"), 49 * 86_400, True, [30]], ids=repr)
async def test_a_wait_that_is_no_wait_falls_back_to_the_back_off(given: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The broker would refuse the delay, and the job with it; a guess must show in the log."""
    outcome = await after(Retries(Rule(TooManyRequests, wait=when_told, base_s=4, cap_s=4)), TooManyRequests(given))

    assert isinstance(outcome, Retry)
    assert 0 <= cast("float", outcome.delay_s) <= 4
    assert isinstance(outcome.__cause__, TooManyRequests)
    [record] = caplog.records
    said = "job greet id-1: wait=when_told of Retries failed, so the back-off computes the wait: ValueError: it must return seconds"
    assert (record.levelno, record.name) == (logging.WARNING, "leveret.retries")
    assert record.getMessage().startswith(said)
    assert record.getMessage().endswith(f"not {given!r}")


async def test_a_strategy_that_raises_loses_no_job(caplog: pytest.LogCaptureFixture) -> None:
    """A bug in a wait must not bury the job at once, and one in a stop must not let the job live for ever."""
    told = Retries(Rule(ValueError, wait=when_told))
    broken = Retries(stop=stop_after_attempt(cast("Any", "8")), wait=wait_fixed(7))

    assert isinstance(await after(told, ValueError("no")), Retry)
    assert await after(broken, ValueError("no"), 4) == Retry(7)
    assert isinstance(await after(broken, ValueError("no"), 5), Bury)
    assert len(caplog.records) == 3
    assert "failed, so the back-off computes the wait: AttributeError: 'ValueError' object has no" in caplog.text
    assert "failed, so the job is buried after 5 runs: TypeError" in caplog.text
    assert all(record.exc_info for record in caplog.records)


async def test_tries_in_place_come_before_a_strategy() -> None:
    """`immediate` is for what is over in a moment; the wait of a strategy is not."""
    calls: list[int] = []

    def wait(attempt: Attempt[Any], error: Exception) -> float:
        calls.append(attempt.number)
        return 9

    layer = Retries(Rule(ConnectionError, immediate=2, wait=wait))
    errors = [ConnectionError("1"), ConnectionError("2")]
    app = App("shop", middleware=[layer])

    @app.handler
    async def greet(job: Greet) -> None:
        if errors:
            raise errors.pop()

    async with running(app) as lab:
        await lab.publish(Greet())
        await lab.drain()
        assert (len(lab.done), calls) == (1, [])


async def test_through_an_app_the_job_comes_back_when_the_strategy_says() -> None:
    """The wait must reach the broker."""
    app, seen = App("shop", middleware=[Retries(wait=wait_fixed(60), stop=stop_after_delay(150))]), list[int]()

    @app.handler
    async def greet(job: Greet, attempt: Attempt) -> None:
        seen.append(attempt.number)
        raise ValueError("no")

    async with running(app) as lab:
        await lab.publish(Greet())
        await lab.drain()
        [buried] = lab.buried
    assert seen == [1, 2, 3, 4]
    assert buried.outcome == Bury("ValueError: no (attempt 4, stop_after_delay(150))")


class Doubled(tenacity.wait.wait_base):
    """A user's own strategy of tenacity."""

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        return retry_state.attempt_number * 2


async def test_a_users_own_strategy_of_tenacity_works() -> None:
    """Tenacity's users subclass `wait_base`; taken for a function of two arguments, it would fail at each failure."""
    assert await after(Retries(wait=Doubled() + wait_fixed(1)), ValueError(), 3) == Retry(7)


async def slow(attempt: Attempt[Any], error: Exception) -> float:
    """No wait."""
    return 3


@pytest.mark.parametrize("make", [Retries, lambda **given: Rule(ValueError, **given)], ids=["Retries", "Rule"])
@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"stop": stop_after_attempt(3), "max_attempts": 3}, ConfigurationError, "stop and max_attempts both say"),
        ({"wait": 30}, TypeError, "wait must be a plain function of .* not 30"),
        ({"wait": slow}, TypeError, "wait must be a plain function"),
        ({"wait": lambda error: 3}, TypeError, "wait must be a plain function"),
        ({"wait": wait_random}, TypeError, "wait must be a plain function"),
        ({"wait": stop_after_attempt(3)}, TypeError, "wait must be a plain function"),
        ({"stop": 3}, TypeError, "for a number of runs, give max_attempts"),
        ({"stop": stop_after_attempt}, TypeError, "stop must be a stop strategy of tenacity"),
        ({"stop": wait_fixed(3)}, TypeError, "stop must be a stop strategy of tenacity"),
        ({"stop": lambda attempt, error: True}, TypeError, "stop must be a stop strategy of tenacity"),
    ],
)
def test_what_cannot_work_is_refused_where_it_is_written(
    make: Callable[..., object], given: dict[str, Any], kind: type[Exception], text: str
) -> None:
    """It would show at the first failure, in production, on the path that saves jobs."""
    with pytest.raises(kind, match=text):
        make(**given)


def test_a_rule_that_buries_has_no_strategy() -> None:
    """One of the two would have no effect, and nobody would know which."""
    with pytest.raises(ValueError, match="bury=True, max_attempts, base_s, cap_s, wait and stop have no effect"):
        Rule(ValueError, bury=True, wait=wait_fixed(3))


def test_strategies_are_shown_as_they_are_written() -> None:
    """`describe` and dead letters would show `<tenacity.wait.wait_fixed object at 0x7f…>`."""
    jitter = wait_exponential_jitter(max=60)
    layer = Retries(
        Rule(KeyError, wait=when_told, stop=stop_any(stop_after_delay(90), stop_after_attempt(3))),
        Rule(OSError, wait=lambda attempt, error: 1),
        wait=jitter + wait_random(0, 2),
        stop=stop_after_attempt(8),
    )

    line = cast("Any", layer.rules[1].wait).__code__.co_firstlineno
    assert repr(layer) == (
        "Retries(Rule(KeyError, wait=when_told, stop=stop_any(stop_after_delay(90), stop_after_attempt(3))), "
        f"Rule(OSError, wait=the lambda at test_strategies.py:{line}), base_s=1, cap_s=600, "
        "wait=wait_combine(wait_exponential_jitter(max=60), wait_random(0, 2)), stop=stop_after_attempt(8))"
    )
    assert "stop_when_event_set(<threading.Event" in repr(Retries(stop=stop_when_event_set(threading.Event())))


def test_the_facts_say_what_is_known() -> None:
    """The start-up check and `describe` would fail on a rule without a number of runs, or show a wrong one."""
    waits = Retries(Rule(KeyError, wait=when_told), Rule(OSError, base_s=1), stop=stop_after_attempt(8)).facts().retries

    assert [(one.on, one.max_attempts, one.wait, one.stop, one.ceilings_s[:3]) for one in waits] == [
        ("KeyError", None, "when_told", "stop_after_attempt(8)", ()),
        ("OSError", None, None, "stop_after_attempt(8)", (1, 2, 4)),
        (None, None, None, "stop_after_attempt(8)", (1, 2, 4)),
    ]


def test_tenacity_is_not_imported_for_those_who_do_not_use_it() -> None:
    """It brings asyncio helpers and more: 20 ms and a dependency in every worker."""
    program = (
        "import sys; from leveret.middleware import Retries, Rule\n"
        "repr(Retries(Rule(KeyError, wait=lambda attempt, error: 1)).facts())\n"
        "print('tenacity' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n"
