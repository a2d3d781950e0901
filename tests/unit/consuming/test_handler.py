"""Which functions may be handlers, and what becomes of whatever they return or raise."""

import asyncio
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from leveret import App, Attempt, Bury, ConfigurationError, Consume, Done, Job, Outcome, Queue, Retry, Snooze
from leveret.middleware import Retries, Rule, Timeout
from leveret.testing import attempt as make_attempt
from leveret.testing import running

if TYPE_CHECKING:
    from nowhere import Missing  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]

things = Queue("things")


class Thing(Job, name="thing.do", queue=things):
    """A job."""

    n: int = 0


class Nameless(Job):
    """Abstract."""


def no_job() -> None: ...
def three(job: Thing, attempt: Attempt, more: int) -> None: ...
def not_annotated(job) -> None: ...
def no_struct(job: int) -> None: ...
def abstract(job: Nameless) -> None: ...
def generates(job: Thing) -> Any:
    yield 1


def type_checking(job: "Missing") -> None: ...
def no_attempt(job: Thing, foo: int) -> None: ...
def keyword(job: Thing, *, more: int) -> None: ...


def turned_round(attempt: Attempt, job: Thing) -> None: ...
def unknown_attempt(job: Thing, attempt: "Missing") -> None: ...


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (no_job, r"must take \(job\) or"),
        (three, r"must take \(job\) or"),
        (keyword, r"must take \(job\) or"),
        (no_attempt, "its second parameter 'foo' must be annotated with Attempt, not int"),
        (not_annotated, "has no annotation; annotate it, such as job: SendInvoice"),
        (turned_round, r"must take \(job, attempt\), in this order"),
        (
            unknown_attempt,
            "the annotation of 'attempt' can't be resolved here .*; import what it names, or name its job class",
        ),
        (no_struct, "isn't a Job class"),
        (abstract, "is abstract"),
        (generates, "is a generator"),
        (type_checking, r"can't be resolved here .* @app.handler\(job=…\)"),
    ],
)
def test_a_wrong_handler_is_named_when_the_worker_starts(function: Callable[..., Any], says: str) -> None:
    """The worker would fail at its first job, or never run it."""
    app = App("wrong", broker="memory://")
    app.handler(function)
    with pytest.raises(ConfigurationError, match=says) as refused:
        app.handlers()
    assert function.__name__ in str(refused.value)


def test_job_says_what_an_annotation_cannot() -> None:
    """A contract that is imported for type checkers only could have no handler."""
    app = App("named", broker="memory://")
    app.handler(job=Thing)(type_checking)
    assert [handler.spec.name for handler in app.handlers()] == ["thing.do"]


def test_two_handlers_for_one_job_are_refused() -> None:
    """One of them would never run."""
    app = App("two", broker="memory://")

    @app.handler
    def first(job: Thing) -> None: ...

    @app.handler
    def second(job: Thing) -> None: ...

    with pytest.raises(ConfigurationError, match=r"two handlers for job 'thing.do'.*first and .*second"):
        app.handlers()


def test_two_classes_with_one_name_are_named() -> None:
    """Who copied a class, and its name with it, looks for a second handler of the first class in vain."""
    app = App("two", broker="memory://")

    class Copied(Job, name="thing.do", queue=Queue("things")):
        """A job that should have another name."""

    @app.handler
    def first(job: Thing) -> None: ...

    @app.handler
    def second(job: Copied) -> None: ...

    with pytest.raises(
        ConfigurationError, match=r"classes Thing and .*Copied share the job name 'thing.do'.* another name="
    ):
        app.handlers()


@pytest.mark.parametrize("said", [7, Bury])
async def test_a_handler_that_returns_no_outcome_is_named_with_its_line(said: Any) -> None:
    """The frames of the error are leveret's: the handler has returned by then."""
    app = App("returns")

    @app.handler
    async def wrong(job: Thing) -> Any:
        return said

    async with running(app) as lab:
        await lab.publish(Thing())
        await lab.drain()
        assert f"({__file__}:{wrong.__code__.co_firstlineno}) returned " in lab.buried[0].outcome.reason


def test_a_queue_without_a_handler_is_refused() -> None:
    """The worker would take its jobs and bury them."""
    app = App("none", broker="memory://")

    @app.handler
    def first(job: Thing) -> None: ...

    with pytest.raises(ConfigurationError, match=r"no handler for queue 'thinks' \(queues with handlers: things\)"):
        app.handlers(["thinks"])


def raised(error: BaseException) -> Callable[[Thing], Any]:
    """Return a handler that raises."""

    async def handler(job: Thing) -> None:
        raise error

    return handler


def raised_in_thread(error: BaseException) -> Callable[[Thing], Any]:
    """Return a `def` handler that raises."""

    def handler(job: Thing) -> None:
        raise error

    return handler


@pytest.mark.parametrize("make", [raised, raised_in_thread])
@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Bury("no"), Bury("no")),
        (ExceptionGroup("tasks", [ExceptionGroup("inner", [Bury("deep")])]), Bury("deep")),
        (ValueError("x"), Bury("ValueError: x")),
        (SystemExit(3), Bury("RuntimeError: the handler raised SystemExit")),
        (KeyboardInterrupt(), Bury("RuntimeError: the handler raised KeyboardInterrupt")),
        (
            asyncio.CancelledError(),
            Bury("RuntimeError: the handler raised CancelledError, but nothing had cancelled it"),
        ),
        (RecursionError("deep"), Bury("RecursionError: deep")),
        (BaseExceptionGroup("b", [KeyboardInterrupt()]), None),
    ],
)
async def test_whatever_a_handler_raises_is_one_ending_and_the_worker_lives(
    make: Callable[[BaseException], Any], error: BaseException, outcome: Bury | None
) -> None:
    """A job would stop its worker, or hang unacked until the connection goes."""
    app = App("raises", broker="memory://")
    app.handler(job=Thing)(make(error))

    async with running(app) as lab:
        await lab.publish(Thing())
        await lab.publish(Thing())
        await lab.drain()

        assert len(lab.buried) == 2
        if outcome is not None:
            assert lab.buried[0].outcome == outcome


async def test_a_handler_that_cancels_its_own_task_has_failed() -> None:
    """Such a job would be buried at its first attempt, whatever its `Retries` says."""
    app = App("cancels", broker="memory://", middleware=[Retries(Rule(RuntimeError, immediate=1), max_attempts=2)])

    @app.handler
    async def handler(job: Thing) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.Event().wait()

    async with running(app) as lab:
        receipt = await lab.publish(Thing())
        await lab.drain()
        first, last = lab.attempts(receipt.job_id)

    said = "RuntimeError: the task of the run was cancelled, neither by a Timeout nor by a stop"
    assert isinstance(first.outcome, Retry)
    assert last.outcome == Bury(f"{said} (attempt 2 of 2)")


async def test_a_handler_that_ends_the_threads_of_its_loop_costs_no_neighbour() -> None:
    """Each `def` handler of the process would fail from then on, for the clean-up of one job."""
    app, ran = App("threads", broker="memory://"), list[str]()

    class Other(Job, name="other.do", queue=things):
        """Another job of the queue."""

    @app.handler
    async def ends_threads(job: Thing) -> None:
        await asyncio.get_running_loop().shutdown_default_executor()
        ran.append("thing")

    @app.handler
    def in_a_thread(job: Other) -> None:
        ran.append("other")

    async with running(app) as lab:
        await lab.publish(Thing())
        await lab.drain()
        await lab.publish(Other())
        await lab.drain()

    assert ran == ["thing", "other"]


async def test_middleware_may_end_a_run_with_a_cancellation_that_it_takes_back() -> None:
    """`asyncio.timeout` in a user's middleware would end runs with an error that its rules don't know."""

    async def limited(attempt: Attempt[Any], proceed: Consume) -> Outcome:
        async with asyncio.timeout(0.01):
            return await proceed(attempt)

    app = App("limited", broker="memory://", middleware=[Retries(max_attempts=1), limited])

    @app.handler
    async def handler(job: Thing) -> None:
        await asyncio.Event().wait()

    async with running(app) as lab:
        await lab.publish(Thing())
        await lab.drain()
        (buried,) = lab.buried
    assert isinstance(buried.error, TimeoutError)


@pytest.mark.parametrize("rubbish", [7, "done", Done, Bury, object()])
async def test_a_result_is_refused_since_it_is_kept_nowhere(rubbish: object) -> None:
    """A user would wait for a result that nobody has, or take a burial's class for a burial."""
    app = App("returns", broker="memory://")

    @app.handler(job=Thing)
    async def handler(job: Thing) -> Any:
        return rubbish

    async with running(app) as lab:
        await lab.publish(Thing())
        await lab.drain()

        (buried,) = lab.buried
    assert isinstance(buried.error, TypeError)


async def test_outcomes_may_be_returned_or_raised() -> None:
    """Code deep inside could not say that it is too early."""
    app = App("says", broker="memory://")

    @app.handler
    async def handler(job: Thing, attempt: Attempt[None]) -> Retry | None:
        if job.n == 1 and attempt.number < 3:
            return Retry(5)
        if job.n == 2 and attempt.envelope.passes == 0:
            raise Snooze(30)
        return None

    async with running(app) as lab:
        retried = await lab.publish(Thing(1))
        snoozed = await lab.publish(Thing(2))
        await lab.drain()

        assert [(run.number, run.outcome) for run in lab.attempts(retried.job_id)] == [
            (1, Retry(5)),
            (2, Retry(5)),
            (3, Done()),
        ]
        assert [(run.number, run.outcome) for run in lab.attempts(snoozed.job_id)] == [(1, Snooze(30)), (1, Done())]


async def test_a_def_handler_runs_in_a_thread_inside_around_sync() -> None:
    """It would block the heartbeats; and Django would keep connections that are closed."""
    seen: list[str] = []

    @contextmanager
    def around() -> Generator[None]:
        seen.append("in")
        yield
        seen.append("out")

    app = App("sync", broker="memory://", around_sync=around)

    @app.handler
    def handler(job: Thing) -> None:
        seen.append("main" if threading.current_thread() is threading.main_thread() else "thread")

    async with running(app) as lab:
        await lab.publish(Thing())
        await lab.drain()

    assert seen == ["in", "thread", "out"]


async def test_a_thread_past_its_time_out_keeps_its_slot_until_it_ends() -> None:
    """The retry would run beside the first run: twice at once."""
    running_now, most, starts = 0, 0, 0
    lock = threading.Lock()
    loop = asyncio.get_running_loop()
    app = App("overrun", broker="memory://", middleware=[Timeout(0.05)])

    async def end() -> None:
        """Let the time limit pass, and the loop do what it does then."""
        lab.advance(0.06)
        for _ in range(20):
            await asyncio.sleep(0)

    @app.handler
    def handler(job: Thing, attempt: Attempt[None]) -> None:
        nonlocal running_now, most, starts
        with lock:
            running_now += 1
            starts += 1
            most = max(most, running_now)
        asyncio.run_coroutine_threadsafe(end(), loop).result(30)
        time.sleep(0.05)  # a thread that can't be stopped is what is tested: long enough for a retry to begin
        with lock:
            running_now -= 1

    async with running(app) as lab:
        await lab.publish(Thing())
        await lab.drain()

        (buried,) = lab.buried
    assert isinstance(buried.error, TimeoutError)
    assert (most, starts, running_now) == (1, 1, 0)


async def test_an_attempt_is_made_by_the_worker_or_by_testing() -> None:
    """A handler tested with half an attempt would fail elsewhere than in production."""
    with pytest.raises(TypeError, match=r"leveret.testing.attempt"):
        Attempt()
    made = make_attempt(resources="shop", number=3)
    assert (made.number, made.resources, made.remaining_s()) == (3, "shop", float("inf"))
    assert (await made.publish(Thing())).state == "confirmed"
