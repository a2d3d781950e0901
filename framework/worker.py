"""A worker: one process that consumes. `leveret work` hands over to `python -m leveret.worker`.

Stopping, in order: stop taking → give back what hasn't started → finish within the grace → flush what was settled →
close. Exit 0: drained. 1: the grace was over, what was cut off is delivered again. 2: something is configured wrong.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, NoReturn, cast

import msgspec

from .app import App
from .broker import Broker, Consumption
from .consumer import Consumer, Ended, Limits
from .errors import ConfigurationError, LeveretError
from .loading import load_app
from .logs import set_up_logs
from .publishing.publisher import Publisher
from .runtime import Runtime
from .settings import redact

logger = logging.getLogger("leveret.worker")

GRACE_S = 30.0
"""How long a stopping worker waits for its handlers, unless told otherwise."""
HURRY_S = 5.0
"""How long after a second signal the process is ended, whatever it is at."""
_REPORT_BYTES = 512
"""Most of one report: a write of up to so many bytes isn't torn by another process's (POSIX's PIPE_BUF)."""
_SAID = {
    "retry": "retried",
    "snooze": "snoozed",
    "bury": "buried",
    "undecodable": "buried as undecodable",
    "unknown": "sent back as unknown",
    "notstarted": "given back",
    "cutoff": "cut off",
    "lost": "that the broker delivers again, since their channel or lease was gone",
}
"""How the last line of a worker names an ending; the others by their own name."""


class WorkOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `leveret work` was told; travels to the worker processes as JSON."""

    app: str
    """module:attribute"""
    queues: dict[str, int | None] = {}
    """Queue and its own concurrency; none: every queue that the app has a handler for."""
    concurrency: int | None = None
    """Handlers at once in a process; None: 100 async and 8 threads, else so many of both."""
    processes: int = 1
    grace_s: float = GRACE_S
    log_level: str = "info"
    reload: bool = False
    lifeline: int | None = None
    """A file descriptor that reads end-of-file once the supervisor is gone."""
    report: int | None = None
    """A file descriptor for the line that says what is configured wrong; the supervisor prints it, once for all workers."""
    index: int = 0
    """Which of the processes this is."""

    @property
    def limits(self) -> Limits:
        """The concurrency of one process."""
        own = {name: limit for name, limit in self.queues.items() if limit is not None}
        if self.concurrency is None:
            most = max([100, *own.values()])
            return Limits(concurrency=most, queues=own)
        return Limits(concurrency=self.concurrency, threads=self.concurrency, queues=own)


class Working(msgspec.Struct):
    """A worker that runs: what it consumes with, and how it is to end."""

    consumer: Consumer
    consumption: Consumption
    hurry: asyncio.Event
    """Set it to end the grace now."""
    drained: bool = True
    """After the end: whether everything finished within the grace."""


@asynccontextmanager
async def working(
    app: App[Any],
    *,
    queues: Sequence[str] = (),
    limits: Limits = Limits(),  # noqa: B008 - frozen
    runtime: Runtime | None = None,
    grace_s: float = GRACE_S,
    lifespan: Callable[[], AbstractAsyncContextManager[Any]] | None = None,
    observe: Callable[[Ended], None] | None = None,
) -> AsyncGenerator[Working, None]:
    """Run a worker of `app` until the block is left, which drains it: the one core of the command, of an embedded worker and of tests."""
    app.import_modules()
    handlers = app.handlers(queues)
    if not handlers:
        msg = f"app {app.name!r} has no handler; list the modules that have them in App(modules=[…])"
        raise ConfigurationError(msg)
    runtime = runtime or app.runtime()
    broker: Broker = app.open_broker(runtime)
    if runtime.processes > 1 and not broker.features.shared:
        msg = f"the broker {redact(app.broker_url() or '')} lives inside one process: it can't serve --processes {runtime.processes}"
        raise ConfigurationError(msg)
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
        stack.push_async_callback(
            consumer.cut_off, "it didn't get to its start"
        )  # though its first queue may have delivered
        consumption = await broker.consume(consumer.subscriptions, consumer)
        stack.push_async_callback(consumption.close)
        work = Working(consumer, consumption, asyncio.Event())
        try:
            yield work
        finally:
            work.drained = await consumer.drain(consumption, grace_s, work.hurry)


@asynccontextmanager
async def _embedded(app: App[Any], queues: Sequence[str]) -> AsyncGenerator[None, None]:
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


def embedded(app: App[Any], queues: Sequence[str]) -> AbstractAsyncContextManager[None, None]:
    """Return what `App.worker` gives."""
    return cast("AbstractAsyncContextManager[None, None]", _embedded(app, queues))


class _Stop:
    """What ends a worker process: a signal, a second one, its supervisor's end."""

    def __init__(self, lifeline: int | None) -> None:
        self.told = asyncio.Event()
        self.work: Working | None = None
        """What a second signal hurries."""
        self.starting: asyncio.Task[Any] | None = None
        """Whose lifespan is being entered: until it is there is nothing to drain, so a stop cancels it."""
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal)
        if lifeline is not None:
            self._loop.add_reader(lifeline, self._on_orphaned, lifeline)

    @asynccontextmanager
    async def lifespan(self, app: App[Any]) -> AsyncGenerator[Any, None]:
        """Enter the app's own, unless a stop comes first."""
        if app.lifespan is None:
            _freeze()
            yield None
            return
        self.starting = asyncio.current_task()
        async with app.lifespan() as resources:
            self.starting = None
            _freeze()
            yield resources

    def _tell(self) -> None:
        self.told.set()
        if self.starting is not None:
            self.starting.cancel()

    def _on_signal(self) -> None:
        if self.told.is_set():
            if self.work is not None:
                self.work.hurry.set()
            # a lifespan's end, or a connection's, that doesn't come isn't waited for
            self._loop.call_later(HURRY_S, _exit_now)
        self._tell()

    def _on_orphaned(self, lifeline: int) -> None:
        self._loop.remove_reader(lifeline)
        self._tell()


async def run(options: WorkOptions) -> int:
    """Run a worker process until a signal, its supervisor's end or a fault that waiting can't mend; return its exit code."""
    app = load_app(options.app)
    stop = _Stop(options.lifeline)
    try:
        async with working(
            app,
            queues=list(options.queues),
            limits=options.limits,
            runtime=app.runtime(options.processes),
            grace_s=options.grace_s,
            lifespan=partial(stop.lifespan, app),
        ) as work:
            stop.work = work
            names = ", ".join(f"{s.queue.name} (prefetch {s.prefetch})" for s in work.consumer.subscriptions)
            takes = "takes" if work.consumption.ready else "will take, once the broker is there,"
            logger.info(
                "worker %s of app %s %s from %s on %s",
                os.getpid(),
                app.name,
                takes,
                names,
                redact(app.broker_url() or ""),
            )
            await _first(stop.told.wait(), work.consumption.failed())
            logger.info(
                "stopping: %d running, %d held; up to %g s, a second signal cuts off",
                work.consumer.running,
                work.consumer.held,
                options.grace_s,
            )
    except asyncio.CancelledError:
        if stop.starting is None or not stop.told.is_set():
            raise
        logger.info("stopped while its lifespan was starting")
        return 0
    counts = (
        ", ".join(f"{count} {_SAID.get(name, name)}" for name, count in sorted(work.consumer.counts.items()) if count)
        or "nothing"
    )
    logger.info("stopped%s: %s", "" if work.drained else ", cut off", counts)
    if not work.drained:
        _exit(1)  # here: the loop's end would wait for threads that were cut off, whose jobs run elsewhere by now
    return 0


def _freeze() -> None:
    """Keep the collector from looking through what was imported and opened, again and again: it stays."""
    gc.collect()
    gc.freeze()


def _exit_now() -> None:
    logger.error("it still hasn't ended, so it is cut off; the broker delivers again what wasn't settled")
    _exit(1)


def _exit(code: int) -> NoReturn:
    """End this process now: a thread that was cut off would keep the interpreter from ending."""
    logging.shutdown()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


async def _first(*waits: Any) -> None:
    """Wait for the first of `waits`; raise what it raised."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


def run_loop(main: Any) -> Any:
    """Run a coroutine on uvloop where it is installed (twice the throughput), else on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def one_line(error: LeveretError, report: int | None = None) -> int:
    """Print an error as one line (its traceback at debug level), a configuration's to `report` if given; return the exit code."""
    line = f"leveret: {redact(' '.join(str(error).split()))}"
    wrong = isinstance(error, ConfigurationError)
    if wrong and report is not None:
        os.write(report, line.encode(errors="replace")[: _REPORT_BYTES - 1] + b"\n")
    else:
        print(line, file=sys.stderr)  # noqa: T201 - a terminal's line
    logging.getLogger("leveret").debug("where it comes from", exc_info=error)
    return 2 if wrong else 1


def main(argv: Sequence[str]) -> int:
    """Run `python -m leveret.worker OPTIONS`, OPTIONS being `WorkOptions` as JSON; return the exit code."""
    try:
        options = msgspec.json.decode(argv[0], type=WorkOptions)
    except (IndexError, msgspec.MsgspecError):
        return one_line(ConfigurationError("python -m leveret.worker is started by `leveret work`; use that"))
    try:
        set_up_logs(options.log_level)
        if options.lifeline is None and (options.processes > 1 or options.reload):
            from .supervisor import supervise

            return cast("int", run_loop(supervise(options)))
        code = cast("int", run_loop(run(options)))
    except LeveretError as error:
        code = one_line(error, options.report)
    except KeyboardInterrupt:  # before the loop took the signal over: nothing was started
        code = 130
    except Exception:  # a lifespan's, for one: a user's code, whose traceback they need  # noqa: BLE001
        print(redact(traceback.format_exc()), end="", file=sys.stderr)  # noqa: T201 - as Python itself does
        code = 1
    if code:
        _exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
