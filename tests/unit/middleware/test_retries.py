"""`Retries`: which failure comes back when, and which is buried."""

import asyncio
import functools
import gc
import logging
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from tenacity import stop_after_attempt, wait_fixed

from leveret import App, Attempt, Bury, Done, Expired, Outcome, Retry, Snooze
from leveret.clock import ManualClock
from leveret.middleware import RateLimit, Retries, Rule
from leveret.testing import running
from tests.unit.runs import Greet, attempt, chain, runtime


def failing(*errors: BaseException) -> Callable[[Attempt[Any]], Awaitable[Outcome | None]]:
    """A handler that raises these, one a call, and then is done."""
    left = list(errors)

    async def handler(_: Attempt[Any]) -> None:
        if left:
            raise left.pop(0)

    return handler


def saying(outcome: Outcome) -> Callable[[Attempt[Any]], Awaitable[Outcome]]:
    async def handler(_: Attempt[Any]) -> Outcome:
        return outcome

    return handler


async def ticking(clock: ManualClock, run: Awaitable[Outcome]) -> Outcome:
    """Await `run` while the clock is moved on to whatever it waits for."""
    task = asyncio.ensure_future(run)
    while not task.done():
        await asyncio.sleep(0)
        if clock.sleepers:
            clock.advance(cast("float", clock.next_due_in_s()))
    return await task


async def test_a_failure_comes_back_after_a_jittered_wait_below_its_ceiling() -> None:
    """Without the jitter jobs that failed together come back together, and fail together."""
    layer = Retries(base_s=2.0, cap_s=5.0, max_attempts=9)
    for number, ceiling_s in ((1, 2.0), (2, 4.0), (3, 5.0), (8, 5.0)):
        waits = []
        for seed in range(40):
            outcome = await chain(layer, handler=failing(ValueError("no")), bound=runtime(seed=seed))(attempt(number))
            assert isinstance(outcome, Retry)
            waits.append(cast("float", outcome.delay_s))
        assert all(0 <= wait <= ceiling_s for wait in waits)
        assert max(waits) > 0.7 * ceiling_s
        assert min(waits) < 0.3 * ceiling_s


async def test_the_error_travels_with_the_retry() -> None:
    """Lost, the dead letter would say how often a job failed, and not why."""
    error = ValueError("no")
    outcome = await chain(Retries(), handler=failing(error))(attempt())
    assert isinstance(outcome, Retry)
    assert outcome.__cause__ is error


async def test_the_last_attempt_is_buried_with_a_reason_on_one_line() -> None:
    """A job that always fails would come back for ever, or be buried without a word."""
    error = ValueError("no\n  such order")
    outcome = await chain(Retries(max_attempts=5), handler=failing(error))(attempt(5))
    assert outcome == Bury("ValueError: no such order (attempt 5 of 5)")
    assert isinstance(outcome, Bury)
    assert outcome.__cause__ is error


async def test_more_attempts_than_are_allowed_now_are_buried() -> None:
    """After a deploy that lowers max_attempts, jobs past it would never end."""
    outcome = await chain(Retries(max_attempts=2), handler=failing(KeyError("x")))(attempt(7))
    assert outcome == Bury("KeyError: 'x' (attempt 7 of 2)")


async def test_the_first_rule_that_matches_wins() -> None:
    """Rules are read from above; a later, wider one must not undo an earlier one."""
    layer = Retries(
        Rule(ConnectionRefusedError, bury=True), Rule(OSError, max_attempts=9), Rule(Exception, max_attempts=1)
    )
    said = [
        await chain(layer, handler=failing(error))(attempt(2))
        for error in (ConnectionRefusedError("closed"), ConnectionResetError("reset"), ValueError("no"))
    ]
    assert said[0] == Bury("ConnectionRefusedError: closed (a rule buries it at once)")
    assert isinstance(said[1], Retry)
    assert said[2] == Bury("ValueError: no (attempt 2 of 1)")


async def test_a_rule_leaves_what_it_does_not_say_to_retries() -> None:
    """Or a rule for one figure would silently reset the others."""
    layer = Retries(Rule(ValueError, cap_s=3.0), max_attempts=3, base_s=3.0)
    outcome = await chain(layer, handler=failing(ValueError()))(attempt(2))
    assert isinstance(outcome, Retry)
    assert cast("float", outcome.delay_s) <= 3.0
    assert await chain(layer, handler=failing(ValueError()))(attempt(3)) == Bury("ValueError (attempt 3 of 3)")


async def test_a_tuple_and_a_predicate_match() -> None:
    """They are how a rule speaks of several errors, or of a status code."""
    layer = Retries(Rule((KeyError, IndexError), bury=True), Rule(is_busy, max_attempts=1))
    for error in (KeyError("x"), IndexError("x"), RuntimeError("busy")):
        assert isinstance(await chain(layer, handler=failing(error))(attempt()), Bury)
    assert isinstance(await chain(layer, handler=failing(RuntimeError("other")))(attempt()), Retry)


async def test_a_group_of_one_error_matches_as_that_error() -> None:
    """A handler that uses a TaskGroup would find that none of its rules applies."""
    layer = Retries(Rule(ValueError, bury=True))
    one = ExceptionGroup("one", [ExceptionGroup("inner", [ValueError("no")])])
    two = ExceptionGroup("two", [ValueError("a"), ValueError("b")])
    assert isinstance(await chain(layer, handler=failing(one))(attempt()), Bury)
    assert isinstance(await chain(layer, handler=failing(two))(attempt()), Retry)


async def test_a_predicate_that_raises_is_logged_and_does_not_match(caplog: pytest.LogCaptureFixture) -> None:
    """A bug in a predicate must neither bury a job nor hide."""

    def broken(error: Exception) -> bool:
        return error.args[7] == "x"

    outcome = await chain(Retries(Rule(broken, bury=True)), handler=failing(ValueError("no")))(attempt())
    assert isinstance(outcome, Retry)
    (record,) = [record for record in caplog.records if record.name == "leveret.retries"]
    assert (record.levelno, "broken" in record.getMessage(), "ValueError: no" in record.getMessage()) == (
        logging.ERROR,
        True,
        True,
    )


async def test_a_predicate_that_returns_a_coroutine_does_not_match(caplog: pytest.LogCaptureFixture) -> None:
    """A coroutine is true, whatever it would have answered: the rule would match everything."""

    async def really(_: Exception) -> bool:
        return False

    outcome = await chain(
        Retries(Rule(lambda error: cast("bool", really(error)), bury=True)), handler=failing(ValueError("no"))
    )(attempt())
    assert isinstance(outcome, Retry)
    assert "a predicate must not be async" in caplog.text


async def test_immediate_tries_run_in_place_within_one_attempt() -> None:
    """What is over in a moment would cost an attempt and a trip through the broker."""
    clock, numbers = ManualClock(), list[int]()
    errors = [ConnectionError("1"), ConnectionError("2")]

    async def handler(attempt: Attempt[Any]) -> None:
        numbers.append(attempt.number)
        if errors:
            raise errors.pop()

    step = chain(Retries(Rule(ConnectionError, immediate=2)), handler=handler, bound=runtime(clock))
    assert await ticking(clock, step(attempt())) == Done()
    assert numbers == [1, 1, 1]
    assert 0 < clock.monotonic() <= 0.1


async def test_immediate_tries_end_and_then_it_waits() -> None:
    """Or a broken dependency is hammered for ever from one slot."""
    clock = ManualClock()
    step = chain(
        Retries(Rule(ConnectionError, immediate=2)),
        handler=failing(*(ConnectionError(str(n)) for n in range(9))),
        bound=runtime(clock),
    )
    outcome = await ticking(clock, step(attempt()))
    assert isinstance(outcome, Retry)
    assert str(outcome.__cause__) == "2"


async def test_immediate_tries_of_several_rules_are_counted_together() -> None:
    """Two errors that alternate must not run in place for ever."""
    clock = ManualClock()
    layer = Retries(Rule(KeyError, immediate=2), Rule(IndexError, immediate=2))
    step = chain(layer, handler=failing(*[KeyError("k"), IndexError("i")] * 5), bound=runtime(clock))
    outcome = await ticking(clock, step(attempt()))
    assert isinstance(outcome, Retry)
    assert isinstance(outcome.__cause__, KeyError)


async def test_a_rule_that_buries_may_try_in_place_first() -> None:
    """`immediate` says what comes first, `bury` what comes instead of a wait."""
    clock = ManualClock()
    step = chain(
        Retries(Rule(KeyError, immediate=1, bury=True)),
        handler=failing(KeyError("a"), KeyError("b")),
        bound=runtime(clock),
    )
    assert await ticking(clock, step(attempt())) == Bury("KeyError: 'b' (a rule buries it at once)")


async def test_a_try_in_place_that_is_put_off_counts_as_the_failure_before_it() -> None:
    """A rate limit inside would turn every failure into a snooze, and a job that always fails would never be buried."""
    clock = ManualClock()
    layers = [Retries(Rule(ValueError, immediate=1), max_attempts=2), RateLimit(1, every_s=60.0)]
    step = chain(*layers, handler=failing(*[ValueError("no")] * 9), bound=runtime(clock))
    first = await ticking(clock, step(attempt(1)))
    assert isinstance(first, Retry)
    assert cast("float", first.delay_s) > 50
    clock.advance(60)
    assert await ticking(clock, step(attempt(2))) == Bury("ValueError: no (attempt 2 of 2)")


async def test_a_cancelled_run_is_not_tried_again() -> None:
    """A shutdown would wait for a handler that starts anew each time it is cancelled."""
    starts = 0

    async def handler(_: Attempt[Any]) -> None:
        nonlocal starts
        starts += 1
        await asyncio.Event().wait()

    task = asyncio.ensure_future(chain(Retries(Rule(Exception, immediate=5)), handler=handler)(attempt()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert starts == 1


async def test_a_cancelled_error_without_a_cancel_is_a_failure_like_others() -> None:
    """Middleware awaits a future that somebody else cancelled: the job was buried at its first attempt."""
    outcome = await chain(Retries(), handler=failing(asyncio.CancelledError()))(attempt())

    assert isinstance(outcome, Retry)
    assert "nothing had cancelled the run" in str(outcome.__cause__)


async def test_a_wait_that_raises_cancelled_error_is_computed_by_the_back_off() -> None:
    """As for every other error of a strategy: it must not bury the job."""

    def wait(_: Attempt[Any], __: BaseException) -> float:
        raise asyncio.CancelledError

    outcome = await chain(Retries(wait=wait), handler=failing(ValueError("no")))(attempt())

    assert isinstance(outcome, Retry)


async def test_a_timeout_error_is_a_failure_like_others() -> None:
    """It is the commonest failure of all."""
    assert isinstance(await chain(Retries(), handler=failing(TimeoutError("30 s")))(attempt()), Retry)


async def test_an_asked_retry_without_a_delay_gets_the_computed_one() -> None:
    """At once would spin: `Retry()` says that the wait is ours to choose."""
    waits = set()
    for seed in range(5):
        outcome = await chain(Retries(base_s=1.0), handler=saying(Retry()), bound=runtime(seed=seed))(attempt(3))
        assert isinstance(outcome, Retry)
        assert 0 <= cast("float", outcome.delay_s) <= 4.0
        waits.add(outcome.delay_s)
    assert len(waits) == 5


async def test_an_asked_retry_keeps_its_own_delay() -> None:
    """A handler that was told `Retry-After: 120` knows better than any formula."""
    assert await chain(Retries(), handler=saying(Retry(120)))(attempt(2)) == Retry(120)


async def test_an_asked_retry_is_buried_at_max_attempts() -> None:
    """It counts: asked for without end, the job would live for ever."""
    asked = Retry(120)
    assert await chain(Retries(max_attempts=2), handler=saying(asked))(attempt(2)) == Bury(
        "a retry was requested (attempt 2 of 2)"
    )
    asked.__cause__ = OSError("gone")
    outcome = await chain(Retries(max_attempts=2), handler=saying(asked))(attempt(2))
    assert outcome == Bury("OSError: gone (attempt 2 of 2)")
    assert isinstance(outcome, Bury)
    assert outcome.__cause__ is asked.__cause__


@pytest.mark.parametrize("outcome", [Done(), Expired(), Snooze(30), Bury("no such customer")])
async def test_other_outcomes_pass(outcome: Outcome) -> None:
    """Snoozing costs no attempt, and a burial is final, at any attempt."""
    assert await chain(Retries(max_attempts=1), handler=saying(outcome))(attempt(9)) is outcome


async def test_an_outcome_that_a_layer_raises_is_no_failure() -> None:
    """A circuit breaker inside that raises `Snooze(30)` would use up attempts."""

    async def breaker(attempt: Attempt[Any], proceed: Any) -> Outcome:
        raise Snooze(30)

    assert await chain(Retries(), breaker, handler=failing())(attempt()) == Snooze(30)


@pytest.mark.parametrize(
    "rule",
    [
        Rule(ValueError, immediate=1),
        Rule(ValueError, immediate=1, wait=wait_fixed(1), stop=stop_after_attempt(8)),
    ],
    ids=["back-off", "tenacity"],
)
async def test_a_failure_is_freed_without_the_garbage_collector(rule: Rule) -> None:
    """A cycle of error, traceback and frame would keep each failed job's data until the collector comes round."""

    class Payload:
        pass

    seen: list[weakref.ref[Payload]] = []

    async def handler(_: Attempt[Any]) -> None:
        payload = Payload()
        seen.append(weakref.ref(payload))
        raise ValueError("no")

    clock = ManualClock()
    step = chain(Retries(rule), handler=handler, bound=runtime(clock))
    gc.disable()
    try:
        assert isinstance(await ticking(clock, step(attempt())), Retry)
        await asyncio.sleep(0)
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


async def test_a_message_that_cannot_be_shown_does_not_stop_the_burial() -> None:
    """A `__str__` that raises would take the job's ending with it."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    outcome = await chain(Retries(max_attempts=1), handler=failing(Mute()))(attempt())
    assert isinstance(outcome, Bury)
    assert "the message can't be shown" in outcome.reason


async def test_through_an_app_a_job_fails_comes_back_and_is_buried() -> None:
    """The layer's outcome must reach the broker, attempts must rise, and the reason must arrive with the dead letter."""
    app = App("shop", middleware=[Retries(Rule(KeyError, bury=True), max_attempts=3)])

    @app.handler
    async def greet(job: Greet, attempt: Attempt[None]) -> None:
        raise (KeyError if job.who == "Eve" else ValueError)(job.who)

    async with running(app) as lab:
        thrice = (await lab.publish(Greet("Bob"))).job_id
        once = (await lab.publish(Greet("Eve"))).job_id
        await lab.drain()
        assert [run.number for run in lab.attempts(thrice)] == [1, 2, 3]
        assert [run.number for run in lab.attempts(once)] == [1]
        assert {run.outcome for run in lab.buried} == {
            Bury("ValueError: Bob (attempt 3 of 3)"),
            Bury("KeyError: 'Eve' (a rule buries it at once)"),
        }


def is_busy(error: Exception) -> bool:
    """A predicate with a name."""
    return "busy" in str(error)


async def asynchronous(error: Exception) -> bool:
    """No predicate."""
    return True


@pytest.mark.parametrize(
    ("on", "kind", "text"),
    [
        (bool, TypeError, "isn't an exception type"),
        (int, TypeError, "isn't an exception type"),
        (ValueError("x"), TypeError, "the type, ValueError"),
        ([ValueError], TypeError, "make it a tuple"),
        ((), ValueError, "empty tuple"),
        ((ValueError, "x"), TypeError, "'x' isn't an exception type"),
        ("ValueError", TypeError, "'ValueError'"),
        (asyncio.CancelledError, TypeError, "only subclasses of Exception are caught"),
        (KeyboardInterrupt, TypeError, "only subclasses of Exception are caught"),
        (asynchronous, TypeError, "is async"),
        (functools.partial(asynchronous), TypeError, "is async"),
        (lambda: True, TypeError, "must take one argument"),
        (lambda a, b: True, TypeError, "must take one argument"),
        (None, TypeError, "not None"),
    ],
)
def test_what_a_rule_cannot_be_on_is_refused(on: Any, kind: type[Exception], text: str) -> None:
    """`Rule(bool)` would be asked of each error and be true of all; the type checkers let it through."""
    with pytest.raises(kind, match=text):
        Rule(on)


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        ({"max_attempts": 0}, ValueError, "max_attempts must be at least 1, not 0"),
        ({"max_attempts": True}, TypeError, "max_attempts must be an int"),
        ({"max_attempts": 2.0}, TypeError, "max_attempts must be an int"),
        ({"base_s": 0}, ValueError, "base_s must be above 0"),
        ({"base_s": float("nan")}, ValueError, "base_s must be above 0"),
        ({"cap_s": float("inf")}, ValueError, "cap_s must be above 0 and at most 48 days"),
        ({"cap_s": "1"}, TypeError, "cap_s must be a number of seconds"),
    ],
)
def test_wrong_figures_are_refused_where_they_are_written(
    wrong: dict[str, Any], kind: type[Exception], text: str
) -> None:
    """They would show at the first failure, in production, on the path that saves jobs."""
    for make in (Retries, functools.partial(Rule, ValueError)):
        with pytest.raises(kind, match=text):
            make(**wrong)


def test_figures_that_contradict_each_other_are_refused() -> None:
    """One of the two would have no effect, and nobody would know which."""
    with pytest.raises(ValueError, match=r"base_s \(5\) is above cap_s \(2\)"):
        Retries(base_s=5, cap_s=2)
    with pytest.raises(ValueError, match=r"Rule\(KeyError, base_s=900\): base_s \(900\) is above cap_s \(600\)"):
        Retries(Rule(KeyError, base_s=900))
    with pytest.raises(ValueError, match="bury=True"):
        Rule(KeyError, bury=True, max_attempts=3)
    with pytest.raises(ValueError, match="immediate must be at least 0"):
        Rule(KeyError, immediate=-1)
    with pytest.raises(TypeError, match="takes rules"):
        Retries(cast("Rule", ValueError))


def test_it_says_what_it_was_made_with() -> None:
    """`describe` and errors name a layer by its repr, and `describe` prints the waits."""
    layer = Retries(Rule((KeyError, OSError), immediate=2), Rule(is_busy, bury=True), max_attempts=4, cap_s=3)
    assert (
        repr(layer)
        == "Retries(Rule((KeyError, OSError), immediate=2), Rule(is_busy, bury=True), max_attempts=4, base_s=1, cap_s=3)"
    )
    assert layer.waits_s == [1.0, 2.0, 3.0]
