"""The broker inside one process, for users' tests: real envelopes, windows, priorities, delays and dead letters; nothing survives.

`memory://name` is one `MemoryStore` for every broker and admin of this process that is opened by that URL, whatever its loop or
thread. A test that wants its own makes one: `MemoryBroker(MemoryStore(), runtime)`.
"""

# pyright: reportPrivateUsage=false
# One lock over what is shared: the classes of this module and of `admin` work on the store's insides, and nobody else does.

from __future__ import annotations

import asyncio
import heapq
import itertools
import re
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import final

import msgspec

from leveret.broker import Consumption, Delivery, Features, Sink, Subscription
from leveret.clock import Clock, Timer
from leveret.envelope import JSON, Envelope
from leveret.errors import BrokerUnavailable, ConfigurationError, PublishTimeout
from leveret.headers import pack_headers, unpack_headers
from leveret.ids import new_job_id
from leveret.job import LEVELS, Priority, Queue
from leveret.runtime import Runtime
from leveret.settings import redact


class _Stored(msgspec.Struct, eq=False):
    """A job in a queue; it knows its place, so that one given back stands where it stood."""

    envelope: Envelope
    problem: str | None
    order: int
    delivered: bool = False


class Letter(msgspec.Struct, eq=False):
    """A buried job, and who has it open."""

    envelope: Envelope
    order: int
    reader: object = None
    """The `Admin.dead` that reads it."""


class StoreState(msgspec.Struct, frozen=True, kw_only=True):
    """What a store holds, over all its queues."""

    ready: int
    """Jobs that wait to be delivered."""
    delayed: int
    """Jobs that wait for their time."""
    next_due_in_s: float | None
    """Seconds until the next of those; None when there is none."""
    unsettled: int
    """Jobs that consumers hold."""
    dead: int
    """Dead letters."""
    version: int
    """Rises with every change; for `MemoryStore.changed`."""


@final
class MemoryStore:
    """What the brokers of one process share: queues, delayed jobs, dead letters; and the levers of a test.

    Any thread may use it. Brokers of one store must run under clocks that show the same time: one `ManualClock`, or the system's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._order = itertools.count(1)
        self._ready: dict[str, dict[Priority, list[tuple[int, _Stored]]]] = {}
        self._delayed: list[tuple[float, int, _Stored]] = []
        self._dead: dict[str, dict[int, Letter]] = {}
        self._consumptions: dict[_Consumption, None] = {}
        self._refusal: str | None = None
        self._version = 0
        self._watchers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def refuse(self, reason: str = "the memory broker was told to refuse") -> None:
        """From now on every publish, retry, burial and replay raises `BrokerUnavailable(reason)`, until `accept`; deliveries go on."""
        with self._lock:
            self._refusal = reason

    def accept(self) -> None:
        """Call `refuse` off."""
        with self._lock:
            self._refusal = None

    def disconnect(self) -> None:
        """Cut every consumption as a lost connection does.

        What was delivered and isn't settled is no longer live and goes back to its place; each sink hears `lost()`, and then the
        jobs come again, redelivered: the consumptions connect again by themselves, at once.
        """
        with self._lock:
            for consumption in list(self._consumptions):
                consumption._cut_off()
            self._changed()

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
        """Put what a foreign producer might send, unchecked; `headers` is the table as it is on the wire, `lv-…` names included."""
        fields, problem = unpack_headers(headers)
        fields |= {"priority": priority, "origin": None}  # where it is put says these, whatever a header says
        envelope = Envelope(
            job_id=job_id or new_job_id(),
            job=job,
            queue=queue,
            body=bytes(body),
            content_type=content_type,
            content_encoding=content_encoding,
            **fields,
        )
        with self._lock:
            self._put(envelope, problem)

    def state(self, clock: Clock) -> StoreState:
        """Return what is in it now, by `clock`, the brokers' own."""
        with self._lock:
            self._promote(clock.monotonic())
            return StoreState(
                ready=sum(len(line) for levels in self._ready.values() for line in levels.values()),
                delayed=len(self._delayed),
                next_due_in_s=max(0.0, self._delayed[0][0] - clock.monotonic()) if self._delayed else None,
                unsettled=sum(len(consumption._held) for consumption in self._consumptions),
                dead=sum(map(len, self._dead.values())),
                version=self._version,
            )

    async def changed(self, since: int) -> None:
        """Return once something changed after `StoreState.version` was `since`: a publish, a delivery, a settlement."""
        event = asyncio.Event()
        watcher = (asyncio.get_running_loop(), event)
        with self._lock:
            if self._version != since:
                return
            self._watchers.append(watcher)
        try:
            await event.wait()
        finally:
            with self._lock, suppress(ValueError):  # gone from the list once it was called
                self._watchers.remove(watcher)

    def _changed(self) -> None:
        self._version += 1
        watchers, self._watchers = self._watchers, []
        for loop, event in watchers:
            with suppress(RuntimeError):  # its loop was closed: nobody waits there
                loop.call_soon_threadsafe(event.set)

    def _check_accepts(self, envelope: Envelope, deadline: float) -> None:
        if self._refusal is not None:
            msg = f"job {envelope.job_id} wasn't taken: {self._refusal}"
            raise BrokerUnavailable(msg, job_id=envelope.job_id)
        if time.monotonic() > deadline:
            msg = f"job {envelope.job_id} wasn't published: its deadline had passed before it was sent"
            raise PublishTimeout(msg, job_id=envelope.job_id, maybe_published=False)

    def _levels(self, queue: str) -> dict[Priority, list[tuple[int, _Stored]]]:
        levels = self._ready.get(queue)
        if levels is None:
            levels = self._ready[queue] = {level: [] for level in LEVELS}
        return levels

    def _put(self, envelope: Envelope, problem: str | None, due: float | None = None) -> None:
        stored = _Stored(envelope, problem, next(self._order))
        if due is None:
            heapq.heappush(self._levels(envelope.queue)[envelope.priority], (stored.order, stored))
        else:
            self._levels(envelope.queue)
            heapq.heappush(self._delayed, (due, stored.order, stored))
        self._wake(envelope.queue)

    def _put_back(self, stored: _Stored) -> None:
        heapq.heappush(self._levels(stored.envelope.queue)[stored.envelope.priority], (stored.order, stored))
        self._wake(stored.envelope.queue)

    def _promote(self, now: float) -> None:
        """Make ready what is due: it joins the line as a job published then would."""
        while self._delayed and self._delayed[0][0] <= now:
            _, _, stored = heapq.heappop(self._delayed)
            stored.order = next(self._order)
            self._put_back(stored)

    def _wake(self, queue: str) -> None:
        self._changed()
        for consumption in list(self._consumptions):
            if queue in consumption._names:
                consumption._wake()

    def _bury(self, envelope: Envelope) -> None:
        order = next(self._order)
        self._dead.setdefault(envelope.queue, {})[order] = Letter(envelope, order)
        self._changed()


def sent(envelope: Envelope, queue: str, origin: str | None = None) -> tuple[Envelope, str | None]:
    """Return what arrives of `envelope` in `queue`, and what is wrong with it: the headers go through the table that AMQP carries.

    `origin` is for a dead letter; a job in a queue has none.
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


@final
class _Delivery:
    __slots__ = ("consumption", "queue", "redelivered", "stored")

    def __init__(self, consumption: _Consumption, queue: Queue, stored: _Stored) -> None:
        self.consumption = consumption
        self.queue = queue
        self.stored = stored
        self.redelivered = stored.delivered

    @property
    def envelope(self) -> Envelope:
        return self.stored.envelope

    @property
    def problem(self) -> str | None:
        return self.stored.problem

    @property
    def live(self) -> bool:
        return self in self.consumption._held


def _own(delivery: Delivery) -> _Delivery:
    if not isinstance(delivery, _Delivery):
        msg = f"{delivery!r} isn't a delivery of the memory broker"
        raise TypeError(msg)
    return delivery


@final
class _Consumption:
    """One consumer: a window for each level of each of its queues, filled on its own loop."""

    def __init__(self, store: MemoryStore, clock: Clock, subscriptions: Sequence[Subscription], sink: Sink) -> None:
        self._store = store
        self._clock = clock
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self._names = {each.queue.name for each in subscriptions}
        self._windows = [(each.queue, level, each.prefetch) for level in LEVELS for each in subscriptions]
        self._used = {(queue.name, level): 0 for queue, level, _ in self._windows}
        self._held: dict[_Delivery, None] = {}
        self._taking = True
        self._cut = False
        self._woken = False
        self._timer: tuple[float, Timer] | None = None
        with store._lock:
            for other in list(store._consumptions):
                if other._loop.is_closed():
                    other._end()
            store._consumptions[self] = None
            for name in self._names:
                store._levels(name)
            self._wake()

    @property
    def ready(self) -> bool:
        return self in self._store._consumptions and self._taking and not self._cut

    async def failed(self) -> None:
        await asyncio.Future[None]()  # nothing about a store in memory can be wrong for good

    async def stop_taking(self) -> None:
        with self._store._lock:
            self._taking = False

    async def close(self) -> None:
        with self._store._lock:
            self._end()
        self._arm(None)

    def _end(self) -> None:
        self._taking = self._cut = False
        self._store._consumptions.pop(self, None)
        self._release_all()

    def _release_all(self) -> None:
        held, self._held = self._held, {}
        self._used = dict.fromkeys(self._used, 0)
        for delivery in held:
            self._store._put_back(delivery.stored)

    def _cut_off(self) -> None:
        self._cut = True
        self._release_all()
        self._wake()

    def _wake(self) -> None:
        if self._woken:
            return
        self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._pump)
        except (
            RuntimeError
        ):  # its loop was closed without `close`: that consumer is dead, and what it held goes to the others
            self._end()

    def _pump(self) -> None:
        """Deliver until the windows are full or the lines empty, and wake again when the next delayed job is due."""
        store = self._store
        while True:
            with store._lock:
                self._woken = False
                cut, self._cut = self._cut, False
                delivery = None if cut else self._take()
                if not cut and delivery is None:
                    due = store._delayed[0][0] if self._taking and store._delayed else None
                    break
            if delivery is None:
                self._sink.lost()
            else:
                self._sink.deliver(delivery)
        self._arm(due)

    def _take(self) -> _Delivery | None:
        if not self._taking:
            return None
        self._store._promote(self._clock.monotonic())
        for queue, level, prefetch in self._windows:
            line = self._store._ready[queue.name][level]
            if line and self._used[queue.name, level] < prefetch:
                _, stored = heapq.heappop(line)
                delivery = _Delivery(self, queue, stored)
                stored.delivered = True
                self._used[queue.name, level] += 1
                self._held[delivery] = None
                self._store._changed()
                return delivery
        return None

    def _arm(self, due: float | None) -> None:
        if self._timer is not None:
            if self._timer[0] == due:
                return
            self._timer[1].cancel()
        self._timer = None if due is None else (due, self._clock.call_later(due - self._clock.monotonic(), self._due))

    def _due(self) -> None:
        self._timer = None
        with self._store._lock:
            self._wake()

    def _settled(self, delivery: _Delivery) -> bool:
        """Take it out of its window; False where it isn't live. Called with the lock held."""
        if delivery not in self._held:
            return False
        del self._held[delivery]
        self._used[delivery.queue.name, delivery.envelope.priority] -= 1
        self._store._changed()
        self._wake()
        return True


@final
class MemoryBroker:
    """A `Broker` on a `MemoryStore`, under `runtime`'s clock; the store is private to whoever has it."""

    def __init__(self, store: MemoryStore, runtime: Runtime) -> None:
        self._store = store
        self._clock = runtime.clock
        self._consumptions: list[_Consumption] = []
        self._closed = False

    features = Features(durable=False, shared=False, counts_redelivery=True)

    def _due(self, delay_s: float) -> float | None:
        return self._clock.monotonic() + delay_s if delay_s > 0 else None

    def post(self, queue: Queue, envelope: Envelope, *, deadline: float) -> None:
        """Never at once here: `publish` groups what comes together by itself."""

    async def publish(self, queue: Queue, envelope: Envelope, *, delay_s: float, deadline: float) -> None:
        """As `Broker.publish`; every queue exists, so that none is unroutable."""
        await asyncio.sleep(
            0
        )  # no broker answers within one turn of the loop, and a loop of publishes must let consumers run
        with self._store._lock:
            if self._closed:
                msg = f"job {envelope.job_id} wasn't published: this memory broker was closed"
                raise BrokerUnavailable(msg, job_id=envelope.job_id)
            self._store._check_accepts(envelope, deadline)
            self._store._put(*sent(envelope, queue.name), self._due(delay_s))

    async def consume(self, subscriptions: Sequence[Subscription], sink: Sink) -> Consumption:
        """As `Broker.consume`; it is ready at once, and deliveries come from the loop's next turn on."""
        if self._closed:
            msg = "this memory broker was closed; open a new one"
            raise ConfigurationError(msg)
        consumption = _Consumption(self._store, self._clock, subscriptions, sink)
        self._consumptions.append(consumption)
        return consumption

    def done(self, delivery: Delivery) -> None:
        """As `Broker.done`."""
        own = _own(delivery)
        with self._store._lock:
            own.consumption._settled(own)

    async def again(self, delivery: Delivery, envelope: Envelope, *, delay_s: float, deadline: float) -> None:
        """As `Broker.again`; in one step with the ack, and no effect on a delivery that isn't live."""
        own = _own(delivery)
        await asyncio.sleep(0)
        with self._store._lock:
            if own.live:
                self._store._check_accepts(envelope, deadline)
                self._store._put(*sent(envelope, own.queue.name), self._due(delay_s))
                own.consumption._settled(own)

    async def bury(self, delivery: Delivery, envelope: Envelope, *, deadline: float) -> None:
        """As `Broker.bury`; in one step with the ack, and no effect on a delivery that isn't live."""
        own = _own(delivery)
        await asyncio.sleep(0)
        with self._store._lock:
            if own.live:
                self._store._check_accepts(envelope, deadline)
                buried, _ = sent(envelope, own.queue.name, origin=own.queue.name)
                self._store._bury(buried)
                own.consumption._settled(own)

    def give_back(self, delivery: Delivery) -> None:
        """As `Broker.give_back`; it stands where it stood before."""
        own = _own(delivery)
        with self._store._lock:
            if own.consumption._settled(own):
                self._store._put_back(own.stored)

    async def close(self) -> None:
        """As `Broker.close`; what is in the store stays there."""
        self._closed = True
        for consumption in self._consumptions:
            await consumption.close()
        self._consumptions.clear()


_URL = re.compile(r"memory://[A-Za-z0-9_.-]*/?\Z")
_stores: dict[str, MemoryStore] = {}
_stores_lock = threading.Lock()


def memory_store(url: str) -> MemoryStore:
    """Return the store that this process keeps under `url`, `memory://` or `memory://name`; ConfigurationError for any other."""
    if not _URL.match(url):
        msg = f"the broker's URL {redact(url)!r} can't be read: a memory broker is memory:// or memory://name, with [A-Za-z0-9_.-] in the name"
        raise ConfigurationError(msg)
    with _stores_lock:
        return _stores.setdefault(url.rstrip("/"), MemoryStore())
