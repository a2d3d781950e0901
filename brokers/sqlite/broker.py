"""The embedded broker: one SQLite file, nothing to install. Publishers and several worker processes of one machine share the file.

A confirmed job is on the disk (`synchronous=FULL`): it survives the death of every process and of the machine. The file must be on
a local disk, since SQLite's locks don't work on network file systems.

- Each level is a separate line, oldest job first. A delayed job joins the end of its line when it is due by the wall clock.
- `again`, `bury` and a replay are one transaction with the settlement: neither a loss nor a duplicate is possible between the two.
- `give_back` keeps the job's place and doesn't count as a delivery, since the job wasn't started. Jobs that a consumption holds
  when it closes, or when its process dies, are delivered again as redelivered.
- The jobs of a dead process are delivered again within about a second if this machine's process table shows the death, and
  otherwise 15 to 20 seconds after the process's last beat (see `lease`).
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Sequence
from typing import final
from urllib.parse import unquote, urlsplit

from leveret.broker import Consumption, Features, PublisherState, QueueState, Sink, Subscription
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable, ConfigurationError, PublishTimeout
from leveret.job import Queue
from leveret.runtime import Runtime
from leveret.settings import redact_url

from .delivery import SqliteDelivery, Window
from .rows import packed
from .schema import MIN_SQLITE
from .settling import Settling, when_ms
from .store import Store
from .taker import Taker
from .write import Close, Open, Publish

WINDOW = 1000
"""At most this many publishes of one broker are unconfirmed at once; further publishes wait, within their deadlines."""
CLOSE_S = 5.0
"""How long `close` waits if the file can't be written."""
_FIRST_TRY_S = 1.0
_FEATURES = Features(
    durable=True,
    shared=True,
    counts_redelivery=True,
    counts_crashes=True,
    connected=False,
    queue_type=None,
    keeps_order=True,
    keeps_place=True,
    window_per_level=True,
    deletable=False,
)


def path_of(url: str) -> str:
    """Return the absolute path in `url`, relative to the current folder; ConfigurationError if `url` has no path."""
    parts = urlsplit(url)
    path = unquote(parts.path.removeprefix("/"))
    problem = None
    if parts.netloc:
        problem = "has a host: write three slashes before a relative path, four before an absolute path"
    elif parts.query or parts.fragment:
        problem = "takes no options"
    elif not path or "\0" in path:
        problem = "names no file"
    elif path == ":memory:":
        problem = "names no file; for a broker in memory use memory://"
    if problem:
        msg = f"the broker's URL {redact_url(url)!r} {problem}; for example sqlite:///jobs.db or sqlite:////var/lib/shop/jobs.db"
        raise ConfigurationError(msg)
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        msg = f"this Python has SQLite {sqlite3.sqlite_version}; the SQLite broker needs {'.'.join(map(str, MIN_SQLITE))} or later"
        raise ConfigurationError(msg)
    try:
        return os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links
    except FileNotFoundError:
        msg = f"the broker's URL {redact_url(url)!r} is relative to the working directory, which was deleted; change to another one and start again"
        raise ConfigurationError(msg) from None


@final
class _Consumption:
    """A consumption: the part of a `Taker` that runs on the loop."""

    def __init__(self, store: Store, settling: Settling, subscriptions: Sequence[Subscription], sink: Sink) -> None:
        self._store = store
        self._sink = sink
        self._error: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # the exception is read here, since perhaps nobody waits for `failed`
        self._error.add_done_callback(lambda error: error.cancelled() or error.exception())
        self._closed = False
        self._names = [subscription.queue.name for subscription in subscriptions]
        windows = (
            Window(s.queue, level.value, s.prefetch, settling) for s in subscriptions for level in s.queue.levels
        )
        self.taker = Taker(windows, self)

    async def open(self) -> None:
        """Register the consumer; return once registered, or after a second if the file is locked."""
        write = Open("the registration of a consumer", self.taker)
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
    def queues(self) -> tuple[QueueState, ...]:
        """As `Consumption.queues`; a consumer is registered by a write to the file, which also shows whether it can be written."""
        if not self.taker.taking:
            return tuple(QueueState(name, "stopped") for name in self._names)
        if self.taker.ready:
            return tuple(QueueState(name, "consumed") for name in self._names)
        why = f"{self._store.path} can't be written: {self._store.why}" if self._store.why else ""
        return tuple(QueueState(name, "connecting", why) for name in self._names)

    async def failed(self) -> None:
        """As `Consumption.failed`."""
        await asyncio.shield(self._error)

    async def stop_taking(self) -> None:
        """As `Consumption.stop_taking`; jobs that are claimed meanwhile are given back."""
        self.taker.taking = False

    async def close(self) -> None:
        """As `Consumption.close`; if the file stays locked, held jobs come back when the lease ends, and finished jobs may run again."""
        if self._closed:
            return
        self._closed = True
        self.taker.taking = False
        if self._store.closed:
            return
        try:
            await self._store.run(Close("closing a consumer", self.taker, time.monotonic() + CLOSE_S))
        except (PublishTimeout, BrokerUnavailable, ConfigurationError):
            self._store.post(Close("closing a consumer", self.taker))  # once the file can be written

    def arrived(self, deliveries: Sequence[SqliteDelivery], /) -> None:
        """Pass the claimed jobs to the sink, or give them back after `stop_taking`."""
        for delivery in deliveries:
            if self.taker.taking:
                self._sink.deliver(delivery)
            else:
                delivery.give_back()

    def lost(self) -> None:
        """Call `lost` of the sink, and let the worker say what was lost."""
        self._sink.lost()
        self._sink.queues_changed()

    def changed(self) -> None:
        """Call `queues_changed` of the sink."""
        self._sink.queues_changed()

    def cannot(self, error: ConfigurationError, /) -> None:
        """Fail the consumption with `error`."""
        if not self._error.done():
            self._error.set_exception(error)
        self._sink.lost()
        self._sink.queues_changed()


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

    @property
    def publishing(self) -> PublisherState:
        """As `Broker.publishing`: blocked while the file is locked or can't be written, as far as a write has shown it."""
        return self._store.publishing

    def post(self, queue: Queue, envelope: Envelope) -> None:
        """Return None: `publish` already writes concurrent publishes in one transaction."""

    async def publish(self, queue: Queue, envelope: Envelope) -> None:
        """As `Broker.publish`; every queue exists, so no job is unroutable."""
        about = f"job {envelope.job_id} for queue {queue.name!r}"
        row, deadline = packed(queue.name, envelope, when_ms(envelope, self._clock)), envelope.deadline
        if self._window is None:
            self._window = asyncio.Semaphore(WINDOW)
        try:
            async with asyncio.timeout_at(deadline):
                await self._window.acquire()
        except TimeoutError:
            msg = f"{about} wasn't published in time: {WINDOW} earlier publishes still wait to be written to {self._store.path}"
            raise PublishTimeout(msg, job_id=envelope.job_id, maybe_published=False) from None
        try:
            await self._store.run(Publish(about, row, deadline))
        finally:
            self._window.release()

    async def consume(self, subscriptions: Sequence[Subscription], sink: Sink) -> Consumption:
        """As `Broker.consume`; if the file is locked, the call returns within a second, and the consumption goes on trying."""
        if self._store.closed:
            msg = f"the broker on {self._store.path} is closed; open a new one"
            raise ConfigurationError(msg)
        consumption = _Consumption(self._store, self._settling, subscriptions, sink)
        await consumption.open()
        self._consumptions.append(consumption)
        return consumption

    async def close(self) -> None:
        """As `Broker.close`; takes at most about ten seconds."""
        consumptions, self._consumptions = self._consumptions, []
        try:
            await asyncio.gather(*(consumption.close() for consumption in consumptions))
        finally:
            await self._store.close(CLOSE_S)
