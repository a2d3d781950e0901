"""The store: the jobs of one process by queue and level, its delayed jobs and its dead letters."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import re
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from operator import itemgetter
from typing import Protocol, final

import msgspec

from leveret.clock import Clock
from leveret.envelope import JSON, Envelope
from leveret.errors import BrokerUnavailable, ConfigurationError, PublishTimeout
from leveret.headers import pack_headers, unpack_headers
from leveret.ids import new_job_id
from leveret.job import LEVELS, Priority
from leveret.settings import redact_url


class Stored(msgspec.Struct, eq=False):
    """A job in a queue, with its place: a job that is given back returns to that place."""

    envelope: Envelope
    problem: str | None
    order: int
    delivered: bool = False


class Letter(msgspec.Struct, eq=False):
    """A buried job, and the reader that holds it."""

    envelope: Envelope
    order: int
    reader: object = None
    """The `Admin.dead` reader that holds the job; None if nobody reads it."""

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.envelope.job_id


class StoreState(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of a store, counted over all its queues."""

    ready: int
    """Jobs that can be delivered now."""
    delayed: int
    """Jobs that aren't due yet."""
    next_due_in_s: float | None
    """Seconds until the next delayed job is due; None without delayed jobs."""
    unsettled: int
    """Jobs that consumers hold."""
    dead: int
    """Dead letters."""
    version: int
    """Increases with every change; for `MemoryStore.changed`."""


class Consumer(Protocol):
    """A consumption, as the store sees it. The caller holds the store's lock."""

    @property
    def names(self) -> Collection[str]:
        """The queues that the consumption takes jobs from."""
        ...

    @property
    def held(self) -> Mapping[object, Stored]:
        """The delivered, unsettled jobs, by delivery."""
        ...

    def wake(self) -> None:
        """Look for jobs in the next turn of the consumption's loop."""
        ...

    def end_if_orphaned(self) -> None:
        """End if the loop was closed without a call of `close`."""
        ...

    def cut_off(self) -> None:
        """Put back every held job, as a lost connection does."""
        ...


@final
class Contents:
    """The jobs of a store. Brokers, consumptions and admins hold `lock` while they use a method or an attribute."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.order = itertools.count(1)
        self.ready: dict[str, dict[Priority, list[tuple[int, Stored]]]] = {}
        self.delayed: list[tuple[float, int, Stored]] = []
        self.dead: dict[str, dict[int, Letter]] = {}
        self.consumers: dict[Consumer, None] = {}
        self.refusal: str | None = None
        """Why publishes are refused; None while they are accepted."""
        self.version = 0
        self.watchers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def changed(self) -> None:
        """Count a change and wake everybody who waits for one."""
        self.version += 1
        watchers, self.watchers = self.watchers, []
        for loop, event in watchers:
            with suppress(RuntimeError):  # the watcher's loop was closed: nobody waits there
                loop.call_soon_threadsafe(event.set)

    def check_accepts(self, envelope: Envelope) -> None:
        """Raise BrokerUnavailable while publishes are refused, and PublishTimeout after the envelope's deadline."""
        if self.refusal is not None:
            msg = f"job {envelope.job_id} wasn't published: {self.refusal}"
            raise BrokerUnavailable(msg, job_id=envelope.job_id)
        if time.monotonic() > envelope.deadline:
            msg = f"job {envelope.job_id} wasn't published: its deadline had passed before it was sent"
            raise PublishTimeout(msg, job_id=envelope.job_id, maybe_published=False)

    def levels(self, queue: str) -> dict[Priority, list[tuple[int, Stored]]]:
        """Return the lines of `queue`, one heap per level; create the queue if it is new."""
        levels = self.ready.get(queue)
        if levels is None:
            levels = self.ready[queue] = {level: [] for level in LEVELS}
        return levels

    def put(self, envelope: Envelope, problem: str | None, due: float | None = None) -> None:
        """Add a job to the end of its line, or to the delayed jobs until `due`."""
        stored = Stored(envelope, problem, next(self.order))
        if due is None:
            heapq.heappush(self.levels(envelope.queue)[envelope.priority], (stored.order, stored))
        else:
            self.levels(envelope.queue)
            heapq.heappush(self.delayed, (due, stored.order, stored))
        self._wake(envelope.queue)

    def put_back(self, stored: Stored) -> None:
        """Return a job to its old place in its line."""
        heapq.heappush(self.levels(stored.envelope.queue)[stored.envelope.priority], (stored.order, stored))
        self._wake(stored.envelope.queue)

    def promote(self, now: float) -> None:
        """Move the delayed jobs that are due to the ends of their lines."""
        while self.delayed and self.delayed[0][0] <= now:
            _, _, stored = heapq.heappop(self.delayed)
            stored.order = next(self.order)
            self.put_back(stored)

    def _wake(self, queue: str) -> None:
        self.changed()
        for consumer in list(self.consumers):
            if queue in consumer.names:
                consumer.wake()

    def bury(self, envelope: Envelope) -> None:
        """Add a dead letter."""
        order = next(self.order)
        self.dead.setdefault(envelope.queue, {})[order] = Letter(envelope, order)
        self.changed()


@final
class MemoryStore:
    """The queues, delayed jobs and dead letters that the brokers of one process share, and the faults that a test can cause.

    Any thread may use a store. The brokers of one store must have clocks that show the same time: one `ManualClock`, or the system's.
    """

    def __init__(self) -> None:
        self.contents = Contents()
        """For the broker's own classes."""

    def refuse(self, reason: str = "the test refuses publishes (MemoryStore.refuse)") -> None:
        """Let every publish, retry, burial and replay raise `BrokerUnavailable` with `reason`, until `accept`; deliveries go on."""
        with self.contents.lock:
            self.contents.refusal = reason

    def accept(self) -> None:
        """End `refuse`."""
        with self.contents.lock:
            self.contents.refusal = None

    def disconnect(self) -> None:
        """Cut every consumption, as a lost connection does.

        Unsettled deliveries are no longer live, and their jobs return to their places. Each sink's `lost()` is called. The
        consumptions connect again at once, and the jobs are delivered again, marked as redelivered.
        """
        with self.contents.lock:
            for consumer in list(self.contents.consumers):
                consumer.cut_off()
            self.contents.changed()

    def inject(
        self,
        queue: str,
        body: bytes,
        *,
        job: str = "",
        job_id: str | None = None,
        priority: Priority = Priority.NORMAL,
        content_type: str = JSON,
        content_encoding: str | None = None,
        headers: Mapping[str, object] | None = None,
    ) -> None:
        """Add a message as a foreign producer might send it, unchecked; `headers` is the table on the wire, with its `lv-…` names."""
        fields, problem = unpack_headers(headers)
        fields |= {"priority": priority, "origin": None}  # the queue decides these, not a header
        envelope = Envelope(
            job_id=job_id or new_job_id(),
            job=job,
            queue=queue,
            body=bytes(body),
            content_type=content_type,
            content_encoding=content_encoding,
            **fields,
        )
        with self.contents.lock:
            self.contents.put(envelope, problem)

    def state(self, clock: Clock) -> StoreState:
        """Return the store's contents now; `clock` is the clock of its brokers."""
        with self.contents.lock:
            self.contents.promote(clock.monotonic())
            return StoreState(
                ready=sum(len(line) for levels in self.contents.ready.values() for line in levels.values()),
                delayed=len(self.contents.delayed),
                next_due_in_s=max(0.0, self.contents.delayed[0][0] - clock.monotonic())
                if self.contents.delayed
                else None,
                unsettled=sum(len(consumer.held) for consumer in self.contents.consumers),
                dead=sum(map(len, self.contents.dead.values())),
                version=self.contents.version,
            )

    def delayed(self, clock: Clock) -> list[Envelope]:
        """Return the jobs that aren't due yet, the next one first; `clock` is the clock of the store's brokers."""
        with self.contents.lock:
            self.contents.promote(clock.monotonic())
            return [stored.envelope for _, _, stored in sorted(self.contents.delayed, key=itemgetter(0, 1))]

    async def changed(self, since: int) -> None:
        """Return once the version of the store isn't `since` any more: after a publish, a delivery or a settlement."""
        event = asyncio.Event()
        watcher = (asyncio.get_running_loop(), event)
        with self.contents.lock:
            if self.contents.version != since:
                return
            self.contents.watchers.append(watcher)
        try:
            await event.wait()
        finally:
            with self.contents.lock, suppress(ValueError):  # `Contents.changed` has removed the watcher that it woke
                self.contents.watchers.remove(watcher)


def due_at(envelope: Envelope, clock: Clock) -> float | None:
    """Return when `envelope` is due, in the clock's monotonic seconds; None if the job may run at once."""
    due_in_s = envelope.due_in_s(clock.now())
    # Unix time as a float is exact to a quarter of a microsecond; after a test moves its clock by exactly the delay, the job must be due
    return round(clock.monotonic() + due_in_s, 5) if due_in_s else None


def sent(envelope: Envelope, queue: str, origin: str | None = None) -> tuple[Envelope, str | None]:
    """Return the envelope that arrives in `queue`, and its problem, if any: the headers go through the table that AMQP carries.

    `origin` is the queue that a dead letter comes from; None for a job in a queue.
    """
    fields, problem = unpack_headers(pack_headers(envelope))
    fields |= {"priority": envelope.priority, "origin": origin}
    arrived = Envelope(
        job_id=envelope.job_id,
        job=envelope.job,
        queue=queue,
        body=bytes(envelope.body),
        content_type=envelope.content_type,
        content_encoding=envelope.content_encoding,
        created_s=envelope.created_s,
        app=envelope.app,
        correlation_id=envelope.correlation_id,
        reply_to=envelope.reply_to,
        **fields,
    )
    return arrived, problem


_URL = re.compile(r"memory://[A-Za-z0-9_.-]*/?\Z")
_stores: dict[str, MemoryStore] = {}
_stores_lock = threading.Lock()


def named(url: str) -> str:
    """Return what tells `memory://` or `memory://name` from others; ConfigurationError for any other URL."""
    if not _URL.match(url):
        msg = f"the URL {redact_url(url)!r} can't be read: write memory:// or memory://name, with only A-Z a-z 0-9 _ . - in the name"
        raise ConfigurationError(msg)
    return url.rstrip("/")


def memory_store(url: str) -> MemoryStore:
    """Return this process's store for `url`, `memory://` or `memory://name`; ConfigurationError for any other URL."""
    name = named(url)
    with _stores_lock:
        return _stores.setdefault(name, MemoryStore())
