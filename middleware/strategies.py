"""What decides on a retry besides `Retries`: a function of the user for the wait, or tenacity's strategies for wait and stop.

Nothing here imports tenacity before it gets a strategy of tenacity, which the user has then imported.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast

from leveret.attempt import Attempt
from leveret.clock import Clock
from leveret.outcome import MAX_DELAY_S

if TYPE_CHECKING:
    from tenacity import RetryCallState


class TenacityWait(Protocol):
    """A wait strategy of tenacity, such as `wait_exponential_jitter(max=60)` or `wait_fixed(3) + wait_random(0, 2)`."""

    def __call__(self, retry_state: Any, /) -> float:
        """Return the seconds to wait."""
        ...

    def __add__(self, other: Any, /) -> Any:
        """Add the waits of two strategies. A function has no `__add__`, so type checkers refuse a function of one argument."""
        ...


class TenacityStop(Protocol):
    """A stop strategy of tenacity, such as `stop_after_attempt(8)` or `stop_after_delay(3600) | stop_after_attempt(8)`."""

    def __call__(self, retry_state: Any, /) -> bool:
        """Return whether to stop."""
        ...

    def __or__(self, other: Any, /) -> Any:
        """Stop as soon as one of two strategies does. A function has no `__or__`."""
        ...


Wait: TypeAlias = Callable[[Attempt[Any], Any], float] | TenacityWait
"""What computes a wait: a function of the attempt and its error, or a wait strategy of tenacity."""


def _is_tenacitys(kind: Literal["wait", "stop"], strategy: object) -> bool:
    module = sys.modules.get(f"tenacity.{kind}")
    return module is not None and isinstance(strategy, getattr(module, f"{kind}_base"))


def check_wait(where: str, wait: object) -> None:
    """Raise TypeError unless `wait` is a `Wait`."""
    if _is_tenacitys("wait", wait):
        return
    call = getattr(wait, "__call__", None)  # noqa: B004 - an object may have an async one
    fits = callable(wait) and not inspect.isclass(wait)
    if fits and not inspect.iscoroutinefunction(wait) and not inspect.iscoroutinefunction(call):
        try:
            inspect.signature(cast("Callable[..., object]", wait)).bind(None, None)
        except TypeError:
            pass
        except ValueError:
            return  # a builtin without a signature
        else:
            return
    msg = f"{where}: wait must be a plain function of (attempt, error) that returns seconds, or a wait strategy of tenacity, not {wait!r:.80}"
    raise TypeError(msg)


def check_stop(where: str, stop: object) -> None:
    """Raise TypeError unless `stop` is a stop strategy of tenacity."""
    if not _is_tenacitys("stop", stop):
        msg = f"{where}: stop must be a stop strategy of tenacity, not {stop!r:.80}; for a number of runs, give max_attempts"
        raise TypeError(msg)


def _state(attempt: Attempt, error: BaseException, clock: Clock, upcoming_s: float = 0.0) -> RetryCallState:
    """Return the attempt as tenacity's strategies read it: its time starts at the job's first delivery."""
    from tenacity import RetryCallState

    state = RetryCallState(cast("Any", None), None, (), {})
    state.attempt_number = attempt.number
    state.set_exception((type(error), error, error.__traceback__))
    state.outcome_timestamp = clock.monotonic()
    state.start_time = state.outcome_timestamp - max(0.0, clock.now() - attempt.first_seen.timestamp())
    state.upcoming_sleep = upcoming_s
    return state


def seconds_by(wait: Wait, attempt: Attempt, error: BaseException, clock: Clock) -> float:
    """Return the seconds that `wait` returns. Raises what it raises, and ValueError for anything but seconds up to 48 days."""
    call = cast("Callable[..., object]", wait)
    given = call(_state(attempt, error, clock)) if _is_tenacitys("wait", wait) else call(attempt, error)
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given <= MAX_DELAY_S:
        msg = f"it must return seconds, at least 0 and at most 48 days ({MAX_DELAY_S:.0f} s), not {given!r:.80}"
        raise ValueError(msg)
    return given


def stopped_by(stop: TenacityStop, attempt: Attempt, error: BaseException, clock: Clock, upcoming_s: float) -> bool:
    """Return whether `stop` ends the retries instead of a wait of `upcoming_s`. Raises what it raises."""
    return bool(stop(_state(attempt, error, clock, upcoming_s)))


def shown(strategy: object) -> str:
    """Return a strategy as it was written: the name of a function, or tenacity's class with its arguments."""
    if isinstance(strategy, (tuple, list)):
        return ", ".join(map(shown, cast("tuple[object, ...]", strategy)))
    if isinstance(strategy, float):
        return f"{strategy:g}"
    code = getattr(strategy, "__code__", None)
    if getattr(strategy, "__name__", "") == "<lambda>" and code is not None:
        return f"the lambda at {Path(code.co_filename).name}:{code.co_firstlineno}"
    if not _is_tenacitys("wait", strategy) and not _is_tenacitys("stop", strategy):
        return getattr(strategy, "__qualname__", None) or repr(strategy)
    parameters = inspect.signature(type(strategy)).parameters
    arguments: list[str] = []
    for name, value in vars(strategy).items():
        default = parameters[name].default if name in parameters else inspect.Parameter.empty
        if default is inspect.Parameter.empty:
            arguments.append(shown(value))
        elif value != default:
            arguments.append(f"{name}={shown(value)}")
    return f"{type(strategy).__name__}({', '.join(arguments)})"
