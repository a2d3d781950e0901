"""The embedded broker: one SQLite file, nothing to install; publishers and several worker processes of one machine at once.

A confirmed job is on the disk (`synchronous=FULL`): it survives the death of every process, and of the machine. The file must be on a
local disk, since SQLite's locks don't hold on network file systems.

- A level is a line of its own, oldest first; a job that was delayed joins the tail when its time has come, by the wall clock.
- `again`, `bury` and a replay are one transaction with the settlement: neither a loss nor a duplicate is possible between the two.
- `give_back` leaves the job its place, and it doesn't count as redelivered, since it wasn't started. What a consumption still holds
  when it is closed, or when its process dies, does.
- What a dead process held comes back within about a second where this machine's process table shows it, and otherwise 15 to 20
  seconds after its last sign of life (see `lease`).
"""

from __future__ import annotations

import asyncio
import math
import os
import sqlite3
import time
from collections.abc import Sequence
from typing import final
from urllib.parse import unquote, urlsplit

import msgspec

from leveret.broker import Consumption, Delivery, Features, Sink, Subscription
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable, ConfigurationError, PublishTimeout
from leveret.job import Queue
from leveret.runtime import Runtime
from leveret.settings import redact

from .delivery import SqliteDelivery
from .rows import packed
from .schema import MIN_SQLITE
from .store import Store
from .taker import Taker
from .write import Again, Bury, Close, Open, Publish

WINDOW = 1000
"""Most publishes of one broker that aren't confirmed yet; the next ones wait, inside their deadlines."""
CLOSE_S = 5.0
"""How long closing may take where the file can't be written."""
_FIRST_TRY_S = 1.0


def path_of(url: str) -> str:
    """Return the absolute path that `url` names, from this moment's working folder; ConfigurationError where it names none."""
    parts = urlsplit(url)
    path = unquote(parts.path.removeprefix("/"))
    problem = None
    if parts.netloc:
        problem = "has a host: three slashes come before a relative path, four before an absolute one"
    elif parts.query or parts.fragment:
        problem = "takes no options"
    elif not path or "\0" in path:
        problem = "names no file"
    elif path == ":memory:":
        problem = "names no file; in memory is memory://"
    if problem:
        msg = f"the broker's URL {redact(url)!r} {problem}; for example sqlite:///jobs.db or sqlite:////var/lib/shop/jobs.db"
        raise ConfigurationError(msg)
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        msg = f"this Python has SQLite {sqlite3.sqlite_version}; the SQLite broker needs {'.'.join(map(str, MIN_SQLITE))} or later"
        raise ConfigurationError(msg)
    return os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links


def _own(delivery: Delivery) -> SqliteDelivery:
    if not isinstance(delivery, SqliteDelivery):
        msg = f"{delivery!r} isn't a delivery of the SQLite broker"
        raise TypeError(msg)
    return delivery


@final
class _Consumption:
    """The loop's side of a `Taker`."""

    def __init__(self, store: Store, subscriptions: Sequence[Subscription], sink: Sink) -> None:
        self._store = store
        self._sink = sink
        self._error: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._error.add_done_callback(lambda error: error.cancelled() or error.exception())  # nobody need wait for it
        self._closed = False
        self.taker = Taker(subscriptions, self)

    async def open(self) -> None:
        """Register; return when it is done or could not be done for now."""
        write = Open("a consumer", self.taker)
        write.future = asyncio.get_running_loop().create_future()
        write.future.add_done_callback(lambda opened: opened.cancelled() or opened.exception())
        self._store.post(write)
        try:
            await asyncio.wait({write.future}, timeout=_FIRST_TRY_S)
        except asyncio.CancelledError:
            self._store.post(Close("closing a consumer", self.taker))
            raise
        if write.future.done():
            write.future.result()

    @property
    def ready(self) -> bool:
        """Whether it is registered, and the file could be written when it was last tried."""
        return self.taker.ready and self.taker.taking

    async def failed(self) -> None:
        """As `Consumption.failed`."""
        await asyncio.shield(self._error)

    async def stop_taking(self) -> None:
        """As `Consumption.stop_taking`; what is being claimed meanwhile is given back."""
        self.taker.taking = False

    async def close(self) -> None:
        """As `Consumption.close`; where the file stays locked, what is held comes back by the lease, and what was done may run again."""
        if self._closed:
            return
        self._closed = True
        self.taker.taking = False
        if self._store.closed:
            return
        try:
            await self._store.run(Close("closing a consumer", self.taker, time.monotonic() + CLOSE_S))
        except (PublishTimeout, BrokerUnavailable, ConfigurationError):
            self._store.post(Close("closing a consumer", self.taker))  # whenever it can be

    def arrived(self, deliveries: Sequence[SqliteDelivery], /) -> None:
        """Hand over what was claimed; give it back where nothing is taken any more."""
        for delivery in deliveries:
            if self.taker.taking:
                self._sink.deliver(delivery)
            elif delivery.unsettled:
                self._store.give_back(delivery)

    def lost(self) -> None:
        """Tell the sink."""
        self._sink.lost()

    def cannot(self, error: ConfigurationError, /) -> None:
        """End for good."""
        if not self._error.done():
            self._error.set_exception(error)
        self._sink.lost()


@final
class SqliteBroker:
    """A `Broker` on the SQLite file at `path`."""

    def __init__(self, path: str, runtime: Runtime) -> None:
        self._clock = runtime.clock
        self._store = Store(path, runtime)
        self._window: asyncio.Semaphore | None = None
        self._consumptions: list[_Consumption] = []

    @property
    def features(self) -> Features:
        """As `Broker.features`."""
        return Features(durable=True, shared=True, counts_redelivery=True)

    def _due_ms(self, delay_s: float) -> int | None:
        return math.ceil((self._clock.now() + delay_s) * 1000) if delay_s > 0 else None

    def post(self, queue: Queue, envelope: Envelope, *, deadline: float) -> None:
        """Never at once here: `publish` groups what comes together by itself."""

    async def publish(self, queue: Queue, envelope: Envelope, *, delay_s: float, deadline: float) -> None:
        """As `Broker.publish`; every queue exists, so that none is unroutable. ConfigurationError where the file can't be used."""
        about = f"job {envelope.job_id} for queue {queue.name!r}"
        row = packed(queue.name, envelope, self._due_ms(delay_s))
        if self._window is None:
            self._window = asyncio.Semaphore(WINDOW)
        try:
            async with asyncio.timeout_at(deadline):
                await self._window.acquire()
        except TimeoutError:
            msg = f"{about} wasn't published in time: {WINDOW} others wait to be written to {self._store.path}"
            raise PublishTimeout(msg, job_id=envelope.job_id, maybe_published=False) from None
        try:
            await self._store.run(Publish(about, row, deadline))
        finally:
            self._window.release()

    async def consume(self, subscriptions: Sequence[Subscription], sink: Sink) -> Consumption:
        """As `Broker.consume`; where the file is locked it returns within a second, and goes on trying."""
        if self._store.closed:
            msg = f"the broker on {self._store.path} was closed; open a new one"
            raise ConfigurationError(msg)
        consumption = _Consumption(self._store, subscriptions, sink)
        await consumption.open()
        self._consumptions.append(consumption)
        return consumption

    def done(self, delivery: Delivery) -> None:
        """As `Broker.done`; where the file is locked it is kept, and tried until it succeeds."""
        own = _own(delivery)
        if own.unsettled:
            self._store.done(own)

    async def again(self, delivery: Delivery, envelope: Envelope, *, delay_s: float, deadline: float) -> None:
        """As `Broker.again`, in one transaction with the ack; no effect on a delivery that isn't live, or that a late commit has settled."""
        own = _own(delivery)
        if own.unsettled:
            row = packed(own.queue.name, envelope, self._due_ms(delay_s))
            about = f"job {envelope.job_id}, to go again to queue {own.queue.name!r},"
            await self._store.run(Again(about, own, row, deadline))

    async def bury(self, delivery: Delivery, envelope: Envelope, *, deadline: float) -> None:
        """As `Broker.bury`, in one transaction with the ack; no effect on a delivery that isn't live, or that a late commit has settled."""
        own = _own(delivery)
        if own.unsettled:
            buried = msgspec.structs.replace(envelope, origin=envelope.origin or own.queue.name)
            row = packed(own.queue.name, buried, int(self._clock.now() * 1000))
            about = f"job {envelope.job_id}, to be buried from queue {own.queue.name!r},"
            await self._store.run(Bury(about, own, row, deadline))

    def give_back(self, delivery: Delivery) -> None:
        """As `Broker.give_back`; it keeps its place, and doesn't count as redelivered."""
        own = _own(delivery)
        if own.unsettled:
            self._store.give_back(own)

    async def close(self) -> None:
        """As `Broker.close`; within about ten seconds."""
        consumptions, self._consumptions = self._consumptions, []
        try:
            await asyncio.gather(*(consumption.close() for consumption in consumptions))
        finally:
            await self._store.close(CLOSE_S)
