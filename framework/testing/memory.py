"""The lab in this process: the memory broker, and a clock that the test moves."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from datetime import datetime, timedelta, timezone
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar, cast

from ..app import App
from ..broker import Broker
from ..clock import ManualClock, moment_ms
from ..codec import Decoder
from ..consuming.consumer import Consumer
from ..cron.schedule import slots
from ..envelope import Envelope
from ..errors import ConfigurationError
from ..runtime import Runtime
from ..schemes import broker_module
from ..store import Store as JobStore
from .callers import CallersThread
from .lab import AppLab, check_aware, check_outside, opened, utc
from .records import Delayed

STUCK_S = 30.0
"""Real seconds after which `run_due` and `drain` raise for a handler that doesn't end."""
MOST_RUNS = 100_000
"""Runs after which `run_due` and `drain` raise: a job retries or snoozes for ever."""
MOST_SLOTS = 20_000
"""Cron slots that one `advance` passes: two weeks of a schedule that fires every minute."""


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

    def delayed(self, clock: ManualClock) -> Sequence[Envelope]:
        """Return the jobs that aren't due yet, the next one first."""
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

    def private_stores(self, runtime: Runtime) -> Callable[[], JobStore]:
        """Return a function that opens job stores on records which only these stores share."""
        ...


def memory() -> Memory[Any]:
    """Return the memory broker's module."""
    return cast("Memory[Any]", broker_module("memory://"))


class MemoryLab(AppLab):
    """A lab whose time the test moves."""

    def __init__(self, app: App[Any], clock: ManualClock, store: Store, *, in_a_thread: bool, cron: bool) -> None:
        super().__init__()
        self._app = app
        self._cron = cron
        self._clock = clock
        self._store = store
        self._slots_publisher = app.blocking_publisher()
        """Publishes the jobs of cron slots within `advance`, which can't await."""
        self._in_a_thread = in_a_thread
        """Whether cron functions run in a thread, where no event loop runs."""
        self._begins = clock.now()

    def __repr__(self) -> str:
        return f"<lab of app {self._app.name!r} at {self.now:%Y-%m-%d %H:%M:%S} UTC, {self._summary()}>"

    @property
    def _consumer(self) -> Consumer | None:
        return None if self.work is None else self.work.consumer

    @property
    def now(self) -> datetime:
        """As `Lab.now`."""
        return datetime.fromtimestamp(self._clock.now(), timezone.utc)

    @property
    def delayed(self) -> Sequence[Delayed]:
        """As `Lab.delayed`."""
        classes = {(one.envelope.queue, one.envelope.job): type(one.job) for one in self._published}
        return tuple(
            Delayed(
                Decoder(classes[envelope.queue, envelope.job]).decode(envelope.body, envelope.content_type),
                envelope,
                datetime.fromtimestamp((envelope.due_ms or 0) / 1000, timezone.utc),
            )
            for envelope in self._store.delayed(self._clock)
        )

    def advance(self, by: float | timedelta, /) -> None:
        """As `Lab.advance`."""
        seconds: Any = by.total_seconds() if isinstance(by, timedelta) else by
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < float("inf"):
            msg = f"the lab's clock can't be advanced by {seconds!r:.80} s; give a timedelta, or a finite number of seconds of at least 0"
            raise ValueError(msg)
        self._pass(self._clock.now() + seconds)

    def advance_to(self, moment: datetime, /) -> None:
        """As `Lab.advance_to`."""
        if check_aware("advance_to: the moment", moment) < self.now:
            msg = f"advance_to: {moment} is in the past, the lab's clock is at {self.now}"
            raise ValueError(msg)
        self._pass(moment.timestamp())

    def _pass(self, until_s: float) -> None:
        """Move the clock to `until_s`, Unix seconds, and publish the jobs of the cron slots on the way."""
        until_s = moment_ms(until_s) / 1000  # as due times are: what is due in a minute is due after a minute
        schedules = [schedule for schedule in self._app.schedules if schedule.enabled and self._cron]
        until = utc(until_s, "advance: the moment")
        passed = list(islice(slots(schedules, self.now, until), MOST_SLOTS + 1))
        if len(passed) > MOST_SLOTS:
            msg = f"advance: more than {MOST_SLOTS} cron slots lie before {until}; advance in shorter steps, or enter running(app, cron=False)"
            raise ValueError(msg)
        with ThreadPoolExecutor(1) if self._in_a_thread else nullcontext() as threads:
            for slot, schedule in passed:
                self._move(slot.timestamp())
                emit = partial(schedule.outgoing, self._app.name, slot)
                outgoing = emit() if threads is None else threads.submit(emit).result()
                if outgoing is not None:
                    self._slots_publisher.publish(outgoing.job, **outgoing.options)
        self._move(until_s)

    def _move(self, until_s: float) -> None:
        self._clock.advance_to(round(until_s - self._begins, 5))
        self._store.state(self._clock)  # jobs that are due now go before the job of a later slot

    async def run_due(self) -> None:
        """As `Lab.run_due`."""
        await self._settle(len(self._runs))

    async def drain(self) -> None:
        """As `Lab.drain`."""
        begun = len(self._runs)
        while True:
            await self._settle(begun)
            state = self._store.state(self._clock)
            waits = [wait for wait in (state.next_due_in_s, self._clock.next_due_in_s()) if wait is not None]
            consumer = self._consumer
            if not waits or not (state.delayed or (consumer and (consumer.busy or consumer.held))):
                return
            self._clock.advance(min(waits))

    async def _settle(self, begun: int) -> None:
        """Let the loop run until only the clock could start something; `begun` is the number of runs before."""
        check_outside()
        quiet, version, moved = 0, -1, time.monotonic()
        while quiet < 5:
            await asyncio.sleep(0)
            if len(self._runs) - begun > MOST_RUNS:
                msg = f"{MOST_RUNS} runs without an end; look for a job that snoozes or retries for ever"
                raise RuntimeError(msg)
            state, consumer = self._store.state(self._clock), self._consumer
            if state.version != version:
                quiet, version, moved = 0, state.version, time.monotonic()
            elif consumer is None or consumer.busy <= self._clock.sleepers:
                quiet += 1
            elif time.monotonic() - moved > STUCK_S:
                msg = f"{consumer.running} handlers still run after {STUCK_S:g} s; look for a wait that never ends"
                raise RuntimeError(msg)
            else:
                # a handler waits for something outside of the clock, such as a thread or a socket
                changed = asyncio.ensure_future(consumer.changed())
                await asyncio.wait([changed], timeout=0.01)
                changed.cancel()


@asynccontextmanager
async def memory_lab(
    app: App[Any], resources: Any, now: datetime | None, *, cron: bool, callers: CallersThread | None = None
) -> AsyncGenerator[MemoryLab, None]:
    """Run `app` in a lab; with `callers`, its `def` handlers and cron functions run in the thread that drives the loop."""
    begins_s = time.time() if now is None else check_aware("running: now", now).timestamp()
    begins_s = moment_ms(begins_s) / 1000
    utc(begins_s, "running: now", ConfigurationError)
    broker = memory()
    clock, store = ManualClock(begins_s), broker.MemoryStore()
    runtime = Runtime(app=app.name, settings=app.settings, clock=clock, rng=random.Random(0))
    lab = MemoryLab(app, clock, store, in_a_thread=callers is None, cron=cron)
    async with opened(
        lab,
        app,
        resources,
        open_broker=lambda: broker.MemoryBroker(store, runtime),
        open_store=broker.private_stores(runtime),
        runtime=runtime,
        callers=callers,
    ):
        yield lab
