"""The channel of one logical queue: its consumers, windows and deliveries, and the tags that aren't settled."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import sys
import time
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Protocol

import msgspec
from msgspec.structs import replace
from pamqp import commands

from leveret.broker import Sink, Subscription
from leveret.envelope import Envelope
from leveret.errors import PublishError
from leveret.job import Priority, Queue
from leveret.runtime import Runtime

from . import topology
from .channel import Channel, Got
from .connection import Connection
from .properties import excess, from_job_queue, id_in, max_delivered_bytes
from .publishing import Posting
from .session import Sick, settled
from .settling import Settling
from .wire import CLOSE_TIMEOUT_S, Closed

logger = logging.getLogger("leveret.rabbitmq")

HELD_BYTES = 64 << 20
"""The limit for unsettled bodies of a queue, in bytes; above it, the consumers are cancelled until half is settled."""
MOST_PREFETCH = 65_535
"""The largest prefetch: AMQP has two octets for it."""
NARROW_FOR = 1000
"""After this many deliveries a prefetch that large bodies reduced is computed again."""
INTERNAL_ERROR = 541
_SERIAL = itertools.count(1)
"""Numbers the consumers of this process."""


class TakerSession(Protocol):
    """The consuming session, as its takers see it."""

    @property
    def connection(self) -> Connection:
        """The connection of the taker's channel."""
        ...

    @property
    def runtime(self) -> Runtime:
        """Settings and time."""
        ...

    @property
    def sink(self) -> Sink:
        """Receives the deliveries."""
        ...

    @property
    def settling(self) -> Settling:
        """Publishes retries and burials."""
        ...

    @property
    def taking(self) -> bool:
        """Whether deliveries are still accepted; False once the worker stops."""
        ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` as a task; if it fails for another reason than the end of its channel, the session is lost."""
        ...


class RabbitDelivery(msgspec.Struct, eq=False, gc=False):
    """A delivery of a queue; see `leveret.broker.Delivery`."""

    taker: Taker
    tag: int
    envelope: Envelope
    problem: str | None
    redelivered: bool
    instead: Posting | None = None
    """The replacement that was published and isn't confirmed yet."""
    counted: bool = False
    """As `Delivery.counted`: what comes from the suspects for the first time was counted before."""

    @property
    def queue(self) -> Queue:
        """The queue that delivered the job."""
        return self.taker.queue

    @property
    def consumers(self) -> int:
        """How many consumers the job's physical queue had at the last look; very many if the broker counted none."""
        name = topology.physical(self.taker.queue, self.envelope.priority)
        return self.taker.consumers.get(name) or sys.maxsize

    @property
    def live(self) -> bool:
        """Whether the channel of the delivery is open."""
        return self.taker.live

    async def begin(self) -> bool:
        """As `Delivery.begin`: the job was counted when it was published."""
        return self.live

    def done(self) -> None:
        """Ack the delivery, at the end of this loop turn."""
        self.taker.ack(self)

    async def again(self, envelope: Envelope, /) -> bool:
        """Publish `envelope` to the delivery's queue, confirmed, then ack."""
        return await self.taker.settling.again(self, envelope)

    async def bury(self, envelope: Envelope, /) -> bool:
        """Publish `envelope` to the queue's dead letters, confirmed, then ack."""
        return await self.taker.settling.bury(self, envelope)

    def give_back(self) -> None:
        """Requeue the delivery, at the end of this loop turn."""
        self.taker.nack(self)


class Taker:
    """The channel of one logical queue: its consumers, and the delivery tags that aren't settled.

    `names` are the physical queues to consume: all of the logical queue's, but those that can't be consumed. Deliveries that come
    before `open` wait here. Until every consumer is registered, one that can't be would cost the connection, with the acks of
    whatever had been started.

    Acks are written once per loop turn: one `multiple` ack for the finished tags below the lowest unsettled one, and single
    acks above it, so that one long job doesn't hold back the acks of others. A `multiple` ack must name a tag that isn't
    acked yet: RabbitMQ answers an acked tag with a 406, which closes the channel.
    """

    def __init__(
        self,
        session: TakerSession,
        subscription: Subscription,
        names: Mapping[str, tuple[Priority, ...]],
        channel: Channel,
    ) -> None:
        self.queue = subscription.queue
        self.names = names
        self.mute: set[str] = set()
        """Physical queues in which the broker counts no consumer although one is registered: sick ones, as far as known."""
        self.consumers: Mapping[str, int] = {}
        """How many consumers each of these has, as the broker counted lately."""
        self.settling = session.settling
        self.live = True
        self._wanted = self._prefetch = min(subscription.prefetch, MOST_PREFETCH)
        self._session = session
        self._channel = channel
        self._early: list[RabbitDelivery] = []
        self._deliver: Callable[[RabbitDelivery], None] = self._early.append
        self._name = subscription.queue.name
        self._max_body_bytes = session.runtime.settings.max_body_bytes
        self._max_properties_bytes = max_delivered_bytes(session.connection.frame_max)
        self._consumer_tags: list[tuple[str, str]] = []
        """Each with its physical queue."""
        self._open: dict[int, str] = {}
        """Delivered, unsettled tags, each with its physical queue: at most as many as the windows hold, even while the oldest job runs for long."""
        self._lowest = 1
        """Every tag below this one is settled."""
        self._delivered = 0
        """The highest tag, when `progress` was last asked."""
        channel.progress = self.progress
        self._acks: list[int] = []
        self._nacks: list[int] = []
        self._wrote = False
        """Whether any settlement was written."""
        self._flushing = False
        self._withheld = False
        """Whether settlements wait for the end of a cancel."""
        self._held_bytes = 0
        self._largest = 0
        """The largest body since the prefetch was last computed, in bytes."""
        self._narrow_for = 0
        self._paused = False
        self._switching = asyncio.Lock()
        """Held while consumers are registered or cancelled: resuming in the middle of a pause would register them twice."""

    async def start(self, timeout_s: float, *, trial: bool = False) -> None:
        """Register a consumer on each physical queue, each with its own window; Sick names the queue that can't be consumed.

        A `trial` asks with a prefetch of 1 first: a consume that the broker carries out too late takes so many jobs with it.
        """
        async with self._switching:
            if trial:
                wanted, self._prefetch = self._prefetch, 1
                await self._register(timeout_s)
                self._prefetch = wanted
                await self._cancel()
            await self._register(timeout_s)

    def progress(self) -> int:
        """Return the highest tag that was delivered; asked now and then, so that no delivery pays for it."""
        self._delivered = max(self._delivered, self._lowest - 1, max(self._open, default=0))
        return self._delivered

    def open(self) -> None:
        """Pass on the deliveries that came so far, and from now on each at once; a worker that stops takes none."""
        self._deliver = self._session.sink.deliver if self._session.taking else self.nack
        for delivery in self._early:
            self._deliver(delivery)
        self._early.clear()

    def end(self) -> None:
        """Write the pending settlements, if the channel is open; nothing can be settled afterwards."""
        self._withheld = False
        self.flush()
        self.live = False

    def leave(self) -> None:
        """Close the channel without waiting for the answer; the broker delivers again what wasn't settled."""
        self._channel.on_closed = self._channel.on_cancelled = None
        if self._channel.closed is None:
            self._channel.leave()

    async def _register(self, timeout_s: float) -> None:
        for name in self.names:
            await self._channel.call(commands.Basic.Qos(prefetch_count=self._window(name)), timeout_s)
            # never the tag of an earlier consumer: the broker may still carry out what was asked for on a lost connection
            tag = f"{socket.gethostname()}.{os.getpid()}.{next(_SERIAL)}.{name}"[:255]
            try:
                await self._channel.consume(name, tag, self._taking(name), timeout_s)
            except TimeoutError:
                raise Sick(name, "RabbitMQ doesn't answer the consume") from None
            except Closed as closed:
                if closed.scope == "connection" and closed.code == INTERNAL_ERROR:  # which names no queue before 4.3
                    raise Sick(name, f"RabbitMQ closes the connection that asks: {closed.text}") from closed
                raise
            self._consumer_tags.append((tag, name))

    def _window(self, name: str) -> int:
        """Return the prefetch of a physical queue. Suspects come one at a time: what is delivered starts."""
        return self._prefetch if self.names[name] else 1

    def _taking(self, name: str) -> Callable[[int, bool, bytes, bytes], None]:
        """Return what takes the deliveries of a physical queue."""
        levels = self.names[name]
        if not levels:
            return partial(self._take_suspect, name)
        # also for a classic queue with one level: a foreign priority would name a level that has no binding
        return partial(self._take, name, levels[0] if len(levels) == 1 else None)

    async def stop(self) -> None:
        """Cancel the consumers, but not those of mute queues, which would end the connection; their deliveries can still be acked.

        What comes before the cancel's answer is passed on: the sink knows how to return a job without a mark.
        """
        async with self._switching:
            self._consumer_tags = [(tag, name) for tag, name in self._consumer_tags if name not in self.mute]
            await self._cancel()
        self._deliver = self.nack

    async def _cancel(self) -> None:
        """Cancel the consumers, after every delivery to them has come.

        A channel drops what a quorum queue delivers to a consumer that it has just cancelled, and the queue keeps those messages
        for it until the channel closes. So settlements, in whose place the queue delivers others, wait for the end of the cancel.
        While a window isn't full, others may be on their way: a basic.get, which is answered out of the queue's log, comes after them.
        """
        tags, self._consumer_tags = self._consumer_tags, []
        self.flush()
        self._withheld = True
        held = Counter(self._open.values())
        try:
            for tag, name in tags:
                if held[name] < self._window(name) and (self.queue.type == "quorum" or not self.names[name]):
                    # the channel may hand over the last settlements only after the first get (see `settled`), the second is behind them
                    for _ in range(2 if self.names[name] and self.queue.type == "quorum" else 1):
                        got = await self._channel.get(name, CLOSE_TIMEOUT_S)
                        if got is not None:
                            self._taking(name)(got.tag, got.redelivered, got.properties, got.body)
                await self._channel.cancel(tag, CLOSE_TIMEOUT_S)
        finally:
            self._withheld = False
            self.flush()

    async def settled(self) -> None:
        """Return once the broker has received every written settlement; nothing can be settled afterwards."""
        if self.queue.type == "quorum" and self._wrote:
            confirms = True
            for name, levels in self.names.items():
                if name in self.mute or not levels:  # a lone settlement, of a suspect, isn't held up
                    continue
                got = await settled(self._channel, name, CLOSE_TIMEOUT_S)
                if got is not None and not got.redelivered and confirms:
                    confirms = await self._put_back(got, levels[0])

    async def _put_back(self, got: Got, level: Priority) -> bool:
        """Publish a message again that was taken for its answer only: it would come back like one that killed its worker."""
        envelope, problem = from_job_queue(got.properties, got.body, self._name, level)
        if problem is None:
            deadline = time.monotonic() + CLOSE_TIMEOUT_S
            try:
                if not await self.settling.anew(self.queue, replace(envelope, deadline=deadline)):
                    return False
            except PublishError:
                return False
            self._channel.ack(got.tag, multiple=False)
        return True

    async def _pause(self) -> None:
        """Cancel the consumers until half of the held bytes are settled, then consume again with a prefetch that fits the bodies."""
        async with self._switching:
            # several deliveries may start a pause before the first one runs
            if self._paused or not self._consumer_tags:
                return
            held = self._held_bytes
            self._prefetch = min(self._prefetch, self._fitting())
            self._narrow_for = NARROW_FOR
            await self._cancel()
            logger.warning(
                "queue %s: %d MiB of unsettled bodies are held; consuming pauses, then continues with a prefetch of %d",
                self.queue.name,
                held >> 20,
                self._prefetch,
            )
            self._paused = True
        await self._resume()

    def _fitting(self) -> int:
        """Return the prefetch that fits the bodies delivered since the last call."""
        fitting = HELD_BYTES // 2 // max(1, self._largest * len(self.names))
        self._largest = 0
        return max(1, min(self._wanted, fitting))

    async def _widen(self) -> None:
        """Raise the prefetch again after a burst of large bodies: otherwise one burst would slow the queue down for days."""
        async with self._switching:
            if self._consumer_tags and not self._paused and (fitting := self._fitting()) > self._prefetch:
                await self._cancel()
                if not self._session.taking:
                    return
                self._prefetch = fitting
                await self._register(self._session.runtime.settings.connect_timeout_s)
                logger.info("queue %s: bodies are smaller again; raising the prefetch to %d", self.queue.name, fitting)
            self._narrow_for = NARROW_FOR if self._prefetch < self._wanted else 0

    async def _resume(self) -> None:
        async with self._switching:
            if self._paused and self._held_bytes <= HELD_BYTES // 2 and self._session.taking and self.live:
                self._paused = False
                await self._register(self._session.runtime.settings.connect_timeout_s)

    def _take(
        self, name: str, level: Priority | None, tag: int, redelivered: bool, properties: bytes, body: bytes
    ) -> None:
        if not self.live:
            return
        size = len(body)
        self._held_bytes += size
        if size > self._max_body_bytes or len(properties) > self._max_properties_bytes:
            self._reject(tag, properties, size)
            return
        envelope, problem = from_job_queue(properties, body, self._name, level)
        self._largest = max(self._largest, size)
        if self._held_bytes > HELD_BYTES and self._consumer_tags and not self._paused:
            self._session.spawn(self._pause())
        if self._narrow_for:
            self._narrow_for -= 1
            if not self._narrow_for:
                self._session.spawn(self._widen())
        self._open[tag] = name
        self._deliver(RabbitDelivery(self, tag, envelope, problem, redelivered))

    def _take_suspect(self, name: str, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        if not self.live:
            return
        envelope, problem = from_job_queue(properties, body, self._name, None)
        self._held_bytes += len(body)
        self._open[tag] = name
        self._deliver(RabbitDelivery(self, tag, envelope, problem, True, counted=not redelivered))

    def _reject(self, tag: int, properties: bytes, size: int) -> None:
        job_id = id_in(properties)
        logger.error(
            "%s from queue %s is too large to be published again: %s; RabbitMQ moves it to %s.dead",
            f"job {job_id}" if job_id else "a message without an id",
            self.queue.name,
            excess(len(properties), self._max_properties_bytes, size, self._max_body_bytes),
            self.queue.name,
        )
        self._channel.reject(tag)
        self._held_bytes -= size
        self._wrote = True

    def ack(self, delivery: RabbitDelivery) -> None:
        """Ack `delivery` at the end of this loop turn."""
        if self.live and (tag := delivery.tag) in self._open:
            del self._open[tag]
            self._acks.append(tag)
            self._held_bytes -= len(delivery.envelope.body)
            if not self._flushing:
                self._flush_soon()

    def nack(self, delivery: RabbitDelivery) -> None:
        """Requeue `delivery` at the end of this loop turn."""
        if self.live and (tag := delivery.tag) in self._open:
            del self._open[tag]
            self._nacks.append(tag)
            self._held_bytes -= len(delivery.envelope.body)
            self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._channel.connection.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write the settlements since the last flush."""
        self._flushing = False
        if not self.live or self._withheld or not (self._acks or self._nacks):
            return
        if self._paused and self._held_bytes <= HELD_BYTES // 2:
            self._session.spawn(self._resume())
        self._wrote = True
        channel, acks = self._channel, self._acks
        if self._nacks:
            for tag in self._nacks:
                channel.nack(tag)
            self._nacks.clear()
        if acks:
            acks.sort()
            top, held, lowest = acks[-1], self._open, self._lowest
            if held:
                while lowest not in held:  # each tag is passed only once in all
                    lowest += 1
            else:
                lowest = top + 1
            self._lowest = lowest
            if top < lowest:
                channel.ack(top, multiple=True)
            else:
                run = bisect(acks, lowest)
                if run:
                    channel.ack(acks[run - 1], multiple=True)
                for tag in acks[run:]:
                    channel.ack(tag, multiple=False)
            acks.clear()
        channel.connection.flush()
