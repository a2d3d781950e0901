"""Retries with back-off, held in the broker, then a burial; rules set both per kind of failure."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable
from typing import ClassVar, Literal, TypeAlias, cast, final

import msgspec

from leveret.attempt import Attempt
from leveret.backoff import ceiling_s, full_jitter
from leveret.errors import ConfigurationError
from leveret.failure import CANCELLED
from leveret.layer import Consume, LayerFacts, RetryWaits
from leveret.outcome import MAX_DELAY_S, Bury, Outcome, Retry, Snooze
from leveret.runtime import Runtime
from leveret.texts import named

from .strategies import TenacityStop, Wait, check_stop, check_wait, seconds_by, shown, stopped_by

logger = logging.getLogger("leveret.retries")

On: TypeAlias = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool]
"""The failures that a rule applies to: an exception type, a tuple of types, or a predicate."""

_MAX_ATTEMPTS = 5
_MOST_CEILINGS = 32
"""The maximum of ceilings that `facts` states per rule; by then the wait has reached any cap."""
_IN_PLACE_BASE_S = 0.005
_IN_PLACE_CAP_S = 0.05


@final
class Rule:
    """A rule of `Retries`: how to retry one kind of failure.

    Args:
        on: An exception type, a tuple of types, or a predicate: a plain function of the exception. An `ExceptionGroup` of a
            single exception, as a `TaskGroup` raises, is also matched by that exception.
        max_attempts: Runs in total, at least 1, before the job is buried. Default: the figure of `Retries`.
        immediate: Further tries within one attempt, milliseconds apart, for failures that are over in a moment. Default: 0.
        base_s: Ceiling of the first wait, in seconds; the ceiling doubles with each attempt. Default: the figure of `Retries`.
        cap_s: Ceiling of any wait, in seconds. Default: the figure of `Retries`.
        bury: Bury the job at once, without another attempt. Default: False.
        wait: Computes the wait instead of the back-off: a plain function of the `Attempt` and the error that returns seconds,
            or a wait strategy of tenacity. If it raises or returns anything but 0 s to 48 days, the back-off computes the wait,
            with a warning. Default: the `wait` of `Retries`, unless the rule has a `base_s` or a `cap_s`.
        stop: Decides instead of `max_attempts` when the job is buried: a stop strategy of tenacity. Its time starts at the
            job's first delivery. If it raises, `max_attempts` decides, with a warning. Default: the `stop` of `Retries`, unless
            the rule has a `max_attempts`.

    Raises:
        ConfigurationError: Both `stop` and `max_attempts` are given.
        TypeError, ValueError: An argument is wrong.
    """

    __slots__ = ("base_s", "bury", "cap_s", "immediate", "max_attempts", "on", "stop", "wait")

    def __init__(
        self,
        on: On,
        *,
        max_attempts: int | None = None,
        immediate: int = 0,
        base_s: float | None = None,
        cap_s: float | None = None,
        bury: bool = False,
        wait: Wait | None = None,
        stop: TenacityStop | None = None,
    ) -> None:
        _check_on(on)
        _check_strategies("Rule", wait, stop, max_attempts)
        if max_attempts is not None:
            _check_count("Rule: max_attempts", max_attempts, 1)
        _check_count("Rule: immediate", immediate, 0)
        for name, seconds in (("base_s", base_s), ("cap_s", cap_s)):
            if seconds is not None:
                _check_seconds(f"Rule: {name}", seconds)
        if bury and any(given is not None for given in (max_attempts, base_s, cap_s, wait, stop)):
            msg = "Rule: with bury=True, max_attempts, base_s, cap_s, wait and stop have no effect; leave them out"
            raise ValueError(msg)
        self.on = on
        self.max_attempts = max_attempts
        self.immediate = immediate
        self.base_s = base_s
        self.cap_s = cap_s
        self.bury = bury
        self.wait = wait
        self.stop = stop

    def __repr__(self) -> str:
        on = f"({_shown(self.on)})" if isinstance(self.on, tuple) else _name(self.on)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        given = [("max_attempts", None), ("immediate", 0), ("base_s", None), ("cap_s", None), ("bury", False)]
        said = [f"{name}={getattr(self, name)!r}" for name, default in given if getattr(self, name) != default]
        return f"Rule({', '.join([on, *said, *_said(self.wait, self.stop)])})"


class _Plan(msgspec.Struct, frozen=True):
    """A rule with the defaults of `Retries` filled in."""

    on: On
    max_attempts: int
    immediate: int
    base_s: float
    cap_s: float
    bury: bool
    wait: Wait | None
    stop: TenacityStop | None


@final
class Retries:
    """Retries failures after exponential waits with full jitter, and buries the job after the last attempt.

    A failure is any exception except a cancellation by a `Timeout` further out or by a stop. The first rule that matches a failure applies; if no rule matches,
    the arguments below apply. They also apply to a returned or raised `Retry`: without a delay, the `Retry` gets one; at
    `max_attempts`, the job is buried. `Snooze`, `Bury`, `Done` and `Expired` pass unchanged. A retry is published and
    confirmed before the job is acknowledged, so that jobs run at least once.

    Args:
        rules: The rules, in order.
        max_attempts: Runs in total, including the first. Default: 5.
        base_s: Ceiling of the first wait, in seconds; the ceiling doubles with each attempt. Default: 1.
        cap_s: Ceiling of any wait, in seconds. Default: 600.
        wait: Computes the wait instead of the back-off; see `Rule`.
        stop: Decides instead of `max_attempts` when a job is buried; see `Rule`.

    Raises:
        ConfigurationError: Both `stop` and `max_attempts` are given.
        TypeError, ValueError: An argument is wrong.
    """

    once: ClassVar[Literal[True]] = True

    def __init__(
        self,
        *rules: Rule,
        max_attempts: int | None = None,
        base_s: float = 1.0,
        cap_s: float = 600.0,
        wait: Wait | None = None,
        stop: TenacityStop | None = None,
    ) -> None:
        for rule in rules:
            if not isinstance(rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]
                msg = f"Retries takes rules, such as Rule(ValueError, bury=True), not {rule!r}"
                raise TypeError(msg)
        _check_strategies("Retries", wait, stop, max_attempts)
        if max_attempts is None:
            max_attempts = _MAX_ATTEMPTS
        _check_count("Retries: max_attempts", max_attempts, 1)
        _check_seconds("Retries: base_s", base_s)
        _check_seconds("Retries: cap_s", cap_s)
        self.rules = rules
        self.max_attempts = max_attempts
        self.base_s = base_s
        self.cap_s = cap_s
        self.wait = wait
        self.stop = stop
        self._default = _Plan(Exception, max_attempts, 0, base_s, cap_s, False, wait, stop)
        self._plans = [self._plan(rule) for rule in rules]
        for plan, what in zip((*self._plans, self._default), (*rules, "Retries"), strict=True):
            if plan.base_s > plan.cap_s:
                msg = f"{what}: base_s ({plan.base_s:g}) is above cap_s ({plan.cap_s:g})"
                raise ValueError(msg)
        self.bind(Runtime(app=""))

    def _plan(self, rule: Rule) -> _Plan:
        inherits_wait = rule.wait is None and rule.base_s is None and rule.cap_s is None
        inherits_stop = rule.stop is None and rule.max_attempts is None
        return _Plan(
            on=rule.on,
            max_attempts=self.max_attempts if rule.max_attempts is None else rule.max_attempts,
            immediate=rule.immediate,
            base_s=self.base_s if rule.base_s is None else rule.base_s,
            cap_s=self.cap_s if rule.cap_s is None else rule.cap_s,
            bury=rule.bury,
            wait=self.wait if inherits_wait else rule.wait,
            stop=self.stop if inherits_stop else rule.stop,
        )

    def __repr__(self) -> str:
        said = [] if self.stop is not None else [f"max_attempts={self.max_attempts}"]
        said += [f"base_s={self.base_s:g}", f"cap_s={self.cap_s:g}"]
        return f"Retries({', '.join([*map(repr, self.rules), *said, *_said(self.wait, self.stop)])})"

    def bind(self, runtime: Runtime) -> None:
        """Take the clock and the random generator."""
        self._clock = runtime.clock
        self._rng = runtime.rng

    def facts(self) -> LayerFacts:
        """Return the waits of each rule, then those for failures that no rule matches."""
        return LayerFacts(
            tries_in_place=max((rule.immediate for rule in self.rules), default=0),
            retries=(*(_waits(plan, _shown(plan.on)) for plan in self._plans), _waits(self._default, None)),
        )

    @property
    def waits_s(self) -> list[float]:
        """The longest wait after each attempt except the last, in seconds, for failures that no rule matches."""
        return [ceiling_s(attempt, base_s=self.base_s, cap_s=self.cap_s) for attempt in range(1, self.max_attempts)]

    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        """Run the job; turn a failure into a `Retry` with a wait, or into a burial."""
        tries = 0
        failed: Exception | None = None
        outcome: Outcome | None = None
        try:
            while True:
                try:
                    try:
                        outcome = await proceed(attempt)
                    except asyncio.CancelledError as cancelled:
                        if cancelled.args == (CANCELLED,):
                            raise RuntimeError(CANCELLED) from cancelled
                        task = asyncio.current_task()
                        if task is None or task.cancelling():
                            raise
                        msg = "middleware raised CancelledError, but nothing had cancelled the run"
                        raise RuntimeError(msg) from cancelled
                except (
                    Retry,
                    Snooze,
                    Bury,
                ) as said:  # from middleware; outcomes that a handler raises arrive as return values
                    outcome = said
                except Exception as error:  # noqa: BLE001 - any exception is a failure
                    plan = self._match(error)
                    if tries >= plan.immediate:
                        return self._after(attempt, error, plan)
                    tries += 1
                    failed = error
                    attempt.log.info(
                        "job %s %s failed and is retried in place: %s",
                        attempt.envelope.job,
                        attempt.job_id,
                        named(error),
                    )
                    await self._clock.sleep(
                        full_jitter(tries, base_s=_IN_PLACE_BASE_S, cap_s=_IN_PLACE_CAP_S, rng=self._rng)
                    )
                    continue
                if isinstance(outcome, Retry):
                    return self._asked(attempt, outcome)
                if isinstance(outcome, Snooze) and failed is not None:
                    # A RateLimit snoozed a try in place. The failed try before it must count, or a job that always
                    # fails would come back for ever.
                    return self._after(attempt, failed, self._match(failed), at_least_s=outcome.delay_s)
                return outcome
        finally:
            # The traceback of an exception holds this frame; a reference back would leave both to the garbage collector.
            failed = outcome = None

    def _match(self, error: Exception) -> _Plan:
        inner: BaseException = error
        while isinstance(inner, BaseExceptionGroup) and len(inner.exceptions) == 1:  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
            inner = inner.exceptions[0]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        for plan in self._plans:
            if _applies(plan.on, error) or (
                inner is not error and isinstance(inner, Exception) and _applies(plan.on, inner)
            ):
                return plan
        return self._default

    def _after(self, attempt: Attempt, error: Exception, plan: _Plan, at_least_s: float = 0.0) -> Retry | Bury:
        outcome: Retry | Bury
        if plan.bury:
            outcome = Bury(f"{named(error)} (a rule buries it at once)")
        else:
            outcome = self._next(attempt, error, plan, named(error), at_least_s=at_least_s)
        outcome.__cause__ = error
        return outcome

    def _asked(self, attempt: Attempt, asked: Retry) -> Retry | Bury:
        cause = asked.__cause__
        why = "a retry was requested" if cause is None else named(cause)
        outcome = self._next(attempt, asked if cause is None else cause, self._default, why, asked.delay_s)
        outcome.__cause__ = cause
        return outcome

    def _next(
        self,
        attempt: Attempt,
        error: BaseException,
        plan: _Plan,
        why: str,
        delay_s: float | None = None,
        *,
        at_least_s: float = 0.0,
    ) -> Retry | Bury:
        if plan.stop is None and attempt.number >= plan.max_attempts:
            return Bury(f"{why} (attempt {attempt.number} of {plan.max_attempts})")
        if delay_s is None:
            delay_s = max(at_least_s, self._wait_s(attempt, error, plan))
        if plan.stop is not None and self._stops(attempt, error, plan, plan.stop, delay_s):
            return Bury(f"{why} (attempt {attempt.number}, {shown(plan.stop)})")
        return Retry(delay_s)

    def _wait_s(self, attempt: Attempt, error: BaseException, plan: _Plan) -> float:
        if plan.wait is not None:
            try:
                return seconds_by(plan.wait, attempt, error, self._clock)
            except (Exception, asyncio.CancelledError) as failed:  # noqa: BLE001 - a user's code; the job must not be lost
                _say_failed(attempt, "wait", plan.wait, "the back-off computes the wait", failed)
        return full_jitter(attempt.number, base_s=plan.base_s, cap_s=plan.cap_s, rng=self._rng)

    def _stops(self, attempt: Attempt, error: BaseException, plan: _Plan, stop: TenacityStop, delay_s: float) -> bool:
        try:
            return stopped_by(stop, attempt, error, self._clock, delay_s)
        except (Exception, asyncio.CancelledError) as failed:  # noqa: BLE001 - as above
            _say_failed(attempt, "stop", stop, f"the job is buried after {plan.max_attempts} runs", failed)
            return attempt.number >= plan.max_attempts


def _say_failed(attempt: Attempt, keyword: str, strategy: object, instead: str, failed: BaseException) -> None:
    logger.warning(
        "job %s %s: %s=%s of Retries failed, so %s: %s",
        attempt.envelope.job,
        attempt.job_id,
        keyword,
        shown(strategy),
        instead,
        named(failed),
        exc_info=failed,
    )


def _applies(on: On, error: Exception) -> bool:
    if isinstance(on, (type, tuple)):
        return isinstance(error, on)
    try:
        answer: object = on(error)
        if inspect.isawaitable(answer):
            if inspect.iscoroutine(answer):
                answer.close()
            msg = f"the predicate returned {type(answer).__name__}; a predicate must not be async"
            raise TypeError(msg)
        return bool(answer)
    except (Exception, asyncio.CancelledError):
        logger.exception("the predicate %s of a Rule failed on %s; the rule doesn't match", _name(on), named(error))
        return False


def _waits(plan: _Plan, on: str | None) -> RetryWaits:
    if plan.bury:
        return RetryWaits(on=on, max_attempts=1, immediate=plan.immediate)
    attempts = _MOST_CEILINGS + 1 if plan.stop is not None else min(plan.max_attempts, _MOST_CEILINGS + 1)
    ceilings_s = [ceiling_s(attempt, base_s=plan.base_s, cap_s=plan.cap_s) for attempt in range(1, attempts)]
    return RetryWaits(
        on=on,
        max_attempts=plan.max_attempts if plan.stop is None else None,
        immediate=plan.immediate,
        ceilings_s=tuple(ceilings_s) if plan.wait is None else (),
        wait=None if plan.wait is None else shown(plan.wait),
        stop=None if plan.stop is None else shown(plan.stop),
    )


def _shown(on: On) -> str:
    return ", ".join(map(_name, cast("tuple[object, ...]", on))) if isinstance(on, tuple) else _name(on)


def _name(on: object) -> str:
    return getattr(on, "__qualname__", None) or repr(on)


def _said(wait: Wait | None, stop: TenacityStop | None) -> list[str]:
    return [f"{name}={shown(given)}" for name, given in (("wait", wait), ("stop", stop)) if given is not None]


def _check_strategies(where: str, wait: Wait | None, stop: TenacityStop | None, max_attempts: int | None) -> None:
    if wait is not None:
        check_wait(where, wait)
    if stop is not None:
        check_stop(where, stop)
        if max_attempts is not None:
            msg = f"{where}: stop and max_attempts both say when the job is buried; give one of them"
            raise ConfigurationError(msg)


def _check_on(on: object) -> None:
    if isinstance(on, tuple) or inspect.isclass(on):
        if on == ():
            msg = "Rule: on is an empty tuple, which matches nothing"
            raise ValueError(msg)
        for kind in cast("tuple[object, ...]", on if isinstance(on, tuple) else (on,)):
            if not inspect.isclass(kind) or not issubclass(kind, Exception):
                hint = (
                    "; only subclasses of Exception are caught"
                    if inspect.isclass(kind) and issubclass(kind, BaseException)
                    else ""
                )
                msg = f"Rule: on must be an exception type, a tuple of types or a predicate; {kind!r} isn't an exception type{hint}"
                raise TypeError(msg)
        return
    if not callable(on):
        if isinstance(on, BaseException):
            hint = f"; give the type, {type(on).__name__}"
        elif isinstance(on, (list, set, frozenset)):
            hint = "; make it a tuple"
        else:
            hint = ""
        msg = f"Rule: on must be an exception type, a tuple of types or a predicate, not {on!r}{hint}"
        raise TypeError(msg)
    if inspect.iscoroutinefunction(on) or inspect.iscoroutinefunction(getattr(on, "__call__", None)):  # noqa: B004
        msg = f"Rule: the predicate {_name(on)} is async; it must be a plain function of the exception"
        raise TypeError(msg)
    try:
        inspect.signature(on).bind(Exception())
    except TypeError:
        msg = f"Rule: the predicate {_name(on)} must take one argument, the exception"
        raise TypeError(msg) from None
    except ValueError:
        pass  # a builtin without a signature


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"{name} must be an int, not {value!r}"
        raise TypeError(msg)
    if value < least:
        msg = f"{name} must be at least {least}, not {value}"
        raise ValueError(msg)


def _check_seconds(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        msg = f"{name} must be a number of seconds, not {value!r}"
        raise TypeError(msg)
    if not 0 < value <= MAX_DELAY_S:
        msg = f"{name} must be above 0 and at most 48 days ({MAX_DELAY_S:.0f} s), not {value}"
        raise ValueError(msg)
