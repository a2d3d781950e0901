"""Middleware: an onion folded once at start-up. First in the list is outermost: first in, last out.

Middleware has `consume` (`ConsumeLayer`), `publish` (`PublishLayer`) or both. A plain function of `consume`'s shape is
middleware too. One instance is one state, shared by every handler that it wraps. It may also have what these protocols
name, each by itself; a method that has the right name and shape is enough:

- `Readiness`: says when its queue may start the next job.
- `Bypass`: says when its `publish` would only proceed.
- `Bound`: takes clock, chance and the number of processes from the worker or publisher.
- `Stated`: tells others its time limit and its retries, as `LayerFacts`.
- `once = True` (a class attribute): a handler's own middleware of that class replaces the app's, instead of coming
  inside it.

`check_layers` checks the shape of all of it when the app is made. Nothing in leveret looks at any other attribute.

Order of calls: the middleware of one run is called in the run's own task, outermost first. Runs of several jobs
overlap, so its state must bear that. Cancellation (a time-out, the end of the grace) arrives as `CancelledError` at its
await of `proceed`, and must go on outwards. What middleware raises goes to the middleware outside it; what leaves the
outermost becomes a burial.
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
"""The rest of the chain, as a `consume` layer gets it."""
Publish: TypeAlias = Callable[[Envelope], Awaitable[Receipt]]
"""The rest of the chain, as a `publish` layer gets it."""
_R_contra = TypeVar("_R_contra", contravariant=True, default=object)


class ConsumeLayer(Protocol[_R_contra]):
    """Middleware round a run: await `proceed(attempt)` and return an outcome. What it raises goes to the middleware outside it."""

    def consume(self, attempt: Attempt[_R_contra], proceed: Consume, /) -> Awaitable[Outcome]:
        """Run round the handler; `proceed` may be called again (a try in place), or not at all."""
        ...


class PublishLayer(Protocol):
    """Middleware round a publish: await `proceed(envelope)` and return its receipt; on a burial it may change headers only."""

    def publish(self, envelope: Envelope, proceed: Publish, /) -> Awaitable[Receipt]:
        """Run round a publish; `envelope.cause` tells a retry, a snooze and a burial from a publisher's own."""
        ...


class Readiness(Protocol):
    """Middleware that says when its queue may start the next job.

    The consumer asks where every handler of the queue has that very instance. Only `ready_in_s` is required. Middleware
    may leave the others out, and then the defaults below apply; a subclass inherits them.
    """

    @abstractmethod
    def ready_in_s(self) -> float:
        """Return the seconds until the next start is allowed; 0: now. This reserves nothing: `consume` counts the start."""
        ...

    def starts_now(self) -> int:
        """Return how many jobs may start at once now, after `ready_in_s` returned 0; the consumer then needn't ask for each. Default 1."""
        return 1

    @property
    def starts_per_s(self) -> float | None:
        """Starts per second in this process; a lower figure lowers the prefetch. Read before `bind` too. Default None: not known."""
        return None


class Bypass(Protocol):
    """Middleware whose `publish` has nothing to do at times. While all agree, a publisher leaves them out, and `publish_many` needs no task per job."""

    @abstractmethod
    def passes_publish(self) -> bool:
        """Return whether `publish` would only proceed now; asked for every publish."""
        ...


class Bound(Protocol):
    """Middleware that needs the clock, chance, or the number of processes."""

    @abstractmethod
    def bind(self, runtime: Runtime, /) -> None:
        """Take what the process hands over; called whenever a worker or a publisher is made."""
        ...


_Seconds: TypeAlias = Annotated[int, msgspec.Meta(ge=0)] | Annotated[float, msgspec.Meta(ge=0)]  # an int stays an int


class RetryWaits(msgspec.Struct, frozen=True, kw_only=True):
    """What middleware does about a failure. ValueError: more than one attempt, and no wait between them."""

    on: str | None = None
    """Which failure: "ConnectionError, TimeoutError". None: any that no entry before this one names."""
    max_attempts: Annotated[int, msgspec.Meta(ge=1)]
    """Runs in all; then the job is buried."""
    immediate: Annotated[int, msgspec.Meta(ge=0)] = 0
    """More tries in place, within one attempt."""
    ceilings_s: tuple[_Seconds, ...] = ()
    """The longest wait after each attempt, seconds; the last one also holds for all later attempts."""

    def __post_init__(self) -> None:
        if self.max_attempts != 1 and not self.ceilings_s:
            msg = f"RetryWaits: {self.max_attempts} attempts need ceilings_s, the longest wait after each"
            raise ValueError(msg)


class LayerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What others may know of middleware, whatever its class: the start-up checks and `leveret describe` read it."""

    limit_s: _Seconds | None = None
    """It ends a run after so many seconds. None: it has no time limit."""
    tries_in_place: Annotated[int, msgspec.Meta(ge=0)] = 0
    """At most so many times it runs what is inside it again within one attempt. The time limits inside it count as often."""
    retries: tuple[RetryWaits, ...] = ()
    """How it retries; the first entry that matches a failure applies."""


class Stated(Protocol):
    """Middleware that states facts about itself."""

    @abstractmethod
    def facts(self) -> LayerFacts:
        """Return its facts; called when the app is made, before `bind`, and again at start-up. The facts must not change."""
        ...


_L = TypeVar("_L", default=object)
Layer: TypeAlias = ConsumeLayer[_L] | PublishLayer | Callable[[Attempt[_L], Consume], Awaitable[Outcome]]
"""What `middleware=` takes: consume, publish, both, or a plain function of consume's shape. First in the list is outermost."""
AnyLayer: TypeAlias = Any
"""Middleware whose shape was checked by `check_layers`; its resources are the app's own affair."""
instrumentation: list[Callable[[tuple[AnyLayer, ...]], tuple[AnyLayer, ...]]] = []
"""Applied to every app's layers when they are used; how auto-instrumentation puts `Tracing` outermost."""


def is_consume_layer(layer: AnyLayer) -> TypeGuard[ConsumeLayer[Any]]:
    """Whether it has `consume`."""
    return getattr(layer, "consume", None) is not None


def is_publish_layer(layer: AnyLayer) -> TypeGuard[PublishLayer]:
    """Whether it has `publish`."""
    return getattr(layer, "publish", None) is not None


def is_bypass(layer: AnyLayer) -> TypeGuard[Bypass]:
    """Whether it has `passes_publish`."""
    return getattr(layer, "passes_publish", None) is not None


def is_bound(layer: AnyLayer) -> TypeGuard[Bound]:
    """Whether it has `bind`."""
    return getattr(layer, "bind", None) is not None


class _Readiness(msgspec.Struct, frozen=True):
    """A `Readiness` with the defaults for what it leaves out."""

    ready_in_s: Callable[[], float]
    starts_now: Callable[[], int]
    starts_per_s: float | None


def readiness_of(layer: AnyLayer, where: str) -> Readiness | None:
    """Return its readiness as of now, complete; None without `ready_in_s`."""
    ready_in_s = getattr(layer, "ready_in_s", None)
    if ready_in_s is None:
        return None
    return _Readiness(ready_in_s, getattr(layer, "starts_now", None) or (lambda: 1), starts_per_s_of(layer, where))


def starts_per_s_of(layer: AnyLayer, where: str) -> float | None:
    """Return its `starts_per_s` as of now; ConfigurationError where that isn't a number."""
    try:
        starts_per_s: object = getattr(layer, "starts_per_s", None)
    except Exception as error:
        msg = f"{_at(where, layer)}: starts_per_s raises {named(error)}"
        raise ConfigurationError(msg) from error
    if starts_per_s is None:
        return None
    if isinstance(starts_per_s, (int, float)) and not isinstance(starts_per_s, bool) and 0 <= starts_per_s < _INF:
        return starts_per_s
    msg = f"{_at(where, layer)}: starts_per_s is a finite number (starts per second) or None, not {starts_per_s!r:.80}"
    raise ConfigurationError(msg)


_INF = float("inf")
_NO_FACTS = LayerFacts()


def facts_of(layer: AnyLayer, where: str) -> LayerFacts:
    """Return its facts, empty ones without `facts()`; ConfigurationError where they are wrong."""
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
        return msgspec.convert(msgspec.to_builtins(stated), LayerFacts)  # making a Struct checks no types
    except (TypeError, ValueError) as error:
        msg = f"{_at(where, layer)}: facts() returns {stated!r:.200}, which is wrong: {error}"
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
"""Every method that is called if it is there: with how many arguments, and how an error shows it."""


def name_of(layer: AnyLayer) -> str:
    """Return how `describe` and errors name a layer: its class and what it was made with, or its function's name."""
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
            msg = f"{_at(where, layer)}: {name} isn't `{shape}`"
            raise ConfigurationError(msg)
    near = _misspelt(layer)
    if not is_consume_layer(layer) and not is_publish_layer(layer) and not _fits(layer, 2, is_async=True):
        hint = f" (is its {near[0]}() meant to be {near[1]}()?)" if near else ""
        msg = (
            f"{_at(where, layer)} has neither consume nor publish{hint}, and isn't `async def layer(attempt, proceed)`"
        )
        raise ConfigurationError(msg)
    if near:
        msg = f"{_at(where, layer)} has a method {near[0]}(); is {near[1]}() meant? Give it another name if not"
        raise ConfigurationError(msg)
    starts_per_s_of(layer, where)
    facts_of(layer, where)


def _misspelt(layer: AnyLayer) -> tuple[str, str] | None:
    """Return a public method whose name is nearly one that we would call, and that name; the type checkers don't see it."""
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
    """Return `layers` as a tuple, or raise ConfigurationError that names the one whose shape is wrong.

    The type checkers let a misspelt second method through, and can't see a layer listed twice.
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
                msg = f"{where}: two {type(layer).__name__} in one list; one of them would have no effect"
                raise ConfigurationError(msg)
    return listed
