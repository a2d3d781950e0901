"""Middleware: an onion folded once at start-up. The first in the list is outermost: first in, last out.

Middleware has `consume` (`ConsumeLayer`), `publish` (`PublishLayer`) or both. An `async def` function of `consume`'s
shape is middleware too. All the handlers that one instance wraps share its state. Middleware may also have the methods
of these protocols, each independently of the others. A method with the right name and shape is enough:

- `Readiness`: when its queue may start the next job.
- `Bypass`: whether its `publish` has nothing to do now.
- `Bound`: takes clock, chance, the number of processes and their shared memory from the worker or publisher.
- `Stated`: states its time limit and its retries, as `LayerFacts`.
- `once = True` (a class attribute): a handler's middleware of this class replaces the app's, instead of running inside
  the app's.

`check_layers` checks all these shapes when the app is made. leveret reads no other attribute.

Order of calls: the middleware of a run is called in the run's task, outermost first. Runs of several jobs overlap, so
the state of middleware must allow concurrent runs. Cancellation (a time-out, the end of the grace) is raised as
`CancelledError` where the middleware awaits `proceed`, and must propagate. An exception from middleware goes to the
middleware outside it. An exception that leaves the outermost middleware buries the job.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from typing import Annotated, Any, Protocol, TypeAlias, TypeGuard

import msgspec
from typing_extensions import TypeVar

from .attempt import Attempt
from .envelope import Envelope, Receipt
from .errors import ConfigurationError
from .outcome import Outcome
from .runtime import Runtime
from .texts import named

Consume: TypeAlias = Callable[[Attempt], Awaitable[Outcome]]
"""The rest of the chain, as middleware's `consume` gets it."""
Publish: TypeAlias = Callable[[Envelope], Awaitable[Receipt]]
"""The rest of the chain, as middleware's `publish` gets it."""
_R_contra = TypeVar("_R_contra", contravariant=True, default=object)


class ConsumeLayer(Protocol[_R_contra]):
    """Middleware around a run: await `proceed(attempt)` and return an outcome. Its exceptions go to the middleware outside it."""

    def consume(self, attempt: Attempt[_R_contra], proceed: Consume, /) -> Awaitable[Outcome]:
        """Run around the handler; `proceed` may be called several times (a try in place), or not at all."""
        ...


class PublishLayer(Protocol):
    """Middleware around a publish: await `proceed(envelope)` and return its receipt; on a burial it may change only the headers."""

    def publish(self, envelope: Envelope, proceed: Publish, /) -> Awaitable[Receipt]:
        """Run around a publish; `envelope.cause` is None for a publisher's publish, else "retry", "snooze", "bury" or "crash"."""
        ...


class Readiness(Protocol):
    """Middleware that says when its queue may start the next job.

    The consumer asks only if every handler of the queue has the same instance. Only `ready_in_s` is required. Middleware
    may leave out the others; the defaults below then apply. A subclass inherits them.
    """

    @abstractmethod
    def ready_in_s(self) -> float:
        """Return the seconds until the next start is allowed; 0: now. Asking twice costs no more than asking once: `consume` counts the start."""
        ...

    def starts_now(self) -> int:
        """Return how many jobs may start now, after `ready_in_s` returned 0, so that the consumer asks once for all of them. Default: 1."""
        return 1

    @property
    def starts_per_s(self) -> float | None:
        """Starts per second of this process when all processes have jobs. A lower figure lowers the prefetch.

        Also read before `bind`. The default None means not known.
        """
        return None


class Bypass(Protocol):
    """Middleware whose `publish` sometimes has nothing to do. While all middleware passes, the publisher skips it, and `publish_many` needs no task per job."""

    @abstractmethod
    def passes_publish(self) -> bool:
        """Return whether `publish` would only proceed now; called for every publish."""
        ...


class Bound(Protocol):
    """Middleware that needs the clock, chance, the number of processes, or their shared memory."""

    @abstractmethod
    def bind(self, runtime: Runtime, /) -> None:
        """Take the runtime of the process; called whenever a worker or a publisher is made."""
        ...


_Seconds: TypeAlias = Annotated[int, msgspec.Meta(ge=0)] | Annotated[float, msgspec.Meta(ge=0)]  # an int stays an int


class RetryWaits(msgspec.Struct, frozen=True, kw_only=True):
    """How middleware retries a failure. Raises ValueError for an entry that doesn't say when, or how often."""

    on: str | None = None
    """The failures that the entry applies to, such as "ConnectionError, TimeoutError". None: all that no earlier entry names."""
    max_attempts: Annotated[int, msgspec.Meta(ge=1)] | None
    """Runs in total; then the job is buried. None: `stop` decides."""
    immediate: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Further tries in place, within one attempt."""
    ceilings_s: tuple[_Seconds, ...] = ()
    """The longest wait after each attempt, in seconds; the last entry also holds for all later attempts."""
    wait: str | None = None
    """What computes the waits if their ceilings aren't known, such as "wait_random(0, 60)"."""
    stop: str | None = None
    """What decides when the job is buried if the number of runs isn't known, such as "stop_after_delay(3600)"."""

    def __post_init__(self) -> None:
        if self.max_attempts != 1 and not self.ceilings_s and not self.wait:
            msg = f"RetryWaits: max_attempts={self.max_attempts} needs ceilings_s, the longest wait after each attempt, or wait"
            raise ValueError(msg)
        if self.max_attempts is None and not self.stop:
            msg = "RetryWaits: max_attempts=None needs stop, which decides when the job is buried"
            raise ValueError(msg)


class LayerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about middleware of any class; the start-up checks and `leveret describe` read them."""

    limit_s: _Seconds | None = None
    """Seconds after which the middleware ends a run. None: no time limit."""
    tries_in_place: Annotated[int, msgspec.Meta(ge=0)] = 0
    """How often, at most, it repeats the run inside it within one attempt. Each repeat may use up the time limits inside it again.

    Its own `limit_s` holds for all repeats together.
    """
    retries: tuple[RetryWaits, ...] = ()
    """How the middleware retries; the first entry that matches a failure applies."""


class Stated(Protocol):
    """Middleware that states facts about itself."""

    @abstractmethod
    def facts(self) -> LayerFacts:
        """Return the facts; called when the app is made, before `bind`, and again at start-up. The facts must not change."""
        ...


_L = TypeVar("_L", default=object)
Layer: TypeAlias = ConsumeLayer[_L] | PublishLayer | Callable[[Attempt[_L], Consume], Awaitable[Outcome]]
"""An entry of `middleware=`: an object with `consume`, `publish` or both, or an `async def` function of `consume`'s shape."""
AnyLayer: TypeAlias = Any
"""Middleware whose shape `check_layers` has checked, for resources of any type."""
instrumentation: list[Callable[[tuple[AnyLayer, ...]], tuple[AnyLayer, ...]]] = []
"""Functions applied to every app's middleware when a worker or publisher uses it; auto-instrumentation puts `Tracing` outermost with one."""


def is_consume_layer(layer: AnyLayer) -> TypeGuard[ConsumeLayer[Any]]:
    """Return whether `layer` has `consume`."""
    return getattr(layer, "consume", None) is not None


def is_publish_layer(layer: AnyLayer) -> TypeGuard[PublishLayer]:
    """Return whether `layer` has `publish`."""
    return getattr(layer, "publish", None) is not None


def is_bypass(layer: AnyLayer) -> TypeGuard[Bypass]:
    """Return whether `layer` has `passes_publish`."""
    return getattr(layer, "passes_publish", None) is not None


def is_bound(layer: AnyLayer) -> TypeGuard[Bound]:
    """Return whether `layer` has `bind`."""
    return getattr(layer, "bind", None) is not None


class _Readiness(msgspec.Struct, frozen=True):
    """A complete `Readiness`: the defaults stand for the methods that the middleware leaves out."""

    ready_in_s: Callable[[], float]
    starts_now: Callable[[], int]
    starts_per_s: float | None


def readiness_of(layer: AnyLayer, where: str) -> Readiness | None:
    """Return the readiness of `layer`, with the defaults filled in; None without `ready_in_s`."""
    ready_in_s = getattr(layer, "ready_in_s", None)
    if ready_in_s is None:
        return None
    return _Readiness(ready_in_s, getattr(layer, "starts_now", None) or (lambda: 1), starts_per_s_of(layer, where))


def starts_per_s_of(layer: AnyLayer, where: str) -> float | None:
    """Return the current `starts_per_s` of `layer`. Raises ConfigurationError for a wrong value."""
    try:
        starts_per_s: object = getattr(layer, "starts_per_s", None)
    except Exception as error:
        msg = f"{_at(where, layer)}: starts_per_s raises {named(error)}"
        raise ConfigurationError(msg) from error
    if starts_per_s is None:
        return None
    if isinstance(starts_per_s, (int, float)) and not isinstance(starts_per_s, bool) and 0 <= starts_per_s < _INF:
        return starts_per_s
    msg = f"{_at(where, layer)}: starts_per_s must be a finite number >= 0 or None, not {starts_per_s!r:.80}"
    raise ConfigurationError(msg)


_INF = float("inf")
_NO_FACTS = LayerFacts()


def facts_of(layer: AnyLayer, where: str) -> LayerFacts:
    """Return the facts of `layer`; empty facts without `facts()`. Raises ConfigurationError for wrong facts."""
    facts = getattr(layer, "facts", None)
    if facts is None:
        return _NO_FACTS
    try:
        stated: object = facts()
    except Exception as error:
        msg = f"{_at(where, layer)}: facts() raises {named(error)}"
        raise ConfigurationError(msg) from error
    if not isinstance(stated, LayerFacts):
        msg = f"{_at(where, layer)}: facts() returns {type(stated).__name__}, not LayerFacts"
        raise ConfigurationError(msg)
    try:
        return msgspec.convert(msgspec.to_builtins(stated), LayerFacts)  # a Struct's constructor checks no types
    except (TypeError, ValueError) as error:
        msg = f"{_at(where, layer)}: facts() returns an invalid LayerFacts, {stated!r:.200}: {error}"
        raise ConfigurationError(msg) from error


_SHAPES = {
    "consume": (2, "async def consume(self, attempt, proceed)"),
    "publish": (2, "async def publish(self, envelope, proceed)"),
    "ready_in_s": (0, "def ready_in_s(self) -> float"),
    "starts_now": (0, "def starts_now(self) -> int"),
    "passes_publish": (0, "def passes_publish(self) -> bool"),
    "bind": (1, "def bind(self, runtime) -> None"),
    "facts": (0, "def facts(self) -> LayerFacts"),
}
"""Every method that leveret calls if it exists: the number of arguments, and the signature that errors show."""


def name_of(layer: AnyLayer) -> str:
    """Return the name of middleware in `describe` and errors: its repr, its class without one, or the name of a function."""
    if inspect.isfunction(layer):
        return layer.__name__
    shown = repr(layer)
    return type(layer).__name__ if shown == object.__repr__(layer) else shown


def _at(where: str, layer: AnyLayer) -> str:
    return f"{where}: the middleware {name_of(layer)}"


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        return not inspect.ismethod(function)  # a method without `self`, or a builtin without a signature
    return True


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _fits(function: Any, count: int, *, is_async: bool) -> bool:
    return callable(function) and _is_async(function) is is_async and _takes(function, count)


def _check(layer: AnyLayer, where: str) -> None:
    if inspect.isclass(layer):
        msg = f"{where}: {layer.__name__} is a class; list an instance, {layer.__name__}(…)"
        raise ConfigurationError(msg)
    for name, (count, shape) in _SHAPES.items():
        method = getattr(layer, name, None)
        if method is not None and not _fits(method, count, is_async=shape.startswith("async")):
            msg = f"{_at(where, layer)}: {name} must be `{shape}`"
            raise ConfigurationError(msg)
    near = _misspelt(layer)
    if not is_consume_layer(layer) and not is_publish_layer(layer) and not _fits(layer, 2, is_async=True):
        hint = f" (rename {near[0]}() to {near[1]}()?)" if near else ""
        msg = f"{_at(where, layer)} has neither consume() nor publish(){hint}, and isn't a function `async def middleware(attempt, proceed)`"
        raise ConfigurationError(msg)
    if near:
        msg = f"{_at(where, layer)} has a method {near[0]}(); did you mean {near[1]}()? If not, rename {near[0]}()"
        raise ConfigurationError(msg)
    starts_per_s_of(layer, where)
    facts_of(layer, where)


def _misspelt(layer: AnyLayer) -> tuple[str, str] | None:
    """Return a public method with a name close to one that leveret calls, and the latter name; type checkers don't notice the slip."""
    kind: type[Any] = type(layer)  # pyright: ignore[reportUnknownVariableType]
    others = [
        name for name in dir(kind) if not name.startswith("_") and name not in _SHAPES and callable(getattr(kind, name))
    ]
    if not others:
        return None
    import difflib

    for name in others:
        for meant in difflib.get_close_matches(name, _SHAPES, 1, cutoff=0.84):
            if not hasattr(layer, meant):
                return name, meant
    return None


def check_layers(layers: object, where: str) -> tuple[AnyLayer, ...]:
    """Return `layers` as a tuple. Raises ConfigurationError, with the name of the middleware that has a wrong shape.

    Type checkers let a misspelt second method pass, and don't see that middleware is listed twice.
    """
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
        msg = f"{where}: middleware= takes a list, not {layers!r}"
        raise ConfigurationError(msg)
    listed: tuple[AnyLayer, ...] = tuple(layers)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    for layer in listed:
        _check(layer, where)
    for index, layer in enumerate(listed):
        for other in listed[:index]:
            if other is layer:
                msg = f"{_at(where, layer)} is listed twice"
                raise ConfigurationError(msg)
            if getattr(layer, "once", False) and type(other) is type(layer):
                msg = f"{where}: two {type(layer).__name__} in one list; keep one, the other would have no effect"
                raise ConfigurationError(msg)
    return listed
