"""A user's function as the innermost step of a chain: its job class, and how to call it."""

from __future__ import annotations

import asyncio
import inspect
import types
import typing
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import copy_context
from math import inf
from types import TracebackType
from typing import Any, TypeGuard

import msgspec

from ..attempt import Attempt
from ..attemptlog import warn_of
from ..broker import Features
from ..clock import Clock
from ..deadlines import TICK_S
from ..errors import ConfigurationError
from ..failure import CANCELLED
from ..job import Job, Queue, Spec, spec_of
from ..layer import AnyLayer, Consume, facts_of
from ..outcome import OUTCOMES, Bury, Done, Expired, ExpiredOnArrival, Outcome, Retry, Snooze
from ..tracebacks import at_thread

_DONE = Done()
_ABORTED = Bury("somebody aborted the job before this try")
"""Ends a try in place that would begin after the abort; the consumer makes `Aborted` of it."""
_OVERDUE = "is past its time limit, but its thread can't be stopped; it keeps its slot, and fails when it returns"
_GOES_ON = "is cut off, but its thread can't be stopped; it runs until it returns or the process ends"


class Registration(msgspec.Struct, frozen=True):
    """The arguments of `@app.handler`; resolved when a worker starts."""

    function: Callable[..., Any]
    job_class: type[Job] | None
    layers: tuple[AnyLayer, ...]
    remember: bool = True


class Handler(msgspec.Struct, frozen=True):
    """A resolved handler: its job class, its middleware and how to call it."""

    name: str
    """The name in errors and `describe`: module.function."""
    function: Callable[..., Any]
    job_class: type[Job]
    spec: Spec
    takes_attempt: bool
    is_async: bool
    layers: tuple[AnyLayer, ...]
    remember: bool
    """Whether a redelivery is settled by an earlier run in this process, instead of a second one."""

    @property
    def queue(self) -> Queue:
        """The queue of the handler's job."""
        return self.spec.queue


def resolve(registration: Registration, layers: Sequence[AnyLayer]) -> Handler:
    """Return the handler of `registration`. Raises ConfigurationError, which names the handler and the fix."""
    function = registration.function
    name = f"{function.__module__}.{getattr(function, '__qualname__', repr(function))}"
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        msg = f"handler {name} is a generator; a handler must return None or an outcome"
        raise ConfigurationError(msg)
    parameters = list(inspect.signature(function).parameters.values())
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    keyword_only = [p.name for p in parameters if p.default is p.empty and p.kind is p.KEYWORD_ONLY]
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not places or len(required) > 2 or keyword_only:
        msg = f"handler {name} must take (job) or (job, attempt), not ({', '.join(p.name for p in parameters)})"
        raise ConfigurationError(msg)
    takes_attempt = len(places) > 1 and (len(required) > 1 or places[1].name == "attempt")
    job_class: Any = registration.job_class
    if job_class is None:
        job_class = _annotated(function, name, places[0].name)
    if job_class is Attempt or typing.get_origin(job_class) is Attempt:
        msg = f"handler {name} must take (job, attempt), in this order"
        raise ConfigurationError(msg)
    spec = spec_of(job_class) if isinstance(job_class, type) else None
    if spec is None:
        what = getattr(job_class, "__name__", repr(job_class))
        why = (
            "is abstract; give the class a name= and a queue="
            if isinstance(job_class, type) and issubclass(job_class, Job)
            else "isn't a Job class"
        )
        msg = f"handler {name}: its first parameter is annotated with {what}, which {why}"
        raise ConfigurationError(msg)
    if takes_attempt:
        _check_attempt(function, name, places[1].name)
    is_async = inspect.iscoroutinefunction(function)
    return Handler(
        name, function, job_class, spec, takes_attempt, is_async, tuple(layers), remember=registration.remember
    )


def check_limits(handler: Handler, features: Features) -> None:
    """Raise ConfigurationError for a time limit so long that the broker would first deliver the job again."""
    facts = [facts_of(layer, f"handler {handler.name}") for layer in handler.layers]
    held_s = float("inf") if features.held_at_most_s is None else features.held_at_most_s
    runs = 1  # of what stands inside the middleware so far, within one attempt
    for one in facts:
        if one.limit_s is not None and one.limit_s * runs > held_s * 0.75:
            times = f", {runs} times per attempt," if runs > 1 else ""
            msg = (
                f"handler {handler.name}: a time-out of {one.limit_s:g} s{times} is above three quarters of the {held_s:g} s after which "
                "the broker delivers the job again (RabbitMQ's consumer_timeout). Shorten the time-out, or raise "
                "consumer_timeout in the broker and consumer_timeout_s in its settings"
            )
            raise ConfigurationError(msg)
        runs *= 1 + one.tries_in_place


def _check_attempt(function: Callable[..., Any], name: str, parameter: str) -> None:
    try:
        hint = typing.get_type_hints(function).get(parameter, Attempt)
    except Exception:  # noqa: BLE001 - an annotation that can't be resolved here may be right
        return
    if hint is not Any and hint is not Attempt and typing.get_origin(hint) is not Attempt:
        msg = f"handler {name}: its second parameter {parameter!r} must be annotated with Attempt, not {getattr(hint, '__name__', hint)}"
        raise ConfigurationError(msg)


def _annotated(function: Callable[..., Any], name: str, parameter: str) -> Any:
    way_out = f"name its job class: @app.handler(job=…) above {name}"
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:
        wrong = _unresolvable(function) or parameter
        if wrong != parameter:
            way_out = f"import what it names, or {way_out}"
        msg = f"handler {name}: the annotation of {wrong!r} can't be resolved here ({error}); {way_out}"
        raise ConfigurationError(msg) from error
    if parameter not in hints:
        msg = f"handler {name}: its first parameter {parameter!r} has no annotation; annotate it, such as {parameter}: SendInvoice"
        raise ConfigurationError(msg)
    return hints[parameter]


def _unresolvable(function: Callable[..., Any]) -> str | None:
    """Return the first parameter of `function` whose annotation can't be resolved by itself."""
    annotations: dict[str, Any] = getattr(function, "__annotations__", {})
    for parameter, annotation in annotations.items():
        try:
            typing.get_type_hints(types.SimpleNamespace(__annotations__={parameter: annotation}), function.__globals__)
        except Exception:  # noqa: BLE001 - an annotation may raise anything
            return parameter
    return None


def innermost(
    handler: Handler,
    *,
    clock: Clock,
    threads: Executor,
    around_sync: Callable[[], AbstractContextManager[object]] | None,
    stopping: Callable[[], bool],
) -> Consume:
    """Return the innermost step of `handler`'s chain.

    The step checks the expiry and calls the function (an `async def` on the loop, a `def` in a thread). Outcomes are always
    returned, even those that the function raises; other exceptions are raised. An exception that would end the process or
    look like a cancellation from outside becomes a RuntimeError, so that no job stops its worker. A cancellation that neither
    a `Timeout` nor a stop requested is marked with `CANCELLED`; for `Retries` it is a failure.
    """
    keep = handler.spec.keeps_expired
    expired, expired_on_arrival = Expired(keep), ExpiredOnArrival(keep)
    call = _call_of(handler, threads, around_sync)
    facts = [facts_of(layer, f"handler {handler.name}") for layer in handler.layers]
    limit_s = min((one.limit_s for one in facts if one.limit_s is not None), default=inf)
    watched, monotonic = handler.is_async and limit_s < inf, clock.monotonic

    async def run(attempt: Attempt) -> Outcome:
        expires_at_ms = attempt.envelope.expires_at_ms
        if expires_at_ms is not None and clock.now() * 1000 >= expires_at_ms:
            late = attempt.first_seen.timestamp() * 1000 >= expires_at_ms
            return expired_on_arrival if late else expired
        begun = monotonic() if watched else 0.0
        attempt.begun = True
        attempt.unfinished = None  # those of middleware, or of a try in place before
        try:
            said = await call(attempt)
        except (Retry, Snooze, Bury) as outcome:
            if attempt.unfinished:
                raise _unfinished(attempt, handler) from outcome
            return outcome
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                if not attempt.remaining_s() or stopping() or attempt.aborting:
                    raise
                # The end of a whole program (asyncio.run) cancels the worker in the same turn: let the stop begin first.
                await take_back_cancels()
                if stopping():
                    raise
                raise asyncio.CancelledError(CANCELLED) from error
            msg = "the handler raised CancelledError, but nothing had cancelled it"
            raise RuntimeError(msg) from error
        except BaseExceptionGroup as group:
            if (single := _single(group)) is not None:
                return single
            if isinstance(group, Exception):
                raise
            msg = f"the handler raised {group!r}"
            raise RuntimeError(msg) from group
        except Exception:
            raise
        except BaseException as error:
            msg = f"the handler raised {type(error).__name__}"
            raise RuntimeError(msg) from error
        if watched and (took_s := monotonic() - begun) > limit_s + TICK_S:
            _say_blocked(attempt, handler, limit_s, took_s)
        if attempt.unfinished:
            raise _unfinished(attempt, handler)
        if said is None:
            return _DONE
        if isinstance(said, OUTCOMES):
            return said
        if handler.spec.result is not None and not _is_outcome_class(said):
            return Done(said)
        raise _no_outcome(said, handler)

    return run


def _is_outcome_class(said: object) -> TypeGuard[type[Outcome]]:
    return inspect.isclass(said) and issubclass(said, OUTCOMES)


def _no_outcome(said: object, handler: Handler) -> TypeError:
    """Return the error for a handler that returned neither None nor an outcome nor a result."""
    if _is_outcome_class(said):
        what = f"the class {said.__name__}, not an instance of it"
    else:
        name = handler.job_class.__name__
        what = f"{said!r:.80}; {name} has no result, so return None or an outcome, or derive {name} from Job[…] with keep=Keep()"
    return TypeError(f"handler {handler.name}{_place(handler)} returned {what}")


def _place(handler: Handler) -> str:
    """Return the file and line of a handler, in brackets; "" if its code is unknown."""
    code = getattr(inspect.unwrap(handler.function), "__code__", None)
    return "" if code is None else f" ({code.co_filename}:{code.co_firstlineno})"


def _say_blocked(attempt: Attempt, handler: Handler, limit_s: float, took_s: float) -> None:
    """Log that a handler returned long after its time limit, unless its cancellation had come."""
    task = asyncio.current_task()
    if task is None or task.cancelling():
        return
    warn_of(
        attempt,
        "blocked the event loop: handler %s%s returned after %.2f s, and its Timeout of %g s couldn't end it. "
        "Await what takes long, move it to asyncio.to_thread, or make the handler a def",
        handler.name,
        _place(handler),
        took_s,
        limit_s,
    )


def _unfinished(attempt: Attempt, handler: Handler) -> RuntimeError:
    """Return the error for a handler that ended before its publishes had."""
    all_begun = list(attempt.unfinished or ())
    begun = all_begun[0]
    also = f" (and {len(all_begun) - 1} more)" if len(all_begun) > 1 else ""
    awaited = {task.get_coro() for task in asyncio.all_tasks()}
    lost = [one.publish for one in all_begun if one.publish is not None and one.publish not in awaited]
    lost = [publish for publish in lost if inspect.getcoroutinestate(publish) == inspect.CORO_CREATED]
    for publish in lost:
        publish.close()  # or Python warns of it later, without a line
    if begun.publish in lost:
        fix = "await attempt.publish(…)" if handler.is_async else "attempt.publish_blocking(…)"
        return RuntimeError(
            f"attempt.publish at {begun.where} was never awaited{also}, so nothing was sent; write {fix}"
        )
    return RuntimeError(
        f"the publish at {begun.where} hadn't finished{also} when the handler ended; wait for it in the handler"
    )


async def take_back_cancels() -> None:
    """Take back cancels that a handler requested for its own task, so that they don't cut off its settlement. A pending one is raised at the next wait."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        while task.uncancel():
            pass
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)


def _single(group: BaseExceptionGroup[BaseException]) -> Retry | Snooze | Bury | None:
    """Return the outcome in a group of one, at any depth, as a TaskGroup wraps it; None if there is none."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        inner: tuple[BaseException, ...] = error.exceptions  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if len(inner) != 1:
            return None
        error = inner[0]
    return error if isinstance(error, (Retry, Snooze, Bury)) else None


def _call_of(
    handler: Handler, threads: Executor, around_sync: Callable[[], AbstractContextManager[object]] | None
) -> Callable[[Attempt], Awaitable[Any]]:
    """Return the call of the function: on the loop, or in a thread."""
    call = _on_loop(handler) if handler.is_async else _in_thread(handler, threads, around_sync or nullcontext)
    return call if handler.spec.keep is None else _abortable(call)


def _on_loop(handler: Handler) -> Callable[[Attempt], Awaitable[Any]]:
    function = handler.function
    if handler.takes_attempt:
        return lambda attempt: function(attempt.job, attempt)
    return lambda attempt: function(attempt.job)


def _abortable(call: Callable[[Attempt], Awaitable[Any]]) -> Callable[[Attempt], Awaitable[Any]]:
    """Return `call` so that it doesn't begin after an abort, and isn't cancelled by one once it has ended."""

    async def unless_aborted(attempt: Attempt) -> Any:
        tracked = attempt.tracked
        if tracked is None:
            return await call(attempt)
        if tracked.asked:
            return _ABORTED
        tracked.over = False
        try:
            return await call(attempt)
        finally:
            tracked.over = True

    return unless_aborted


def _in_thread(
    handler: Handler, threads: Executor, around_sync: Callable[[], AbstractContextManager[object]]
) -> Callable[[Attempt], Awaitable[Any]]:
    function = handler.function

    def invoke(attempt: Attempt) -> Any:
        try:
            with around_sync():
                return function(attempt.job, attempt) if handler.takes_attempt else function(attempt.job)
        except StopIteration as error:  # a future can't hold a StopIteration
            msg = "the handler raised StopIteration"
            raise RuntimeError(msg) from error

    async def call(attempt: Attempt) -> Any:
        work = threads.submit(copy_context().run, invoke, attempt)
        waiting = asyncio.wrap_future(work)
        cancelled = False
        where: TracebackType | None = None
        while not waiting.done():
            try:
                await asyncio.wait([waiting])
            except asyncio.CancelledError:
                if work.cancel():  # the thread hadn't begun it
                    raise
                # A thread can't be stopped. The job keeps its slot until the thread returns, so that its retry doesn't run beside it.
                if not cancelled:
                    overdue = not attempt.remaining_s()
                    where = at_thread(invoke.__code__, "attempt", attempt) if overdue else None
                    warn_of(attempt, _OVERDUE if overdue else _GOES_ON)
                cancelled = True
        if cancelled:
            waiting.exception()  # retrieved, so that asyncio doesn't log the exception as never retrieved
            raise asyncio.CancelledError().with_traceback(where)
        return waiting.result()

    return call
