"""The app: handlers, schedules and layers of one service, and the doors into it."""

from __future__ import annotations

import importlib
import inspect
import os
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast, overload

import msgspec
from typing_extensions import TypeVar as DefaultTypeVar

from .attempt import Attempt
from .broker import Broker
from .chain import layers_of
from .consuming.handler import Handler, Registration, resolve
from .envelope import Envelope
from .errors import ConfigurationError
from .job import Job
from .layer import AnyLayer, Layer, check_layers, instrumentation
from .options import Outgoing
from .outcome import Outcome
from .publishing.publisher import Publisher
from .publishing.sender import Sender
from .runtime import Runtime
from .schemes import broker_module
from .settings import Settings, environment, redact

if TYPE_CHECKING:
    from .cron.schedule import Schedule
    from .publishing.blocking import BlockingPublisher


_J = TypeVar("_J", bound=Job)
_R = DefaultTypeVar("_R", default=Any)
_Says = TypeVar("_Says", bound=Outcome | Awaitable[Outcome | None] | None)
_Emits = TypeVar("_Emits", bound=Job | Outgoing | None)


class _Handler(Protocol[_R]):
    @overload
    def __call__(self, function: Callable[[_J, Attempt[_R]], _Says], /) -> Callable[[_J, Attempt[_R]], _Says]: ...
    @overload
    def __call__(self, function: Callable[[_J], _Says], /) -> Callable[[_J], _Says]: ...


class _HandlerOf(Protocol[_J, _R]):
    @overload
    def __call__(self, function: Callable[[_J, Attempt[_R]], _Says], /) -> Callable[[_J, Attempt[_R]], _Says]: ...
    @overload
    def __call__(self, function: Callable[[_J], _Says], /) -> Callable[[_J], _Says]: ...


class _Schedule(Protocol):
    @overload
    def __call__(self, function: Callable[[], _Emits], /) -> Callable[[], _Emits]: ...
    @overload
    def __call__(self, function: Callable[[datetime], _Emits], /) -> Callable[[datetime], _Emits]: ...


class Capture(msgspec.Struct, frozen=True):
    """Where an app's jobs go while a test runs it."""

    open_broker: Callable[[], Broker]
    runtime: Runtime
    published: Callable[[Job, Envelope], None]
    """Told of every job that a publisher sent."""


class App(Generic[_R]):
    """Handlers, schedules and layers of one service, generic in what `lifespan` yields; without one in None.

    Args:
        name: The service; AMQP's `app_id`, and the beginning of cron job ids. Up to 64 characters.
        broker: URL; beats LEVERET_BROKER.
        default_broker: URL where neither is set: a program's own embedded default. Without any, start-up is an error.
        middleware: Layers round every run and every publish; first is outermost.
        lifespan: A function that returns an async context manager, entered once a worker process, and only there.
        modules: Imported by `work`, `cron` and `describe`, not by publishers: where the handlers are.
        around_sync: A function that returns a context manager, entered in the thread round each `def` handler.
        settings: What an operator may set.

    Raises:
        ConfigurationError: Something of it is of a wrong shape; the text names it.
    """

    @overload
    def __init__(
        self: App[None],
        name: str,
        *,
        broker: str | None = None,
        default_broker: str | None = None,
        middleware: Sequence[Layer[None]] = (),
        lifespan: None = None,
        modules: list[str] | tuple[str, ...] = (),
        around_sync: Callable[[], AbstractContextManager[object]] | None = None,
        settings: Settings | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self,
        name: str,
        *,
        lifespan: Callable[[], AbstractAsyncContextManager[_R]],
        broker: str | None = None,
        default_broker: str | None = None,
        middleware: Sequence[Layer[_R]] = (),
        modules: list[str] | tuple[str, ...] = (),
        around_sync: Callable[[], AbstractContextManager[object]] | None = None,
        settings: Settings | None = None,
    ) -> None: ...
    def __init__(
        self,
        name: str,
        *,
        broker: str | None = None,
        default_broker: str | None = None,
        middleware: Sequence[Layer[Any]] = (),
        lifespan: Callable[[], AbstractAsyncContextManager[Any]] | None = None,
        modules: list[str] | tuple[str, ...] = (),
        around_sync: Callable[[], AbstractContextManager[object]] | None = None,
        settings: Settings | None = None,
    ) -> None:
        if not isinstance(name, str) or not 0 < len(name) <= 64:  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"an app's name is a text of 1 to 64 characters, not {name!r:.80}"
            raise ConfigurationError(msg)
        where = f"app {name!r}"
        for keyword, url in (("broker", broker), ("default_broker", default_broker)):
            if url is not None and not isinstance(url, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                msg = f"{where}: {keyword} is a URL, not {url!r:.80}"
                raise ConfigurationError(msg)
        for keyword, function in (("lifespan", lifespan), ("around_sync", around_sync)):
            if function is not None and not callable(function):
                msg = f"{where}: {keyword} is a function that returns a context manager, not {function!r:.80}; pass it without calling it"
                raise ConfigurationError(msg)
        if isinstance(modules, str) or not all(isinstance(module, str) for module in modules):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"{where}: modules is a list of module names, not {modules!r:.80}"
            raise ConfigurationError(msg)
        if settings is not None and not isinstance(settings, Settings):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"{where}: settings is a Settings, not {settings!r:.80}"
            raise ConfigurationError(msg)
        self._name = name
        self._broker = broker
        self._default_broker = default_broker
        self._layers = check_layers(middleware, where)
        self._lifespan = lifespan
        self._modules = tuple(modules)
        self._around_sync = around_sync
        self._settings = settings or Settings()
        self._registrations: list[Registration] = []
        self._schedules: dict[str, Schedule] = {}
        self._capture: Capture | None = None
        self._blocking: weakref.WeakSet[BlockingPublisher] = weakref.WeakSet()

    @property
    def name(self) -> str:
        """The service's name."""
        return self._name

    @property
    def settings(self) -> Settings:
        """What an operator may set."""
        return self._settings

    @property
    def lifespan(self) -> Callable[[], AbstractAsyncContextManager[_R]] | None:
        """What is entered once a worker process."""
        return self._lifespan

    @property
    def around_sync(self) -> Callable[[], AbstractContextManager[object]] | None:
        """What is entered round each `def` handler."""
        return self._around_sync

    @property
    def layers(self) -> tuple[AnyLayer, ...]:
        """The layers round everything, auto-instrumentation's included; first is outermost."""
        layers = self._layers
        for change in instrumentation:
            layers = change(layers)
        return layers

    @property
    def schedules(self) -> Sequence[Schedule]:
        """Every schedule, in the order in which they were made."""
        return tuple(self._schedules.values())

    def broker_url(self) -> str | None:
        """Return the broker's URL: `broker` beats LEVERET_BROKER beats `default_broker`; None without any.

        ConfigurationError where LEVERET_BROKER is set and empty: a service that lost its setting must not publish into
        a local file.
        """
        if self._broker:
            return self._broker
        set_to = environment(os.environ).broker
        if set_to is not None and not set_to.strip():
            msg = f"LEVERET_BROKER is set, but empty; unset it to use {redact(self._default_broker or 'App(broker=…)')}, or give it a URL"
            raise ConfigurationError(msg)
        return set_to or self._default_broker

    def runtime(self, processes: int = 1) -> Runtime:
        """Return what a process of this app hands to its broker and layers."""
        if self._capture is not None:
            return self._capture.runtime
        return Runtime(app=self._name, settings=self._settings, processes=processes)

    def open_broker(self, runtime: Runtime) -> Broker:
        """Make the app's broker; ConfigurationError for a missing or wrong URL. Connects to nothing."""
        if self._capture is not None:
            return self._capture.open_broker()
        url = self.broker_url()
        return broker_module(url).open_broker(cast("str", url), runtime)

    def sender(self, broker: Broker, runtime: Runtime) -> Sender:
        """Make what sends this app's jobs to `broker`."""
        return Sender(broker, self.layers, runtime, None if self._capture is None else self._capture.published)

    def import_modules(self) -> None:
        """Import `modules`, so that their handlers and schedules register; ConfigurationError names the one that fails."""
        for module in self._modules:
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                msg = f"app {self._name!r}: modules lists {module!r}, which can't be imported: {error}"
                raise ConfigurationError(msg) from error

    def handlers(self, queues: Sequence[str] = ()) -> list[Handler]:
        """Return the handlers, resolved, of `queues` (none given: of all); ConfigurationError where one is wrong.

        Two handlers for one job, two jobs of one name in a queue, one queue defined twice differently, a queue that
        has no handler: each is named.
        """
        layers = self.layers
        found: dict[tuple[str, str], Handler] = {}
        for registration in self._registrations:
            handler = resolve(registration, layers_of(layers, registration.layers))
            key = (handler.queue.name, handler.spec.name)
            if (twin := found.get(key)) is not None:
                msg = f"two handlers for job {handler.spec.name!r} of queue {handler.queue.name!r}: {twin.name} and {handler.name}"
                raise ConfigurationError(msg)
            for other in found.values():
                if other.queue.name == handler.queue.name and other.queue != handler.queue:
                    msg = f"{other.name} has {other.queue!r}, {handler.name} has {handler.queue!r}: one queue, two definitions; share one Queue"
                    raise ConfigurationError(msg)
            found[key] = handler
        names = list(dict.fromkeys(handler.queue.name for handler in found.values()))
        for queue in queues:
            if queue not in names:
                there = ", ".join(names) or "none"
                msg = f"app {self._name!r} has no handler for the queue {queue!r}, only for: {there}; list its module in App(modules=[…])"
                raise ConfigurationError(msg)
        return [handler for handler in found.values() if not queues or handler.queue.name in queues]

    @overload
    def handler(self, function: Callable[[_J, Attempt[_R]], _Says], /) -> Callable[[_J, Attempt[_R]], _Says]: ...
    @overload
    def handler(self, function: Callable[[_J], _Says], /) -> Callable[[_J], _Says]: ...
    @overload
    def handler(self, *, job: type[_J], middleware: Sequence[Layer[_R]] = ()) -> _HandlerOf[_J, _R]: ...
    @overload
    def handler(self, *, middleware: Sequence[Layer[_R]] = ()) -> _Handler[_R]: ...
    def handler(  # type: ignore[misc]  # pyright: ignore[reportInconsistentOverload] - each overload's own narrowing
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        job: type[Any] | None = None,
        middleware: Sequence[Layer[Any]] = (),
    ) -> Any:
        """Register an `async def` (runs on the loop) or `def` (in a thread); the function comes back unchanged.

        The annotation of its first parameter says which job it takes, and is resolved when a worker starts; `job=`
        says it where the annotation can't be resolved. `middleware` comes innermost, but a layer of a class that
        stands once (`Timeout`, `Retries` …) takes the place of the app's.
        """
        if function is not None and (inspect.isclass(function) or not callable(function)):
            msg = f"app {self._name!r}: @app.handler decorates a function, not {function!r:.80}; say which job it takes with job="
            raise ConfigurationError(msg)

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            where = f"handler {function.__module__}.{getattr(function, '__qualname__', function)}"
            layers = check_layers(middleware, where)
            self._registrations.append(Registration(function, job, layers))
            return function

        return register if function is None else register(function)

    @overload
    def cron(
        self, expression: str, job: Job | Outgoing, /, *, name: str, tz: str = "UTC", enabled: bool = True
    ) -> None: ...
    @overload
    def cron(
        self, expression: str, /, *, name: str | None = None, tz: str = "UTC", enabled: bool = True
    ) -> _Schedule: ...
    def cron(
        self,
        expression: str,
        job: Job | Outgoing | None = None,
        /,
        *,
        name: str | None = None,
        tz: str = "UTC",
        enabled: bool = True,
    ) -> Any:
        """Publish at each slot of a cron expression in the IANA zone `tz`; a wrong one is a ValueError.

        Five fields (minute, hour, day of month, month, day of week), or six with the seconds first. With a job it is
        a statement and needs a `name`; without one it decorates a plain `def` that returns the job to publish (or an
        `Outgoing`, or None for nothing) and may take its slot, an aware datetime.
        """
        from .cron.schedule import make_schedule  # with time zones, which nobody else here needs

        def register(emit: Callable[..., Any]) -> Callable[..., Any]:
            schedule = make_schedule(expression, emit, name=name, tz=tz, enabled=enabled)
            if schedule.name in self._schedules:
                msg = f"app {self._name!r} has two schedules of the name {schedule.name!r}; give one of them name="
                raise ValueError(msg)
            self._schedules[schedule.name] = schedule
            return emit

        if job is None:
            # a wrong expression or zone shows at the decorator's own line
            make_schedule(expression, lambda: None, name=name or "-", tz=tz, enabled=enabled)
            return register
        if not isinstance(job, (Job, Outgoing)):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"app {self._name!r}: cron takes a job or an Outgoing, not {job!r:.80}"
            raise ConfigurationError(msg)
        if not name:
            msg = f"app {self._name!r}: a schedule of a job has no function to be named for; give it name="
            raise ConfigurationError(msg)
        register(lambda: job)
        return None

    @asynccontextmanager
    async def _publisher(self) -> AsyncGenerator[Publisher, None]:
        runtime = self.runtime()
        broker = self.open_broker(runtime)
        publisher = Publisher(self.sender(broker, runtime))
        try:
            yield publisher
        finally:
            publisher.close()
            await broker.close()

    def publisher(self) -> AbstractAsyncContextManager[Publisher, None]:
        """Enter it in a service's lifespan; entering doesn't wait for the broker."""
        return cast("AbstractAsyncContextManager[Publisher, None]", self._publisher())

    def blocking_publisher(self) -> BlockingPublisher:
        """For Django, Flask, a script: a module's variable; nothing starts before first use."""
        from .publishing.blocking import BlockingPublisher

        publisher = BlockingPublisher(self.publisher)
        self._blocking.add(publisher)
        return publisher

    def worker(self, *, queues: list[str] | tuple[str, ...]) -> AbstractAsyncContextManager[None, None]:
        """Run a worker inside this program, without signal handlers; leaving drains it, for up to 30 s.

        Entering doesn't wait for a broker that is away; a wrong URL, login or queue is a ConfigurationError.
        """
        if isinstance(queues, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"app {self._name!r}: queues is a list of names, not {queues!r}"
            raise ConfigurationError(msg)
        from .consuming.worker import embedded

        return embedded(self, queues)

    @property
    def is_captured(self) -> bool:
        """Whether a test runs this app now."""
        return self._capture is not None

    @contextmanager
    def captured(self, capture: Capture) -> Generator[None, None, None]:
        """Send everything that this app publishes and consumes meanwhile to another broker; for `leveret.testing`."""
        if self._capture is not None:
            msg = f"app {self._name!r} is captured already; leave one running() before the next"
            raise RuntimeError(msg)
        self._reopen()
        self._capture = capture
        try:
            yield
        finally:
            self._reopen()
            self._capture = None

    def _reopen(self) -> None:
        for publisher in self._blocking:
            publisher.close()
