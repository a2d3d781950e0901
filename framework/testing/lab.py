"""Run an app in a test: memory broker, manual clock, no sleeping.

    async with running(app, resources=fakes) as lab:
        receipt = await lab.publish(SendInvoice(order_id=7, email="a@example.org"))
        await lab.drain()
        assert [run.number for run in lab.attempts(receipt.job_id)] == [1, 2, 3]

Jobs are really encoded, queued, delivered, retried and buried; only time and the broker are simulated.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol, Unpack, cast, final, overload

import msgspec
from typing_extensions import TypeVar

from ..app import App, Capture
from ..attempt import Attempt, make_attempt
from ..broker import Broker
from ..clock import ManualClock
from ..consuming.consumer import Consumer
from ..consuming.settlement import Ended
from ..consuming.worker import working
from ..envelope import Envelope, Receipt
from ..errors import ConfigurationError
from ..job import Job, Queue
from ..options import PublishOptions
from ..outcome import OUTCOMES, Bury, Done, Outcome
from ..publishing.publisher import Publisher
from ..publishing.sender import Sender
from ..runtime import Runtime
from ..schemes import broker_module

_R = TypeVar("_R")

STUCK_S = 30.0
"""Real seconds after which `drain` raises for a handler that doesn't end."""
MOST_RUNS = 100_000
"""Runs after which `drain` raises: a job snoozes for ever."""


class State(Protocol):
    """The part of a store's state that the lab reads."""

    @property
    def delayed(self) -> int:
        """The number of jobs that aren't due yet."""
        ...

    @property
    def next_due_in_s(self) -> float | None:
        """Seconds until the next delayed job is due; None without delayed jobs."""
        ...

    @property
    def version(self) -> int:
        """Increases with every change."""
        ...


class Store(Protocol):
    """The part of a store that the lab uses."""

    def state(self, clock: ManualClock) -> State:
        """Return the state of the store."""
        ...


_StoreT = TypeVar("_StoreT", bound=Store)


class Memory(Protocol[_StoreT]):
    """The part of `leveret.brokers.memory` that the lab uses; looked up by scheme, because this folder imports no broker.

    `tests/unit/testing/test_lab.py` lets the type checkers compare the two.
    """

    def MemoryStore(self) -> _StoreT:  # noqa: N802 - a class there
        """Return a new store."""
        ...

    def MemoryBroker(self, store: _StoreT, runtime: Runtime) -> Broker:  # noqa: N802
        """Return a broker on `store`."""
        ...


def _memory() -> Memory[Any]:
    return cast("Memory[Any]", broker_module("memory://"))


class Published(msgspec.Struct, frozen=True):
    """A job that was published while the lab ran."""

    job: Job
    envelope: Envelope


class Run(msgspec.Struct, frozen=True):
    """An attempt that ended; `error` is the exception of the handler, or None."""

    job: Job
    envelope: Envelope
    number: int
    outcome: Outcome
    error: BaseException | None


@final
class Lab:
    """The lab of `running`: publishes jobs, moves the time, shows the runs."""

    def __init__(self, clock: ManualClock, store: Store) -> None:
        self._clock = clock
        self._store = store
        self._published: list[Published] = []
        self._runs: list[Run] = []
        self._publisher: Publisher | None = None
        self._consumer: Consumer | None = None

    @property
    def published(self) -> Sequence[Published]:
        """The jobs published so far, in order, without retries and snoozes."""
        return tuple(self._published)

    @property
    def done(self) -> Sequence[Run]:
        """The runs that were done, in order."""
        return tuple(run for run in self._runs if isinstance(run.outcome, Done))

    @property
    def buried(self) -> Sequence[Run]:
        """The runs after which the job was buried, in order."""
        return tuple(run for run in self._runs if isinstance(run.outcome, Bury))

    def attempts(self, job_id: str, /) -> Sequence[Run]:
        """Return the runs of a job, in order; empty for an unknown id."""
        return tuple(run for run in self._runs if run.envelope.job_id == job_id)

    def advance(self, seconds: float, /) -> None:
        """Move the clock. Jobs that fall due run at the next `drain`; a `Timeout` that is over ends its run."""
        self._clock.advance(seconds)

    async def drain(self) -> None:
        """Run until no job is left, including retries and snoozes: the clock moves to the next due time again and again.

        The clock never moves to the end of a `Timeout`: a handler that waits for something real isn't timed out.

        Raises RuntimeError for a handler that doesn't end within 30 real seconds, and for a job that snoozes or retries for
        ever. Jobs of queues without a handler in this app stay in their queues.
        """
        consumer = cast("Consumer", self._consumer)
        begun = len(self._runs)
        while True:
            await self._settle(consumer)
            if len(self._runs) - begun > MOST_RUNS:
                msg = f"drain: {MOST_RUNS} runs without an end; look for a job that snoozes or retries for ever"
                raise RuntimeError(msg)
            state = self._store.state(self._clock)
            waits = [wait for wait in (state.next_due_in_s, self._clock.next_due_in_s()) if wait is not None]
            if not (state.delayed or consumer.busy or consumer.held) or not waits:
                return
            self._clock.advance(min(waits))

    async def _settle(self, consumer: Consumer) -> None:
        """Let the loop run until only the clock could start something."""
        quiet, version, moved = 0, -1, time.monotonic()
        while quiet < 5:
            await asyncio.sleep(0)
            state = self._store.state(self._clock)
            waits = consumer.busy <= self._clock.sleepers
            if state.version != version:
                quiet, version, moved = 0, state.version, time.monotonic()
            elif waits:
                quiet += 1
            elif time.monotonic() - moved > STUCK_S:
                msg = (
                    f"drain: {consumer.running} handlers still run after {STUCK_S:g} s; look for a wait that never ends"
                )
                raise RuntimeError(msg)
            else:
                # a handler waits for something outside of the clock, such as a thread or a socket
                changed = asyncio.ensure_future(consumer.changed())
                await asyncio.wait([changed], timeout=0.01)
                changed.cancel()

    async def publish(self, job: Job, **options: Unpack[PublishOptions]) -> Receipt:
        """Publish `job` to the memory broker; otherwise as `Publisher.publish`."""
        return await cast("Publisher", self._publisher).publish(job, **options)

    def _on_published(self, job: Job, envelope: Envelope) -> None:
        self._published.append(Published(job, envelope))

    def _on_ended(self, ended: Ended) -> None:
        if ended.job is not None and isinstance(ended.ending, OUTCOMES):
            self._runs.append(Run(ended.job, ended.envelope, ended.envelope.attempt, ended.ending, ended.error))


_UNSET: Any = object()


@asynccontextmanager
async def _running(app: App[Any], resources: Any) -> AsyncGenerator[Lab, None]:
    memory = _memory()
    clock, store = ManualClock(), memory.MemoryStore()
    lab = Lab(clock, store)
    runtime = Runtime(app=app.name, settings=app.settings, clock=clock, rng=random.Random(0))

    @asynccontextmanager
    async def given() -> AsyncGenerator[Any, None]:
        yield resources

    lifespan = None if resources is _UNSET else given
    with app.captured(Capture(lambda: memory.MemoryBroker(store, runtime), runtime, lab._on_published)):  # pyright: ignore[reportPrivateUsage]
        app.import_modules()
        async with app.publisher() as publisher:
            lab._publisher = publisher  # pyright: ignore[reportPrivateUsage]
            async with working(app, runtime=runtime, lifespan=lifespan, observe=lab._on_ended, grace_s=1.0) as work:  # pyright: ignore[reportPrivateUsage]
                lab._consumer = work.consumer  # pyright: ignore[reportPrivateUsage]
                yield lab


def running(app: App[_R], *, resources: _R = _UNSET) -> AbstractAsyncContextManager[Lab, None]:
    """Run `app` in a lab, with `resources` instead of those of its lifespan; without `resources`, the lifespan runs.

    Meanwhile all publishers of `app`, including blocking ones, publish to the lab. Leaving the block cuts off jobs that still
    run, after a grace of 1 s.
    """
    return cast("AbstractAsyncContextManager[Lab, None]", _running(app, resources))


@overload
def attempt(*, number: int = 1) -> Attempt[None]: ...
@overload
def attempt(*, resources: _R, number: int = 1) -> Attempt[_R]: ...
def attempt(*, resources: Any = None, number: int = 1) -> Attempt[Any]:
    """Make an attempt to call a handler with; jobs that the handler publishes go to a separate memory broker."""
    if number < 1:
        msg = f"attempt: number must be at least 1, the first run, not {number}"
        raise ConfigurationError(msg)
    runtime = Runtime(app="test", clock=ManualClock())
    memory = _memory()
    sender = Sender(memory.MemoryBroker(memory.MemoryStore(), runtime), (), runtime)
    envelope = Envelope(job_id="00000000-0000-7000-8000-000000000000", job="test.attempt", queue="test", attempt=number)
    return make_attempt(
        _TestedJob(), envelope, number > 1, runtime.clock.now(), resources, Publisher(sender), runtime.clock
    )


class _TestedJob(Job, name="test.attempt", queue=Queue("test")):
    """The job of an attempt that a test made."""
