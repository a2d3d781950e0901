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
import os
import sqlite3
import time
from collections.abc import Sequence
from typing import final
from urllib.parse import unquote, urlsplit

from leveret.broker import Consumption, Features, Sink, Subscription
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable, ConfigurationError, PublishTimeout
from leveret.job import Queue
from leveret.runtime import Runtime
from leveret.settings import redact

from .delivery import SqliteDelivery, Window
from .rows import packed
from .schema import MIN_SQLITE
from .settling import Settling, when_ms
from .store import Store
from .taker import Taker
from .write import Close, Open, Publish

WINDOW = 1000
"""Most publishes of one broker that aren't confirmed yet; the next ones wait, inside their deadlines."""
CLOSE_S = 5.0
"""How long closing may take where the file can't be written."""
_FIRST_TRY_S = 1.0
_FEATURES = Features(
    durable=True,
    shared=True,
    counts_redelivery=True,
    connected=False,
    queue_type=None,
    window_per_level=True,
    deletable=False,
)


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


@final
class _Consumption:
    """The loop's side of a `Taker`."""

    def __init__(self, store: Store, settling: Settling, subscriptions: Sequence[Subscription], sink: Sink) -> None:
        self._store = store
        self._sink = sink
        self._error: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._error.add_done_callback(lambda error: error.cancelled() or error.exception())  # nobody need wait for it
        self._closed = False
        windows = (
            Window(s.queue, level.value, s.prefetch, settling) for s in subscriptions for level in s.queue.levels
        )
        self.taker = Taker(windows, self)

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
            else:
                delivery.give_back()

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
        self._settling = Settling(self._store, runtime.clock)
        self._window: asyncio.Semaphore | None = None
        self._consumptions: list[_Consumption] = []

    def features(self, _: Queue | None = None, /) -> Features:
        """As `Broker.features`."""
        return _FEATURES

    def post(self, queue: Queue, envelope: Envelope) -> None:
        """Never at once here: `publish` groups what comes together by itself."""

    async def publish(self, queue: Queue, envelope: Envelope) -> None:
        """As `Broker.publish`; every queue exists, so that no job is unroutable. ConfigurationError where the file can't be used."""
        about = f"job {envelope.job_id} for queue {queue.name!r}"
        row, deadline = packed(queue.name, envelope, when_ms(envelope, self._clock)), envelope.deadline
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
        consumption = _Consumption(self._store, self._settling, subscriptions, sink)
        await consumption.open()
        self._consumptions.append(consumption)
        return consumption

    async def close(self) -> None:
        """As `Broker.close`; within about ten seconds."""
        consumptions, self._consumptions = self._consumptions, []
        try:
            await asyncio.gather(*(consumption.close() for consumption in consumptions))
        finally:
            await self._store.close(CLOSE_S)
