"""The channel of one logical queue: its consumers, its windows, its deliveries, and which of them aren't settled."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from bisect import bisect
from collections.abc import Coroutine
from functools import partial
from typing import Any, Protocol

import msgspec
from pamqp import commands

from leveret.broker import Sink, Subscription
from leveret.envelope import Envelope
from leveret.job import Priority, Queue
from leveret.runtime import Runtime

from . import topology
from .channel import Channel
from .connection import Connection
from .properties import from_job_queue
from .publishing import Posting
from .session import settled
from .settling import Settling
from .wire import CLOSE_TIMEOUT_S

logger = logging.getLogger("leveret.rabbitmq")

HELD_BYTES = 64 << 20
"""Most bytes of unsettled bodies of a queue; above, its consumers are cancelled until half is settled."""
MOST_PREFETCH = 65_535
"""AMQP has two octets for it."""
NARROW_FOR = 1000
"""Deliveries after which a window that large bodies narrowed is fitted anew."""


class TakerSession(Protocol):
    """What a taker needs of the consuming session that it is part of."""

    @property
    def connection(self) -> Connection:
        """The connection of its channel."""
        ...

    @property
    def runtime(self) -> Runtime:
        """Settings and time."""
        ...

    @property
    def sink(self) -> Sink:
        """Where deliveries go."""
        ...

    @property
    def settling(self) -> Settling:
        """What publishes retries and burials."""
        ...

    @property
    def taking(self) -> bool:
        """Whether deliveries are still taken: False once the worker stops."""
        ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something on the connection; a failure of it loses the session."""
        ...


class RabbitDelivery(msgspec.Struct, eq=False, gc=False):
    """What a queue delivered; see `leveret.broker.Delivery`."""

    taker: Taker
    tag: int
    envelope: Envelope
    problem: str | None
    redelivered: bool
    instead: Posting | None = None
    """What was published to take its place, and isn't confirmed yet."""

    @property
    def queue(self) -> Queue:
        """The queue it came from."""
        return self.taker.queue

    @property
    def live(self) -> bool:
        """Whether its channel is open."""
        return self.taker.live

    def done(self) -> None:
        """Ack it, at the end of this loop turn."""
        self.taker.ack(self)

    async def again(self, envelope: Envelope, /) -> None:
        """Publish `envelope` to its queue, confirmed, then ack."""
        await self.taker.settling.again(self, envelope)

    async def bury(self, envelope: Envelope, /) -> None:
        """Publish `envelope` to the queue's dead letters, confirmed, then ack."""
        await self.taker.settling.bury(self, envelope)

    def give_back(self) -> None:
        """Requeue it, at the end of this loop turn."""
        self.taker.nack(self)


class Taker:
    """The channel of one logical queue: its consumers, and which of its delivery tags aren't settled.

    Acks are written once a loop turn: one `multiple` for the run of finished tags from the lowest unsettled one, single
    ones above a gap, so that one long job doesn't hold back the others'. A `multiple` must name a tag that isn't acked
    yet: one that is, is a 406 and costs the channel.
    """

    def __init__(self, session: TakerSession, subscription: Subscription, channel: Channel) -> None:
        self.queue = subscription.queue
        self.settling = session.settling
        self.live = True
        self._wanted = self._prefetch = min(subscription.prefetch, MOST_PREFETCH)
        self._session = session
        self._channel = channel
        self._deliver = session.sink.deliver
        self._name = subscription.queue.name
        self._max_body_bytes = session.runtime.settings.max_body_bytes
        self._max_properties_bytes = session.connection.max_properties_bytes * 3 // 4
        """A message with more can't be published again with what a retry adds."""
        self._consumer_tags: list[str] = []
        self._open: set[int] = set()
        """Tags that were delivered and aren't settled: no more than the windows hold, however long the oldest one runs."""
        self._lowest = 1
        """Every tag below is settled."""
        self._acks: list[int] = []
        self._nacks: list[int] = []
        self._wrote = False
        """Whether anything was ever settled here."""
        self._flushing = False
        self._held_bytes = 0
        self._largest = 0
        """Of the bodies since the window was last fitted."""
        self._narrow_for = 0
        self._generation = 0
        self._paused = False
        self._switching = asyncio.Lock()
        """Held while consumers are registered or cancelled: a resumption in the middle of a pause would double them."""

    async def start(self, timeout_s: float) -> None:
        """Register a consumer on each physical queue, each with the window of its own."""
        async with self._switching:
            await self._register(timeout_s)

    async def _register(self, timeout_s: float) -> None:
        await self._channel.call(commands.Basic.Qos(prefetch_count=self._prefetch), timeout_s)
        self._generation += 1
        for name, levels in topology.physicals(self.queue).items():
            # of a classic queue with one level, too: a foreign priority would name a level that nothing is bound for
            level = levels[0] if len(levels) == 1 else None
            tag = f"{socket.gethostname()}.{os.getpid()}.{self._generation}.{name}"[:255]
            await self._channel.consume(name, tag, partial(self._take, level), timeout_s)
            self._consumer_tags.append(tag)

    async def stop(self) -> None:
        """Cancel the consumers; what was delivered stays ackable."""
        async with self._switching:
            await self._cancel()

    async def _cancel(self) -> None:
        tags, self._consumer_tags = self._consumer_tags, []
        for tag in tags:
            await self._channel.cancel(tag, CLOSE_TIMEOUT_S)

    async def settled(self) -> None:
        """Return once the broker has all that was written; nothing can be settled after it."""
        if self.queue.type == "quorum" and self._wrote:
            await settled(self._channel, topology.physicals(self.queue), CLOSE_TIMEOUT_S)

    async def _pause(self) -> None:
        """Cancel the consumers until half of what is held is settled, then consume again with a window that fits the bodies."""
        async with self._switching:
            if self._paused or not self._consumer_tags:  # several deliveries may ask for it before it begins
                return
            held = self._held_bytes
            self._prefetch = min(self._prefetch, self._fitting())
            self._narrow_for = NARROW_FOR
            await self._cancel()
            logger.warning(
                "queue %s: %d MiB of unsettled bodies are held here; it goes on with a prefetch of %d",
                self.queue.name,
                held >> 20,
                self._prefetch,
            )
            self._paused = True
        await self._resume()

    def _fitting(self) -> int:
        """Return the prefetch that fits the bodies since the last look."""
        fitting = HELD_BYTES // 2 // max(1, self._largest * len(topology.physicals(self.queue)))
        self._largest = 0
        return max(1, min(self._wanted, fitting))

    async def _widen(self) -> None:
        """Take as much as was asked for again, once large bodies come no more: one burst of them must not slow a queue down for days."""
        async with self._switching:
            if self._consumer_tags and not self._paused and (fitting := self._fitting()) > self._prefetch:
                await self._cancel()
                if not self._session.taking:
                    return
                self._prefetch = fitting
                await self._register(self._session.runtime.settings.connect_timeout_s)
                logger.info(
                    "queue %s: its bodies are smaller again; it goes on with a prefetch of %d", self.queue.name, fitting
                )
            self._narrow_for = NARROW_FOR if self._prefetch < self._wanted else 0

    async def _resume(self) -> None:
        async with self._switching:
            if self._paused and self._held_bytes <= HELD_BYTES // 2 and self._session.taking and self.live:
                self._paused = False
                await self._register(self._session.runtime.settings.connect_timeout_s)

    def _take(self, level: Priority | None, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        if not self.live:
            return
        size = len(body)
        self._held_bytes += size
        if not self._session.taking:
            self._nacks.append(tag)
            self._held_bytes -= size
            self._flush_soon()
            return
        if size > self._max_body_bytes or len(properties) > self._max_properties_bytes:
            self._reject(tag, size)
            return
        envelope, problem = from_job_queue(properties, body, self._name, level)
        self._largest = max(self._largest, size)
        if self._held_bytes > HELD_BYTES and self._consumer_tags and not self._paused:
            self._session.spawn(self._pause())
        if self._narrow_for:
            self._narrow_for -= 1
            if not self._narrow_for:
                self._session.spawn(self._widen())
        self._open.add(tag)
        self._deliver(RabbitDelivery(self, tag, envelope, problem, redelivered))

    def _reject(self, tag: int, size: int) -> None:
        logger.error(
            "a message of %d bytes from queue %s is over the limits, so it can't be published again: RabbitMQ moves it to %s.dead",
            size,
            self.queue.name,
            self.queue.name,
        )
        self._channel.reject(tag)
        self._held_bytes -= size
        self._wrote = True

    def ack(self, delivery: RabbitDelivery) -> None:
        """Ack it at the end of this loop turn."""
        if self.live and (tag := delivery.tag) in self._open:
            self._open.remove(tag)
            self._acks.append(tag)
            self._held_bytes -= len(delivery.envelope.body)
            if not self._flushing:
                self._flush_soon()

    def nack(self, delivery: RabbitDelivery) -> None:
        """Requeue it at the end of this loop turn."""
        if self.live and (tag := delivery.tag) in self._open:
            self._open.remove(tag)
            self._nacks.append(tag)
            self._held_bytes -= len(delivery.envelope.body)
            self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._channel.connection.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what was settled since the last time."""
        self._flushing = False
        if not self.live or not (self._acks or self._nacks):
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
                while lowest not in held:  # each tag is passed once
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
