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
from leveret.failure import CANCELLED
from leveret.layer import Consume, LayerFacts, RetryWaits
from leveret.outcome import MAX_DELAY_S, Bury, Outcome, Retry, Snooze
from leveret.runtime import Runtime
from leveret.texts import named

logger = logging.getLogger("leveret.retries")

On: TypeAlias = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool]
"""The failures that a rule applies to: an exception type, a tuple of types, or a predicate."""

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

    Raises:
        TypeError, ValueError: An argument is wrong.
    """

    __slots__ = ("base_s", "bury", "cap_s", "immediate", "max_attempts", "on")

    def __init__(
        self,
        on: On,
        *,
        max_attempts: int | None = None,
        immediate: int = 0,
        base_s: float | None = None,
        cap_s: float | None = None,
        bury: bool = False,
    ) -> None:
        _check_on(on)
        if max_attempts is not None:
            _check_count("Rule: max_attempts", max_attempts, 1)
        _check_count("Rule: immediate", immediate, 0)
        for name, seconds in (("base_s", base_s), ("cap_s", cap_s)):
            if seconds is not None:
                _check_seconds(f"Rule: {name}", seconds)
        if bury and not max_attempts is base_s is cap_s is None:
            msg = "Rule: with bury=True, max_attempts, base_s and cap_s have no effect; leave them out"
            raise ValueError(msg)
        self.on = on
        self.max_attempts = max_attempts
        self.immediate = immediate
        self.base_s = base_s
        self.cap_s = cap_s
        self.bury = bury

    def __repr__(self) -> str:
        on = f"({_shown(self.on)})" if isinstance(self.on, tuple) else _name(self.on)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        given = [("max_attempts", None), ("immediate", 0), ("base_s", None), ("cap_s", None), ("bury", False)]
        said = [f"{name}={getattr(self, name)!r}" for name, default in given if getattr(self, name) != default]
        return f"Rule({', '.join([on, *said])})"


class _Plan(msgspec.Struct, frozen=True):
    """A rule with the defaults of `Retries` filled in."""

    on: On
    max_attempts: int
    immediate: int
    base_s: float
    cap_s: float
    bury: bool


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

    Raises:
        TypeError, ValueError: An argument is wrong.
    """

    once: ClassVar[Literal[True]] = True

    def __init__(self, *rules: Rule, max_attempts: int = 5, base_s: float = 1.0, cap_s: float = 600.0) -> None:
        for rule in rules:
            if not isinstance(rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]
                msg = f"Retries takes rules, such as Rule(ValueError, bury=True), not {rule!r}"
                raise TypeError(msg)
        _check_count("Retries: max_attempts", max_attempts, 1)
        _check_seconds("Retries: base_s", base_s)
        _check_seconds("Retries: cap_s", cap_s)
        self.rules = rules
        self.max_attempts = max_attempts
        self.base_s = base_s
        self.cap_s = cap_s
        self._default = _Plan(Exception, max_attempts, 0, base_s, cap_s, False)
        self._plans = [self._plan(rule) for rule in rules]
        for plan, what in zip((*self._plans, self._default), (*rules, "Retries"), strict=True):
            if plan.base_s > plan.cap_s:
                msg = f"{what}: base_s ({plan.base_s:g}) is above cap_s ({plan.cap_s:g})"
                raise ValueError(msg)
        self.bind(Runtime(app=""))

    def _plan(self, rule: Rule) -> _Plan:
        return _Plan(
            on=rule.on,
            max_attempts=self.max_attempts if rule.max_attempts is None else rule.max_attempts,
            immediate=rule.immediate,
            base_s=self.base_s if rule.base_s is None else rule.base_s,
            cap_s=self.cap_s if rule.cap_s is None else rule.cap_s,
            bury=rule.bury,
        )

    def __repr__(self) -> str:
        return f"Retries({', '.join([*map(repr, self.rules), f'max_attempts={self.max_attempts}', f'base_s={self.base_s:g}', f'cap_s={self.cap_s:g}'])})"

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
                        if cancelled.args != (CANCELLED,):
                            raise
                        raise RuntimeError(CANCELLED) from cancelled
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
        elif attempt.number >= plan.max_attempts:
            outcome = Bury(f"{named(error)} (attempt {attempt.number} of {plan.max_attempts})")
        else:
            outcome = Retry(
                max(at_least_s, full_jitter(attempt.number, base_s=plan.base_s, cap_s=plan.cap_s, rng=self._rng))
            )
        outcome.__cause__ = error
        return outcome

    def _asked(self, attempt: Attempt, asked: Retry) -> Retry | Bury:
        outcome: Retry | Bury
        if attempt.number >= self.max_attempts:
            why = "a retry was requested" if asked.__cause__ is None else named(asked.__cause__)
            outcome = Bury(f"{why} (attempt {attempt.number} of {self.max_attempts})")
        elif asked.delay_s is None:
            outcome = Retry(full_jitter(attempt.number, base_s=self.base_s, cap_s=self.cap_s, rng=self._rng))
        else:
            return asked
        outcome.__cause__ = asked.__cause__
        return outcome


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
    except Exception:
        logger.exception("the predicate %s of a Rule failed on %s; the rule doesn't match", _name(on), named(error))
        return False


def _waits(plan: _Plan, on: str | None) -> RetryWaits:
    attempts = 1 if plan.bury else plan.max_attempts
    waits = range(1, min(attempts, _MOST_CEILINGS + 1))
    ceilings_s = tuple(ceiling_s(attempt, base_s=plan.base_s, cap_s=plan.cap_s) for attempt in waits)
    return RetryWaits(on=on, max_attempts=attempts, immediate=plan.immediate, ceilings_s=ceilings_s)


def _shown(on: On) -> str:
    return ", ".join(map(_name, cast("tuple[object, ...]", on))) if isinstance(on, tuple) else _name(on)


def _name(on: object) -> str:
    return getattr(on, "__qualname__", None) or repr(on)


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
