"""A worker: consumes an app's queues until its block is left. The command, embedded workers and tests all use it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

import msgspec

from ..broker import Broker, Consumption, is_sharing
from ..errors import ConfigurationError
from ..layer import AnyLayer
from ..publishing.publisher import Publisher, Waits
from ..publishing.sender import Sender
from ..runtime import Runtime
from ..settings import redact_url
from .consumer import Consumer
from .handler import Handler, check_limits
from .limits import Concurrency, limits_of
from .returns import check_results
from .settlement import Ended
from .state import Watch, Worker

if TYPE_CHECKING:
    from .recording import Recording

GRACE_S = 30.0
"""The default of the grace: the seconds that a stopping worker waits for its handlers."""


class Service(Protocol):
    """The part of an app that a worker needs."""

    @property
    def name(self) -> str:
        """The app's name, for errors."""
        ...

    @property
    def layers(self) -> tuple[AnyLayer, ...]:
        """The app's middleware; the first is outermost."""
        ...

    @property
    def lifespan(self) -> Callable[[], AbstractAsyncContextManager[Any]] | None:
        """The context manager that is entered once per process; it yields the resources of the attempts."""
        ...

    @property
    def around_sync(self) -> Callable[[], AbstractContextManager[object]] | None:
        """The context manager that is entered around each `def` handler, in its thread."""
        ...

    def import_modules(self) -> None:
        """Import the modules that register handlers."""
        ...

    def handlers(self, queues: Sequence[str] = ()) -> list[Handler]:
        """Return the handlers of `queues`; of all queues if `queues` is empty."""
        ...

    def runtime(self) -> Runtime:
        """Return the clock, the random generator and the settings of a process of the app."""
        ...

    def concurrency(self) -> Sequence[Concurrency]:
        """Return the limits that code and the environment set; a later one takes precedence."""
        ...

    def broker_url(self) -> str | None:
        """Return the broker's URL, for errors."""
        ...

    def open_broker(self, runtime: Runtime) -> Broker:
        """Make the broker."""
        ...

    def sender(self, broker: Broker, runtime: Runtime) -> Sender:
        """Make the sender of the jobs that handlers publish."""
        ...


class Working(msgspec.Struct):
    """A running worker: its state, its consumer and consumption, and how it ended."""

    worker: Worker
    consumer: Consumer
    consumption: Consumption
    at_once: Mapping[str, int]
    """How many jobs run at once in this process, by the name of their queue."""
    drained: bool = True
    """Whether every job finished within the grace; set at the end."""


@asynccontextmanager
async def working(
    app: Service,
    *,
    queues: Sequence[str] = (),
    concurrency: Sequence[Concurrency] | None = None,
    runtime: Runtime | None = None,
    grace_s: float = GRACE_S,
    hurry: asyncio.Event | None = None,
    lifespan: Callable[[], AbstractAsyncContextManager[Any]] | None = None,
    observe: Callable[[Ended], None] | None = None,
    threads: Executor | None = None,
    wait: Waits | None = None,
) -> AsyncGenerator[Working, None]:
    """Run a worker of `app` until the block is left, and then drain it. Setting `hurry` ends the grace early.

    `threads` runs the `def` handlers, and `wait` is how they wait for a publish (default for both: threads beside the loop).
    Of `concurrency` (default: the app's), a later one takes precedence.
    """
    app.import_modules()
    handlers = app.handlers(queues)
    if not handlers:
        msg = f"app {app.name!r} has no handler; list the modules that have handlers in App(modules=[…])"
        raise ConfigurationError(msg)
    limits = limits_of(
        app.concurrency() if concurrency is None else concurrency,
        served=_queues_of(handlers),
        known=_queues_of(app.handlers() if queues else handlers),
        app=app.name,
    )
    at_once: dict[str, int] = {}
    for queue in _queues_of(handlers):
        in_threads = not any(handler.is_async for handler in handlers if handler.queue.name == queue)
        at_once[queue] = limits.of(queue, in_threads=in_threads)
        limits.warn_of_capped(queue, in_threads=in_threads)
    runtime = runtime or app.runtime()
    broker = app.open_broker(runtime)
    if runtime.processes > 1 and not broker.features().shared:
        msg = f"the broker {redact_url(app.broker_url() or '')} lives inside one process and can't serve --processes {runtime.processes}"
        raise ConfigurationError(msg)
    for handler in handlers:
        check_limits(handler, broker.features(handler.queue))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(broker.close)
        sender = app.sender(broker, runtime)
        stack.push_async_callback(sender.close)
        recording = await _recording(sender, broker, handlers, runtime)
        if recording is not None:
            stack.callback(recording.stop)
        enter = lifespan or app.lifespan
        resources = await stack.enter_async_context(enter()) if enter is not None else None
        layers = app.layers
        publisher = Publisher(sender, wait)
        consumer = Consumer(
            broker,
            handlers,
            publisher=publisher,
            publish_layers=layers,
            resources=resources,
            runtime=runtime,
            limits=limits,
            around_sync=app.around_sync,
            observe=observe,
            threads=threads,
            recording=recording,
        )
        stack.callback(publisher.close)
        # If a later queue fails to open, the first one may already have delivered.
        stack.push_async_callback(consumer.cut_off, "the worker couldn't start")
        watch = Watch(consumer, runtime.clock)
        consumption = await broker.consume(consumer.subscriptions, consumer)
        stack.push_async_callback(consumption.close)
        stack.callback(watch.follow(consumption).cancel)
        work = Working(Worker(watch), consumer, consumption, at_once)
        try:
            yield work
        finally:
            hint = ", a second signal cuts them off" if hurry is not None else ""
            watch.stop(f"running jobs have {grace_s:g} s to finish{hint}")
            work.drained = await consumer.drain(consumption, grace_s, hurry)


async def _recording(sender: Sender, broker: Broker, handlers: Sequence[Handler], runtime: Runtime) -> Recording | None:
    """Return what enters the jobs of `handlers` into the job store of `sender`; None if none of their classes has `keep`."""
    results = sender.results if any(handler.spec.keep is not None for handler in handlers) else None
    check_results(handlers, stored=results is not None)
    if results is None:
        return None
    from .recording import Recording

    shared = is_sharing(broker) and broker.shares(results.store, results.recorder.note)
    recording = Recording(results.recorder, handlers, runtime, shared=shared)
    await results.recorder.check()
    return recording


def _queues_of(handlers: Sequence[Handler]) -> Sequence[str]:
    return list(dict.fromkeys(handler.queue.name for handler in handlers))


@asynccontextmanager
async def _embedded(
    app: Service, queues: Sequence[str], concurrency: Sequence[Concurrency], grace_s: float
) -> AsyncGenerator[Worker, None]:
    async with working(app, queues=queues, concurrency=concurrency, grace_s=grace_s) as work:
        yield work.worker


def embedded(
    app: Service, queues: Sequence[str], concurrency: Sequence[Concurrency], grace_s: float
) -> AbstractAsyncContextManager[Worker, None]:
    """Return the context manager of `App.worker`."""
    return cast("AbstractAsyncContextManager[Worker, None]", _embedded(app, queues, concurrency, grace_s))
