"""handler → checked: whether what its annotation says that it returns fits the result of its job."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Sequence
from typing import Any, Union

from ..errors import ConfigurationError
from ..outcome import OUTCOMES
from ..schemes import NO_STORE
from .handler import Handler


def check_results(handlers: Sequence[Handler], *, stored: bool) -> None:
    """Raise ConfigurationError for a handler that can't return the result of its job, or a result that nothing keeps. `stored`: there is a store."""
    for handler in handlers:
        check_returns(handler)
        if handler.spec.keep is not None and not stored:
            msg = f"handler {handler.name}: {handler.job_class.__name__} has keep=, but {NO_STORE}"
            raise ConfigurationError(msg)


def check_returns(handler: Handler) -> None:
    """Raise ConfigurationError for a handler whose annotation surely isn't the result of its job: what it returns would bury each job.

    An annotation that is missing, can't be resolved or says little passes: each value is checked, too.
    """
    try:
        hints = typing.get_type_hints(handler.function)
    except Exception:  # noqa: BLE001 - an annotation that can't be resolved here may be right
        return
    if "return" not in hints:
        return
    said, result, job = hints["return"], handler.spec.result, handler.job_class.__name__
    wrong = [one for one in _members(said) if not _is_outcome(one) and not _fits(one, result)]
    if not wrong:
        return
    if result is None:
        kept = "" if handler.spec.keep is not None else " with keep=Keep()"
        fix = f"return None or an outcome, or derive {job} from Job[{' | '.join(map(_name, wrong))}]{kept}"
        msg = f"handler {handler.name} returns {_name(said)}, but {job} has no result; {fix}"
    else:
        msg = f"handler {handler.name} returns {_name(said)}, but the result of {job} is {_name(result)}; correct one of them"
    raise ConfigurationError(msg)


def _members(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union; of any other type, the type."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _is_outcome(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, OUTCOMES)


def _fits(said: Any, result: Any) -> bool:
    """Return whether a `said` may be a `result`; False only if it can't."""
    if said is type(None):
        return result is None or any(_is_vague(one) or one is type(None) for one in _members(result))
    if result is None:
        return _is_vague(said) or _may_be_none(said)
    return any(_is_vague(one) or _fits_one(said, one) for one in _members(result)) or _is_vague(said)


def _fits_one(said: Any, result: Any) -> bool:
    said_class, result_class = typing.get_origin(said) or said, typing.get_origin(result) or result
    if not inspect.isclass(said_class) or not inspect.isclass(result_class):
        return True  # a Literal, a NewType, a type variable: their values are checked
    if not (issubclass(said_class, result_class) or (said_class is int and result_class is float)):
        return False
    said_args, result_args = typing.get_args(said), typing.get_args(result)
    if said_class is not result_class or len(said_args) != len(result_args):
        return True
    return all(_fits(one, other) for one, other in zip(said_args, result_args, strict=True))


def _may_be_none(said: Any) -> bool:
    said_class: Any = typing.get_origin(said) or said
    try:
        return not isinstance(said_class, type) or isinstance(None, said_class)
    except TypeError:  # a protocol
        return True


def _is_vague(kind: Any) -> bool:
    return kind in (Any, object, typing.NoReturn, typing.Never, ...)


def _name(kind: Any) -> str:
    if kind is type(None):
        return "None"
    return kind.__name__ if inspect.isclass(kind) and not typing.get_args(kind) else str(kind).replace("typing.", "")
