"""A worker: what consumes an app's queues, until its block is left. The command, an embedded worker and tests run this one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Protocol, cast

import msgspec

from ..broker import Broker, Consumption
from ..errors import ConfigurationError
from ..layer import AnyLayer
from ..publishing.publisher import Publisher
from ..publishing.sender import Sender
from ..runtime import Runtime
from ..settings import redact
from .consumer import Consumer
from .handler import Handler, check_limits
from .settlement import Ended
from .slots import Limits

logger = logging.getLogger("leveret.worker")

GRACE_S = 30.0
"""How long a stopping worker waits for its handlers, unless told otherwise."""


class Service(Protocol):
    """What a worker needs of an app."""

    @property
    def name(self) -> str:
        """For errors."""
        ...

    @property
    def layers(self) -> tuple[AnyLayer, ...]:
        """Those round everything, first is outermost."""
        ...

    @property
    def lifespan(self) -> Callable[[], AbstractAsyncContextManager[Any]] | None:
        """What is entered once, and gives the attempts their resources."""
        ...

    @property
    def around_sync(self) -> Callable[[], AbstractContextManager[object]] | None:
        """What is entered round each `def` handler, in its thread."""
        ...

    def import_modules(self) -> None:
        """Import what registers handlers."""
        ...

    def handlers(self, queues: Sequence[str] = ()) -> list[Handler]:
        """Return the handlers of `queues`; none given: of all."""
        ...

    def runtime(self) -> Runtime:
        """Return the clock, chance and settings of a process of it."""
        ...

    def broker_url(self) -> str | None:
        """Return where the broker is, for errors."""
        ...

    def open_broker(self, runtime: Runtime) -> Broker:
        """Make the broker."""
        ...

    def sender(self, broker: Broker, runtime: Runtime) -> Sender:
        """Make what sends the jobs that handlers publish."""
        ...


class Working(msgspec.Struct):
    """A worker that runs: what it consumes with, and how it ended."""

    consumer: Consumer
    consumption: Consumption
    drained: bool = True
    """After the end: whether everything finished within the grace."""


@asynccontextmanager
async def working(
    app: Service,
    *,
    queues: Sequence[str] = (),
    limits: Limits = Limits(),  # noqa: B008 - frozen
    runtime: Runtime | None = None,
    grace_s: float = GRACE_S,
    hurry: asyncio.Event | None = None,
    lifespan: Callable[[], AbstractAsyncContextManager[Any]] | None = None,
    observe: Callable[[Ended], None] | None = None,
) -> AsyncGenerator[Working, None]:
    """Run a worker of `app` until the block is left, which drains it: the one core of the command, of an embedded worker and of tests.

    Setting `hurry` ends the grace.
    """
    app.import_modules()
    handlers = app.handlers(queues)
    if not handlers:
        msg = f"app {app.name!r} has no handler; list the modules that have them in App(modules=[…])"
        raise ConfigurationError(msg)
    runtime = runtime or app.runtime()
    broker = app.open_broker(runtime)
    if runtime.processes > 1 and not broker.features().shared:
        msg = f"the broker {redact(app.broker_url() or '')} lives inside one process: it can't serve --processes {runtime.processes}"
        raise ConfigurationError(msg)
    for handler in handlers:
        check_limits(handler, broker.features(handler.queue))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(broker.close)
        enter = lifespan or app.lifespan
        resources = await stack.enter_async_context(enter()) if enter is not None else None
        layers = app.layers
        publisher = Publisher(app.sender(broker, runtime))
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
        )
        stack.callback(publisher.close)
        # though its first queue may have delivered
        stack.push_async_callback(consumer.cut_off, "it didn't get to its start")
        consumption = await broker.consume(consumer.subscriptions, consumer)
        stack.push_async_callback(consumption.close)
        work = Working(consumer, consumption)
        try:
            yield work
        finally:
            work.drained = await consumer.drain(consumption, grace_s, hurry)


@asynccontextmanager
async def _embedded(app: Service, queues: Sequence[str]) -> AsyncGenerator[None, None]:
    async with working(app, queues=queues) as work:
        failed = asyncio.ensure_future(work.consumption.failed())
        failed.add_done_callback(_say_failed)
        try:
            yield
        finally:
            failed.cancel()


def _say_failed(failed: asyncio.Future[None]) -> None:
    if not failed.cancelled() and (error := failed.exception()) is not None:
        logger.critical("the embedded worker takes nothing more: %s", redact(str(error)))


def embedded(app: Service, queues: Sequence[str]) -> AbstractAsyncContextManager[None, None]:
    """Return what `App.worker` gives."""
    return cast("AbstractAsyncContextManager[None, None]", _embedded(app, queues))
