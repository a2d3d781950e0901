"""Middleware: an onion folded once at start-up. First in the list is outermost: first in, last out.

A layer has `consume`, `publish` or both; a plain function of `consume`'s shape is a layer too. One instance is one
state, shared by every handler that it wraps. What else a layer may have:

- `once = True` (a class attribute): a handler's own layer of that class stands where the app's stood, instead of
  coming inside it.
- `ready_in_s() -> float`: tower's readiness. Where every handler of a queue here has that very instance, the consumer
  starts nothing of the queue until it returns 0. Beside it, `starts_now() -> int` says how many may start at once, so
  that the consumer needn't go round the loop for each, and `starts_per_s`, a number, bounds the prefetch.
- `passes_publish() -> bool`: that its `publish` would do nothing but proceed, now. Where all say so, a publisher goes
  to the broker without them, and `publish_many` without a task for each job.
- `bind(runtime)`: called when a worker or a publisher is made, with its `Runtime` (clock, chance, processes).

Order of calls: layers of one run are called in its own task, outermost first; runs of several jobs overlap, so a
layer's state must bear that. Cancellation (a time-out, the end of the grace) arrives in a layer as `CancelledError`
at its await of `proceed`, and must go on outwards. What a layer raises goes to the layer outside it; what leaves the
outermost becomes a burial.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol, TypeAlias

from typing_extensions import TypeVar

from .attempt import Attempt
from .envelope import Envelope, Receipt
from .errors import ConfigurationError
from .outcome import Outcome

Consume: TypeAlias = Callable[[Attempt], Awaitable[Outcome]]
"""The rest of the chain, as a `consume` layer gets it."""
Publish: TypeAlias = Callable[[Envelope], Awaitable[Receipt]]
"""The rest of the chain, as a `publish` layer gets it."""
_R_contra = TypeVar("_R_contra", contravariant=True, default=object)


class ConsumeLayer(Protocol[_R_contra]):
    """A layer round a run: await `proceed(attempt)` and return an outcome. What it raises goes to the layer outside it."""

    def consume(self, attempt: Attempt[_R_contra], proceed: Consume, /) -> Awaitable[Outcome]:
        """Run round the handler; `proceed` may be called again (a try in place), or not at all."""
        ...


class PublishLayer(Protocol):
    """A layer round a publish: await `proceed(envelope)` and return its receipt; on a burial it may change headers only."""

    def publish(self, envelope: Envelope, proceed: Publish, /) -> Awaitable[Receipt]:
        """Run round a publish; `envelope.cause` tells a retry, a snooze and a burial from a publisher's own."""
        ...


_L = TypeVar("_L", default=object)
Layer: TypeAlias = ConsumeLayer[_L] | PublishLayer | Callable[[Attempt[_L], Consume], Awaitable[Outcome]]
"""What `middleware=` takes: consume, publish, both, or a plain function of consume's shape. First in the list is outermost."""
AnyLayer: TypeAlias = Any
"""A layer whose shape was checked by `check_layers`; its resources are the app's own affair."""
instrumentation: list[Callable[[tuple[AnyLayer, ...]], tuple[AnyLayer, ...]]] = []
"""Applied to every app's layers when they are used; how auto-instrumentation puts `Tracing` outermost."""

_METHODS = ("consume", "publish", "ready_in_s", "starts_now", "passes_publish", "bind")


def name_of(layer: AnyLayer) -> str:
    """Return how `describe` and errors name a layer: its class and what it was made with, or its function's name."""
    if inspect.isfunction(layer):
        return layer.__name__
    shown = repr(layer)
    return type(layer).__name__ if shown == object.__repr__(layer) else shown


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _check(layer: AnyLayer, where: str) -> None:
    what = f"{where}: the layer {name_of(layer)}"
    if inspect.isclass(layer):
        msg = f"{where}: {layer.__name__} is a class; list an instance, {layer.__name__}(…)"
        raise ConfigurationError(msg)
    methods = {name: getattr(layer, name) for name in ("consume", "publish") if callable(getattr(layer, name, None))}
    if not methods:
        if not callable(layer) or not _is_async(layer) or not _takes(layer, 2):
            near = _misspelt(layer)
            hint = f" (is its {near[0]}() meant to be {near[1]}()?)" if near else ""
            msg = f"{what} has neither consume nor publish{hint}, and is no `async def layer(attempt, proceed)`"
            raise ConfigurationError(msg)
        return
    for name, method in methods.items():
        if not _is_async(method) or not _takes(method, 2):
            msg = f"{what}: {name} isn't `async def {name}(self, {'attempt' if name == 'consume' else 'envelope'}, proceed)`"
            raise ConfigurationError(msg)
    ready = getattr(layer, "ready_in_s", None)
    if ready is not None and (not callable(ready) or _is_async(ready) or not _takes(ready, 0)):
        msg = f"{what}: ready_in_s isn't `def ready_in_s(self) -> float`"
        raise ConfigurationError(msg)
    if near := _misspelt(layer):
        msg = f"{what} has a method {near[0]}(); is {near[1]}() meant? Call it by another name if not"
        raise ConfigurationError(msg)


def _misspelt(layer: AnyLayer) -> tuple[str, str] | None:
    """Return a public method whose name is nearly one that we would call, and that name; the type checkers don't see it."""
    kind: type[Any] = type(layer)  # pyright: ignore[reportUnknownVariableType]
    others = [
        name
        for name in dir(kind)
        if not name.startswith("_") and name not in _METHODS and callable(getattr(kind, name))
    ]
    if not others:
        return None
    import difflib

    for name in others:
        for meant in difflib.get_close_matches(name, _METHODS, 1, cutoff=0.84):
            if not hasattr(layer, meant):
                return name, meant
    return None


def check_layers(layers: object, where: str) -> tuple[AnyLayer, ...]:
    """Return `layers` as a tuple, or raise ConfigurationError that names the one whose shape is wrong.

    The type checkers let a misspelt second method through, and can't see a layer listed twice.
    """
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
        msg = f"{where}: middleware is a list of layers, not {layers!r}"
        raise ConfigurationError(msg)
    listed: tuple[AnyLayer, ...] = tuple(layers)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    for layer in listed:
        _check(layer, where)
    for index, layer in enumerate(listed):
        for other in listed[:index]:
            if other is layer:
                msg = f"{where}: the layer {name_of(layer)} is listed twice"
                raise ConfigurationError(msg)
            if getattr(layer, "once", False) and type(other) is type(layer):
                msg = f"{where}: two layers {type(layer).__name__} in one list; one of them would have no effect"
                raise ConfigurationError(msg)
    return listed
