"""The consuming side of RabbitMQ: one supervised loop that connects, declares, sets the windows and consumes.

A lost connection, a closed channel or a cancelled consumer ends the whole consuming connection. The loop opens a new one,
with back-off. Unsettled deliveries are then no longer `live`: the broker delivers their jobs again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, NoReturn

from leveret.backoff import full_jitter
from leveret.broker import QueueState, Sink, Subscription
from leveret.errors import ConfigurationError
from leveret.runtime import Runtime

from . import topology
from .address import Address
from .connection import Connection
from .nodes import Nodes
from .session import FAULTS, ConnectionLost, declare, kind_of, reason_of
from .settling import Settling
from .taker import Taker
from .wire import CLOSE_TIMEOUT_S, Closed

logger = logging.getLogger("leveret.rabbitmq")

_TELL_EVERY_S = 60.0


class _Session:
    """One consuming connection from its start to its loss."""

    def __init__(self, connection: Connection, runtime: Runtime, sink: Sink, settling: Settling) -> None:
        self.connection = connection
        self.runtime = runtime
        self.sink = sink
        self.settling = settling
        self.taking = True
        self.takers: list[Taker] = []
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Resolved with the reason."""
        self._tasks: set[asyncio.Task[None]] = set()

    def lose(self, reason: str) -> None:
        """Give up the session: the supervisor makes a new one."""
        if not self.lost.done():
            self.lost.set_result(reason)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` as a task; if it fails, the session is lost."""
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
            taker = Taker(self, subscription, channel)
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
        """Write the pending settlements of channels that are still open; the other settlements are lost."""
        for taker in self.takers:
            taker.flush()
            taker.live = False
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """After `end`: wait until the broker has every settlement, then disconnect; a dead peer delays this by seconds at most."""
        try:
            # a taker that fails (its queue was deleted) must not cut off the other takers' last acks
            for error in await asyncio.gather(*(taker.settled() for taker in self.takers), return_exceptions=True):
                if isinstance(error, FAULTS):
                    logger.warning(
                        "RabbitMQ at %s: the last acks may be lost, and their jobs are then delivered again: %s",
                        self.connection.address,
                        reason_of(error),
                    )
                elif error is not None:
                    raise error
            await self.connection.close()
        finally:  # cancelled, too: an open connection without an owner would keep its deliveries
            self.connection.abort()


class RabbitConsumption:
    """A running consumption: it connects, declares and consumes, and starts over when any part is lost."""

    def __init__(
        self,
        nodes: Nodes,
        runtime: Runtime,
        subscriptions: Sequence[Subscription],
        sink: Sink,
        settling: Settling,
    ) -> None:
        self._settling = settling
        self._nodes = nodes
        self._runtime = runtime
        self._subscriptions = tuple(subscriptions)
        self._names = [subscription.queue.name for subscription in subscriptions]
        self._sink = sink
        self._session: _Session | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._step: asyncio.Task[None] | None = None
        """The opening or closing of a session that is under way: a stop waits for it instead of cutting it off."""
        self._failure: asyncio.Future[NoReturn] = asyncio.get_running_loop().create_future()
        self._failure.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        self._was_ready = False
        self._stopping = False
        self._told: tuple[str, float] = ("", 0.0)

    @property
    def queues(self) -> tuple[QueueState, ...]:
        """As `Consumption.queues`."""
        if self._stopping:
            return tuple(QueueState(name, "stopped") for name in self._names)
        if self._session is None:
            return tuple(QueueState(name, "connecting", self._told[0]) for name in self._names)
        return tuple(QueueState(name, "consumed") for name in self._names)

    async def failed(self) -> None:
        """As `Consumption.failed`; a consumption that was ready once never fails, but goes on trying."""
        await asyncio.shield(self._failure)

    async def start(self) -> None:
        """Connect once, then supervise; ConfigurationError if waiting won't help."""
        try:
            await self._establish()
        except ConnectionLost as error:
            self._tell(str(error))
        self._supervisor = asyncio.create_task(self._supervise())
        self._supervisor.add_done_callback(self._supervised)

    def _supervised(self, supervisor: asyncio.Task[None]) -> None:
        """Fail with the traceback of a bug: a worker without a supervisor would run for ever and take nothing."""
        if not supervisor.cancelled() and (bug := supervisor.exception()) is not None and not self._failure.done():
            self._failure.set_exception(bug)

    async def _establish(self) -> None:
        connection = await self._nodes.connect(
            f"leveret {self._runtime.app} consume", self._runtime.settings.connect_timeout_s
        )
        session = _Session(connection, self._runtime, self._sink, self._settling)
        try:
            await session.start(self._subscriptions)
            if session.lost.done():
                raise ConnectionLost(session.lost.result())
        except BaseException as error:
            session.end()
            self._sink.lost()
            await session.close()  # not `abort`: some consumers may have delivered already, and their acks must arrive
            if isinstance(error, FAULTS):
                self._raise(error, connection.address)
            raise
        self._told = ("", 0.0)
        self._session = session
        self._was_ready = True
        self._sink.queues_changed()

    def _raise(self, error: BaseException, address: Address) -> NoReturn:
        if kind_of(error) == "refused":
            msg = f"RabbitMQ at {address} doesn't let user {address.user!r} consume: {reason_of(error)}"
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
                if not self._was_ready:  # the first connection: waiting wouldn't help
                    self._failure.set_exception(error)
                    return
                self._tell(str(error))
                await self._runtime.clock.sleep(settings.reconnect_cap_s)

    async def _undisturbed(self, step: Coroutine[Any, Any, None]) -> None:
        self._step = asyncio.create_task(step)
        # its exception is read here, since a stop may have cancelled the task that awaits it below
        self._step.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        await asyncio.shield(self._step)

    async def _lost(self, session: _Session, reason: str) -> None:
        session.end()
        self._session = None
        self._nodes.leave(session.connection.address)
        self._told = (
            f"the consuming connection to RabbitMQ at {session.connection.address} is lost: {reason}",
            time.monotonic(),
        )
        self._sink.lost()
        self._sink.queues_changed()
        await session.close()  # perhaps only one channel is lost: the last acks of the other queues must arrive

    def _tell(self, reason: str) -> None:
        """Log why the consumption waits: when the reason changes, and once a minute."""
        now = time.monotonic()
        if reason != self._told[0] or now - self._told[1] >= _TELL_EVERY_S:
            self._told = (reason, now)
            logger.warning("waiting to consume: %s; trying again", reason)

    async def stop_taking(self) -> None:
        """Cancel the consumers; later deliveries are given back."""
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
            # A session that is being opened may have delivered already; once all its consumers are registered, its jobs can be
            # settled. A session that is being closed has its last acks to write.
            await asyncio.wait({self._step}, timeout=CLOSE_TIMEOUT_S)
        tasks = {task for task in (self._supervisor, self._step) if task is not None}
        self._supervisor = self._step = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
