"""The consuming side of RabbitMQ: one supervised loop that connects, declares, sets the windows and consumes, whole.

A lost connection, a closed channel or a cancelled consumer ends the whole consuming connection; it is made again whole,
with back-off. What was unsettled is then no longer `live`: the broker delivers it again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from bisect import bisect
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, NoReturn

import msgspec
from pamqp import commands

from leveret.backoff import full_jitter
from leveret.broker import Sink, Subscription
from leveret.envelope import Envelope
from leveret.errors import ConfigurationError
from leveret.job import Priority, Queue
from leveret.runtime import Runtime

from . import connection as amqp
from . import topology
from .address import Address
from .channel import Channel
from .properties import from_job_queue
from .publishing import Posting
from .session import FAULTS, ConnectionLost, connect, declare, kind_of, reason_of, settled
from .settling import Settling
from .wire import CLOSE_TIMEOUT_S, Closed

logger = logging.getLogger("leveret.rabbitmq")

HELD_BYTES = 64 << 20
"""Most bytes of unsettled bodies of a queue; above, its consumers are cancelled until half is settled."""
MOST_PREFETCH = 65_535
"""AMQP has two octets for it."""
NARROW_FOR = 1000
"""Deliveries after which a window that large bodies narrowed is fitted anew."""
_TELL_EVERY_S = 60.0


class RabbitDelivery(msgspec.Struct, eq=False, gc=False):
    """What a queue delivered; see `leveret.broker.Delivery`."""

    taker: _Taker
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


class _Taker:
    """The channel of one logical queue: its consumers, and which of its delivery tags aren't settled.

    Acks are written once a loop turn: one `multiple` for the run of finished tags from the lowest unsettled one, single
    ones above a gap, so that one long job doesn't hold back the others'. A `multiple` must name a tag that isn't acked
    yet: one that is, is a 406 and costs the channel.
    """

    def __init__(self, session: _Session, subscription: Subscription, channel: Channel) -> None:
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


class _Session:
    """One consuming connection from its start to its loss."""

    def __init__(self, connection: amqp.Connection, runtime: Runtime, sink: Sink, settling: Settling) -> None:
        self.connection = connection
        self.runtime = runtime
        self.sink = sink
        self.settling = settling
        self.taking = True
        self.takers: list[_Taker] = []
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Resolved with the reason."""
        self._tasks: set[asyncio.Task[None]] = set()

    def lose(self, reason: str) -> None:
        """It can't go on: the supervisor makes a new one."""
        if not self.lost.done():
            self.lost.set_result(reason)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something on the connection; its failure loses the session."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.lose(reason_of(error))

    async def start(self, subscriptions: Sequence[Subscription]) -> None:
        """Declare, set the windows and register every consumer: all or nothing."""
        step_s = self.runtime.settings.connect_timeout_s
        self.connection.on_closed = lambda why: self.lose(reason_of(why))
        for subscription in subscriptions:
            queue = subscription.queue
            await declare(self.connection, topology.SHARED + topology.of_queue(queue), queue.name, step_s)
        for subscription in subscriptions:
            name = subscription.queue.name
            channel = await self.connection.channel(step_s)
            taker = _Taker(self, subscription, channel)
            self.takers.append(taker)
            channel.on_closed = partial(self._channel_closed, name)
            channel.on_cancelled = partial(self._cancelled, name)
            await taker.start(step_s)

    def _channel_closed(self, name: str, why: Closed) -> None:
        self.lose(
            f"the channel of queue {name} was closed: {reason_of(why)}" if why.scope == "channel" else reason_of(why)
        )

    def _cancelled(self, name: str, _: str) -> None:
        self.lose(
            f"the broker cancelled a consumer of queue {name} (the queue was deleted, or a delivery was held too long)"
        )

    def end(self) -> None:
        """What is settled and not yet written is written where a channel is still open; the rest is lost."""
        for taker in self.takers:
            taker.flush()
            taker.live = False
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """After `end`: wait until the broker has all that was settled, and disconnect; a dead peer costs seconds, not for ever."""
        try:
            # one that fails (its queue was deleted) must not cut off the others' last acks
            for error in await asyncio.gather(*(taker.settled() for taker in self.takers), return_exceptions=True):
                if isinstance(error, FAULTS):
                    logger.warning(
                        "RabbitMQ at %s: the last acks may be lost, their jobs come again: %s",
                        self.connection.address,
                        reason_of(error),
                    )
                elif error is not None:
                    raise error
            await self.connection.close()
        finally:  # cancelled, too: an open connection that nobody has would keep what it was delivered
            self.connection.abort()


class RabbitConsumption:
    """A running consumption: connects, declares, consumes; and again, whole, when any of it is lost."""

    def __init__(
        self,
        where: tuple[Address, ...],
        runtime: Runtime,
        subscriptions: Sequence[Subscription],
        sink: Sink,
        settling: Settling,
    ) -> None:
        self._settling = settling
        self._where = where
        self._runtime = runtime
        self._subscriptions = tuple(subscriptions)
        self._sink = sink
        self._session: _Session | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._step: asyncio.Task[None] | None = None
        """A session that is being made, or closed: a stop waits for it rather than cut it off in the middle."""
        self._failure: asyncio.Future[NoReturn] = asyncio.get_running_loop().create_future()
        self._failure.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        self._was_ready = False
        self._stopping = False
        self._told: tuple[str, float] = ("", 0.0)

    @property
    def ready(self) -> bool:
        """Whether every consumer is registered now."""
        return self._session is not None and not self._session.lost.done()

    async def failed(self) -> None:
        """Wait until it can't go on, and raise why. Once it was ready, it goes on trying whatever comes."""
        await asyncio.shield(self._failure)

    async def start(self) -> None:
        """Try once, then supervise; ConfigurationError where waiting won't help."""
        try:
            await self._establish()
        except ConnectionLost as error:
            self._tell(str(error))
        self._supervisor = asyncio.create_task(self._supervise())
        self._supervisor.add_done_callback(self._supervised)

    def _supervised(self, supervisor: asyncio.Task[None]) -> None:
        """A worker that nobody connects again would run for ever and take nothing: let it end with the bug's traceback."""
        if not supervisor.cancelled() and (bug := supervisor.exception()) is not None and not self._failure.done():
            self._failure.set_exception(bug)

    async def _establish(self) -> None:
        connection = await connect(
            self._where, f"leveret {self._runtime.app} consume", self._runtime.settings.connect_timeout_s
        )
        session = _Session(connection, self._runtime, self._sink, self._settling)
        try:
            await session.start(self._subscriptions)
            if session.lost.done():
                raise ConnectionLost(session.lost.result())
        except BaseException as error:
            session.end()
            self._sink.lost()
            await session.close()  # not dropped: some consumers may have delivered, and what was acked must arrive
            if isinstance(error, FAULTS):
                self._raise(error, connection.address)
            raise
        if self._told[0]:
            logger.info(
                "RabbitMQ at %s: consuming again" if self._was_ready else "RabbitMQ at %s: consuming",
                connection.address,
            )
        self._told = ("", 0.0)
        self._session = session
        self._was_ready = True

    def _raise(self, error: BaseException, address: Address) -> NoReturn:
        if kind_of(error) == "refused":
            msg = f"RabbitMQ at {address} refuses user {address.user!r} to consume: {reason_of(error)}"
            raise ConfigurationError(msg) from error
        raise ConnectionLost(f"RabbitMQ at {address}: {reason_of(error)}") from error

    async def _supervise(self) -> None:
        settings, attempt = self._runtime.settings, 1
        while True:
            if self._session is not None:
                since = time.monotonic()
                reason = await asyncio.shield(self._session.lost)
                await self._undisturbed(self._lost(self._session, reason))
                if time.monotonic() - since > settings.reconnect_cap_s:
                    attempt = 1
                if self._stopping:
                    return
            await self._runtime.clock.sleep(
                full_jitter(
                    attempt, base_s=settings.reconnect_base_s, cap_s=settings.reconnect_cap_s, rng=self._runtime.rng
                )
            )
            attempt += 1
            try:
                await self._undisturbed(self._establish())
            except ConnectionLost as error:
                self._tell(str(error))
            except ConfigurationError as error:
                if not self._was_ready:  # the broker has come up, and says no
                    self._failure.set_exception(error)
                    return
                self._tell(str(error))
                await self._runtime.clock.sleep(settings.reconnect_cap_s)

    async def _undisturbed(self, step: Coroutine[Any, Any, None]) -> None:
        self._step = asyncio.create_task(step)
        self._step.add_done_callback(
            lambda ended: ended.cancelled() or ended.exception()
        )  # looked at, though a stop may have ended who waits
        await asyncio.shield(self._step)

    async def _lost(self, session: _Session, reason: str) -> None:
        session.end()
        self._session = None
        logger.warning("the consuming connection to RabbitMQ at %s is lost: %s", session.connection.address, reason)
        self._told = (reason, time.monotonic())
        self._sink.lost()
        await session.close()  # it may be one queue's channel that is lost: the others' last acks must arrive

    def _tell(self, reason: str) -> None:
        """Log what it waits for: when that changes, and once a minute."""
        now = time.monotonic()
        if reason != self._told[0] or now - self._told[1] >= _TELL_EVERY_S:
            self._told = (reason, now)
            logger.warning("waiting to consume: %s; trying again", reason)

    async def stop_taking(self) -> None:
        """Cancel the consumers; what still arrives is given back."""
        self._stopping = True
        if self._session is None:
            await self._end_supervisor()
        session = self._session
        if session is None:
            return
        session.taking = False
        try:
            await asyncio.gather(*(taker.stop() for taker in session.takers))
        except FAULTS as error:
            session.lose(f"its consumers couldn't be cancelled: {reason_of(error)}")

    async def close(self) -> None:
        """End the supervisor, then the session, in order."""
        self._stopping = True
        await self._end_supervisor()
        session, self._session = self._session, None
        if session is not None:
            session.end()
            await session.close()

    async def _end_supervisor(self) -> None:
        if self._step is not None and not self._step.done():
            # one that is made may have delivered already: what runs can be settled once all its consumers are registered.
            # One that is closed has last acks to see through.
            await asyncio.wait({self._step}, timeout=CLOSE_TIMEOUT_S)
        tasks = {task for task in (self._supervisor, self._step) if task is not None}
        self._supervisor = self._step = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
