"""The app: the handlers, schedules and middleware of one service, and its publishers and workers."""

from __future__ import annotations

import importlib
import inspect
import os
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast, overload

import msgspec
from typing_extensions import TypeVar as DefaultTypeVar

from .attempt import Attempt
from .blocks import AsyncBlock
from .broker import Broker
from .chain import layers_of
from .consuming.handler import Handler, Registration, resolve
from .consuming.limits import Concurrency, in_code, in_environment
from .envelope import Envelope
from .errors import ConfigurationError
from .job import Job
from .layer import AnyLayer, Layer, check_layers, instrumentation
from .options import Outgoing
from .outbox import Outbox
from .publishing.publisher import Publisher, PublisherBlock
from .publishing.sender import Sender
from .runtime import Runtime, Shared
from .schemes import broker_module, can_store, open_outbox, open_store
from .settings import Settings, environment, redact_url

if TYPE_CHECKING:
    from .consuming.state import Worker
    from .cron.schedule import Schedule
    from .publishing.blocking import BlockingPublisher
    from .results.results import Results
    from .store import Store


_J = TypeVar("_J", bound=Job)
_R = DefaultTypeVar("_R", default=Any)
_Says = TypeVar(
    "_Says"
)  # whether it fits the job's result is checked when a worker starts: a bound would refuse right handlers
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


def _check_context(where: str, keyword: str, function: object, decorator: str) -> None:
    """Refuse a lifespan or an `around_sync` that couldn't be entered, with what to change."""
    if (
        inspect.isgeneratorfunction(function)
        or inspect.isasyncgenfunction(function)
        or inspect.iscoroutinefunction(function)
    ):
        advice = f"decorate {function.__name__} with @{decorator}"
    elif function is None or (
        callable(function) and not isinstance(function, (AbstractContextManager, AbstractAsyncContextManager))
    ):
        return
    else:  # what contextlib's decorators return is callable too: it can decorate functions
        advice = "pass the function without calling it"
    msg = f"{where}: {keyword} must be a function that returns a context manager, not {function!r:.80}; {advice}"
    raise ConfigurationError(msg)


class Capture(msgspec.Struct, frozen=True):
    """Where an app's jobs go while a test runs the app."""

    open_broker: Callable[[], Broker]
    open_store: Callable[[], Store | None]
    runtime: Runtime
    published: Callable[[Job, Envelope], None]
    """Called with every job that a publisher sent."""


class App(Generic[_R]):
    """The handlers, schedules and middleware of one service; generic in the type that `lifespan` yields, or None.

    Args:
        name: The service's name, 1 to 64 characters; AMQP's `app_id`, and the beginning of cron job ids.
        broker: The broker's URL. Takes precedence over LEVERET_BROKER.
        default_broker: The broker's URL if neither `broker` nor LEVERET_BROKER is set. Without any of the three, start-up
            raises ConfigurationError.
        middleware: Middleware around every run and every publish, outermost first.
        lifespan: A function that returns an async context manager, entered once per worker process and nowhere else.
        outbox: The URL of a PostgreSQL database in which jobs wait that are published with `connection=`, until `leveret relay` has
            published them to the broker; also the place of the inbox of `Attempt.once`. Takes precedence over LEVERET_OUTBOX.
        store: The URL of the job store, which keeps states and results of the job classes with `keep=`. Takes precedence over
            LEVERET_STORE. Default: the broker, if it is PostgreSQL, SQLite or memory.
        modules: Names of the modules with the handlers and schedules. `work`, `cron` and `describe` import them; publishers don't.
        around_sync: A function that returns a context manager, entered around each `def` handler, in the handler's thread.
        concurrency: Jobs at once per worker process: a number for the process, which `def` handlers then may use up too, or a
            dict of queue names and numbers. LEVERET_CONCURRENCY and the options of `leveret work` take precedence.
        settings: The app's settings.

    Raises:
        ConfigurationError: An argument is wrong; the text names the argument.
    """

    @overload
    def __init__(
        self: App[None],
        name: str,
        *,
        broker: str | None = None,
        default_broker: str | None = None,
        outbox: str | None = None,
        store: str | None = None,
        middleware: Sequence[Layer[None]] = (),
        lifespan: None = None,
        modules: list[str] | tuple[str, ...] = (),
        around_sync: Callable[[], AbstractContextManager[object]] | None = None,
        concurrency: int | Mapping[str, int] | None = None,
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
        outbox: str | None = None,
        store: str | None = None,
        middleware: Sequence[Layer[_R]] = (),
        modules: list[str] | tuple[str, ...] = (),
        around_sync: Callable[[], AbstractContextManager[object]] | None = None,
        concurrency: int | Mapping[str, int] | None = None,
        settings: Settings | None = None,
    ) -> None: ...
    def __init__(
        self,
        name: str,
        *,
        broker: str | None = None,
        default_broker: str | None = None,
        outbox: str | None = None,
        store: str | None = None,
        middleware: Sequence[Layer[Any]] = (),
        lifespan: Callable[[], AbstractAsyncContextManager[Any]] | None = None,
        modules: list[str] | tuple[str, ...] = (),
        around_sync: Callable[[], AbstractContextManager[object]] | None = None,
        concurrency: int | Mapping[str, int] | None = None,
        settings: Settings | None = None,
    ) -> None:
        if not isinstance(name, str) or not 0 < len(name) <= 64:  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"an app's name must be a str of 1 to 64 characters, not {name!r:.80}"
            raise ConfigurationError(msg)
        where = f"app {name!r}"
        for keyword, url in (
            ("broker", broker),
            ("default_broker", default_broker),
            ("outbox", outbox),
            ("store", store),
        ):
            if url is not None and not isinstance(url, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                msg = f"{where}: {keyword} must be a URL, not {url!r:.80}"
                raise ConfigurationError(msg)
        _check_context(where, "lifespan", lifespan, "asynccontextmanager")
        _check_context(where, "around_sync", around_sync, "contextmanager")
        if isinstance(modules, str) or not all(isinstance(module, str) for module in modules):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"{where}: modules must be a list of module names, not {modules!r:.80}"
            raise ConfigurationError(msg)
        if settings is not None and not isinstance(settings, Settings):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"{where}: settings must be a Settings, not {settings!r:.80}"
            raise ConfigurationError(msg)
        self._name = name
        self._broker = broker
        self._default_broker = default_broker
        self._outbox = outbox
        self._store = store
        self._layers = check_layers(middleware, where)
        self._lifespan = lifespan
        self._modules = tuple(modules)
        self._around_sync = around_sync
        self._concurrency = in_code(concurrency, where)
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
        """The app's settings."""
        return self._settings

    @property
    def lifespan(self) -> Callable[[], AbstractAsyncContextManager[_R]] | None:
        """The function whose context manager is entered once per worker process."""
        return self._lifespan

    @property
    def around_sync(self) -> Callable[[], AbstractContextManager[object]] | None:
        """The function whose context manager is entered around each `def` handler."""
        return self._around_sync

    @property
    def layers(self) -> tuple[AnyLayer, ...]:
        """The middleware around every run and publish, auto-instrumentation's included, outermost first."""
        layers = self._layers
        for change in instrumentation:
            layers = change(layers)
        return layers

    @property
    def modules(self) -> Sequence[str]:
        """The names of the modules that have the handlers and schedules."""
        return self._modules

    @property
    def schedules(self) -> Sequence[Schedule]:
        """Every schedule, in order of registration."""
        return tuple(self._schedules.values())

    def broker_url(self) -> str | None:
        """Return the broker's URL: the first of `broker`, LEVERET_BROKER and `default_broker` that is set; None without any.

        Raises ConfigurationError if LEVERET_BROKER is needed and empty: a service that lost its setting must not publish into
        a local file.
        """
        if self._broker:
            return self._broker
        set_to = environment(os.environ).broker
        if set_to is not None and not set_to.strip():
            msg = f"LEVERET_BROKER is empty; set it to a URL, or unset it to use {redact_url(self._default_broker or 'App(broker=…)')}"
            raise ConfigurationError(msg)
        return set_to or self._default_broker

    def outbox_url(self) -> str | None:
        """Return the URL of the outbox: the first of `outbox` and LEVERET_OUTBOX that is set; None without any."""
        return self._outbox or environment(os.environ).outbox

    def store_url(self) -> str | None:
        """Return the URL of the job store: the first of `store`, LEVERET_STORE and a broker that can store; None without any."""
        url = self._store or environment(os.environ).store
        if url is None and can_store(broker := self.broker_url()):
            return broker
        return url

    def concurrency(self, *own: Concurrency) -> Sequence[Concurrency]:
        """Return the limits of a worker that code (`own` after the app's) and LEVERET_CONCURRENCY set; a later one takes precedence.

        Raises ConfigurationError if the variable has a wrong value. A test doesn't read the variable.
        """
        places = (self._concurrency, *own)
        return places if self.is_captured else (*places, in_environment(environment(os.environ).concurrency))

    def runtime(self, processes: int = 1, shared: Shared | None = None) -> Runtime:
        """Return the runtime that a process of this app hands to its broker and middleware."""
        if self._capture is not None:
            return self._capture.runtime
        return Runtime(app=self._name, settings=self._settings, processes=processes, shared=shared)

    def open_broker(self, runtime: Runtime) -> Broker:
        """Return the app's broker, without connecting; ConfigurationError for a missing or wrong URL."""
        if self._capture is not None:
            return self._capture.open_broker()
        url = self.broker_url()
        return broker_module(url).open_broker(cast("str", url), runtime)

    def sender(self, broker: Broker, runtime: Runtime) -> Sender:
        """Return the sender of this app's jobs to `broker`."""
        results = partial(self._open_results, runtime)
        if self._capture is not None:
            return Sender(broker, self.layers, runtime, self._capture.published, open_results=results)
        return Sender(broker, self.layers, runtime, outbox=self.open_outbox(runtime), open_results=results)

    def _open_results(self, runtime: Runtime) -> Results | None:
        store = self.open_store(runtime)
        if store is None:
            return None
        from .results.results import Results  # which only an app with keep= needs

        return Results(store, runtime)

    def open_outbox(self, runtime: Runtime) -> Outbox | None:
        """Return the app's outbox, without connecting; None if it has none, ConfigurationError for a wrong URL."""
        url = self.outbox_url()
        return None if url is None else open_outbox(url, runtime)

    def open_store(self, runtime: Runtime) -> Store | None:
        """Return the app's job store, without connecting; None if it has none, ConfigurationError for a wrong URL."""
        if self._capture is not None:
            return self._capture.open_store()
        url = self.store_url()
        return None if url is None else open_store(url, runtime)

    def import_modules(self) -> None:
        """Import `modules`, so that their handlers and schedules register; ConfigurationError names a module that is missing."""
        for module in self._modules:
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if not f"{module}.".startswith(f"{error.name}."):
                    raise  # the module is there, and imports one that is missing
                msg = f"app {self._name!r}: modules lists {module!r}, which can't be imported: {error}"
                raise ConfigurationError(msg) from error

    def handlers(self, queues: Sequence[str] = ()) -> list[Handler]:
        """Return the resolved handlers of `queues` (default: of all queues).

        Raises ConfigurationError for a wrong handler, two handlers for one job, two jobs with one name in a queue, a queue
        with two definitions, or a queue without a handler.
        """
        layers = self.layers
        found: dict[tuple[str, str], Handler] = {}
        for registration in self._registrations:
            handler = resolve(registration, layers_of(layers, registration.layers))
            key = (handler.queue.name, handler.spec.name)
            if (twin := found.get(key)) is not None:
                msg = f"two handlers for job {handler.spec.name!r} of queue {handler.queue.name!r}: {twin.name} and {handler.name}; remove one"
                if handler.job_class is not twin.job_class:
                    classes = f"{twin.job_class.__qualname__} and {handler.job_class.__qualname__}"
                    msg = f"the classes {classes} share the job name {handler.spec.name!r} in queue {handler.queue.name!r}; give one of them another name="
                raise ConfigurationError(msg)
            for other in found.values():
                if other.queue.name == handler.queue.name and other.queue != handler.queue:
                    definitions = f"{other.queue!r} in {other.name}, {handler.queue!r} in {handler.name}"
                    msg = f"queue {other.queue.name!r} has two definitions: {definitions}; share one Queue"
                    raise ConfigurationError(msg)
            found[key] = handler
        names = list(dict.fromkeys(handler.queue.name for handler in found.values()))
        for queue in queues:
            if queue not in names:
                known = ", ".join(names) or "none"
                msg = f"app {self._name!r} has no handler for queue {queue!r} (queues with handlers: {known}); list the handler's module in App(modules=[…])"
                raise ConfigurationError(msg)
        return [handler for handler in found.values() if not queues or handler.queue.name in queues]

    @overload
    def handler(self, function: Callable[[_J, Attempt[_R]], _Says], /) -> Callable[[_J, Attempt[_R]], _Says]: ...
    @overload
    def handler(self, function: Callable[[_J], _Says], /) -> Callable[[_J], _Says]: ...
    @overload
    def handler(
        self, *, job: type[_J], middleware: Sequence[Layer[_R]] = (), remember: bool = True
    ) -> _HandlerOf[_J, _R]: ...
    @overload
    def handler(self, *, middleware: Sequence[Layer[_R]] = (), remember: bool = True) -> _Handler[_R]: ...
    def handler(  # type: ignore[misc]  # pyright: ignore[reportInconsistentOverload] - each overload's own narrowing
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        job: type[Any] | None = None,
        middleware: Sequence[Layer[Any]] = (),
        remember: bool = True,
    ) -> Any:
        """Register an `async def` (runs on the loop) or a `def` (runs in a thread); return the function unchanged.

        The annotation of the first parameter is the job class that the handler takes; it is resolved when a worker starts.
        Give `job=` if the annotation can't be resolved. `middleware` goes inside the app's middleware, except for classes that
        can occur only once (`Timeout`, `Retries` …): an instance of such a class replaces the app's.

        A job whose connection or lease is lost is delivered again. The process that ran it, or still runs it, settles the
        redelivery by that run; with `remember=False` the job runs again.
        """
        if function is not None and (inspect.isclass(function) or not callable(function)):
            msg = f"app {self._name!r}: @app.handler decorates a function, not {function!r:.80}; give the job class with job="
            raise ConfigurationError(msg)

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            where = f"handler {function.__module__}.{getattr(function, '__qualname__', function)}"
            layers = check_layers(middleware, where)
            self._registrations.append(Registration(function, job, layers, remember))
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
        """Publish a job at each slot of a cron expression in the IANA time zone `tz`; ValueError if either is wrong.

        The expression has five fields (minute, hour, day of month, month, day of week), or six with seconds first. With a
        job, call `cron` as a statement, with a `name`. Without a job, `cron` decorates a plain `def`. The function returns the
        job to publish, an `Outgoing`, or None to publish nothing; it may take its slot, an aware datetime, as parameter.
        """
        from .cron.schedule import make_schedule  # imports time zones, which only schedules need

        def register(emit: Callable[..., Any]) -> Callable[..., Any]:
            schedule = make_schedule(expression, emit, name=name, tz=tz, enabled=enabled)
            if schedule.name in self._schedules:
                msg = f"app {self._name!r} has two schedules named {schedule.name!r}; give one of them another name="
                raise ValueError(msg)
            self._schedules[schedule.name] = schedule
            return emit

        if job is None:
            # report a wrong expression or time zone at the line of the decorator
            make_schedule(expression, lambda: None, name=name or "-", tz=tz, enabled=enabled)
            return register
        if not isinstance(job, (Job, Outgoing)):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"app {self._name!r}: cron() takes a Job or an Outgoing instance, not {job!r:.80}"
            raise ConfigurationError(msg)
        if not name:
            msg = f"app {self._name!r}: cron() with a job needs name=, since there is no function to take the name from"
            raise ConfigurationError(msg)
        register(lambda: job)
        return None

    @asynccontextmanager
    async def _publisher(self) -> AsyncGenerator[Publisher, None]:
        runtime = self.runtime()
        broker = self.open_broker(runtime)
        sender = self.sender(broker, runtime)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(broker.close)
            stack.push_async_callback(sender.close)
            publisher = Publisher(sender)
            stack.callback(publisher.close)
            yield publisher

    def publisher(self) -> AbstractAsyncContextManager[Publisher, None]:
        """Return a publisher to enter in a service's lifespan; entering doesn't wait for the broker."""
        return PublisherBlock(self._publisher())

    def blocking_publisher(self) -> BlockingPublisher:
        """Return a publisher for code without asyncio, such as Django, Flask or a script. Nothing starts before the first use.

        Keep the publisher in a module's variable.
        """
        from .publishing.blocking import BlockingPublisher

        publisher = BlockingPublisher(self.publisher)
        self._blocking.add(publisher)
        return publisher

    @asynccontextmanager
    async def _relay(self) -> AsyncGenerator[None, None]:
        from .publishing.relay import Relay  # which only a program with an outbox needs

        if self.is_captured:  # a test publishes at once
            yield
            return
        async with Relay.of(self).running():
            yield

    def relay(self) -> AbstractAsyncContextManager[None]:
        """Relay the outbox inside this program, without signal handlers, until the block is left: publish its jobs to the broker.

        Any number of relays may run. Entering doesn't wait for a database or a broker that is down. What waiting can't mend, such as
        a wrong login, ends the relay: the log says so, and leaving the block raises the ConfigurationError.
        """
        advice = "write `async with app.relay():` around what the program does"
        return AsyncBlock(self._relay(), "app.relay()", advice)

    def worker(
        self,
        *,
        queues: list[str] | tuple[str, ...] = (),
        concurrency: int | Mapping[str, int] | None = None,
        grace_s: float = 30.0,
    ) -> AbstractAsyncContextManager[Worker, None]:
        """Run a worker inside this program, without signal handlers, until the block is left; the worker then drains.

        Entering doesn't wait for a broker that is down. A wrong URL, login or queue raises ConfigurationError. The worker says
        by `state()` how it is.

        Args:
            queues: The names of the queues to take jobs from; none means every queue of the app.
            concurrency: As `App(concurrency=…)`, over which it takes precedence. LEVERET_CONCURRENCY takes precedence over both.
            grace_s: Seconds that running jobs get to finish when the block is left. The rest is cut off, and the broker delivers
                those jobs again.
        """
        where = f"app {self._name!r}: worker()"
        if isinstance(queues, (str, Mapping)):  # pyright: ignore[reportUnnecessaryIsInstance]
            advice = "" if isinstance(queues, str) else "; limits go into concurrency={'emails': 50}"
            msg = f"app {self._name!r}: queues must be a list of names, not {queues!r:.80}{advice}"
            raise ConfigurationError(msg)
        if type(grace_s) not in {int, float} or not 0 <= grace_s < float("inf"):
            msg = f"{where}: grace_s must be a finite number of seconds, at least 0, not {grace_s!r:.80}"
            raise ConfigurationError(msg)
        from .consuming.worker import embedded

        return embedded(self, queues, self.concurrency(in_code(concurrency, where)), grace_s)

    @property
    def is_captured(self) -> bool:
        """Whether a test is running this app."""
        return self._capture is not None

    @contextmanager
    def captured(self, capture: Capture) -> Generator[None, None, None]:
        """Use another broker for everything that this app publishes and consumes in the block; for `leveret.testing`."""
        if self._capture is not None:
            msg = f"app {self._name!r} is already running in a test; leave one running() block before entering the next"
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
