"""The consuming side of RabbitMQ: one supervised loop that connects, declares and consumes, and the queues that need their own connection.

A lost connection is replaced, with back-off. Unsettled deliveries are then no longer `live`: the broker delivers their jobs again.
A physical queue that can't be consumed is left out of the next connection, and tried on its own (`aside`). What one queue loses
otherwise (a channel, a consumer), it gets back on the same connection (`consumers`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any, NoReturn

from leveret.backoff import full_jitter
from leveret.broker import QueueState, Sink, Subscription
from leveret.errors import ConfigurationError, LeveretError
from leveret.runtime import Runtime

from . import topology
from .address import Address
from .aside import Aside
from .connection import Connection
from .consumers import Consumers, Home, Wanted
from .nodes import Nodes
from .session import FAULTS, ConnectionLost, Sick, kind_of, reason_of
from .settling import Settling
from .wire import CLOSE_TIMEOUT_S

logger = logging.getLogger("leveret.rabbitmq")

FRUITLESS_TRIES = 10
"""The consumption fails once the broker has answered, and no queue was consumed, in so many tries per physical queue."""
_TELL_EVERY_S = 60.0


class RabbitConsumption:
    """A running consumption: it connects, declares and consumes, and starts over when the connection is lost."""

    def __init__(
        self,
        nodes: Nodes,
        runtime: Runtime,
        subscriptions: Sequence[Subscription],
        sink: Sink,
        settling: Settling,
    ) -> None:
        self._nodes = nodes
        self._runtime = runtime
        self._subscriptions = tuple(subscriptions)
        self._sink = sink
        self._home = Home(nodes, runtime, sink, settling, self._changed, set(), self._tried_in_vain)
        self._main: Consumers | None = None
        """The connection that consumes every queue, except those aside."""
        self._asides: dict[str, Aside] = {}
        """By physical queue."""
        self._fruitless = 0
        self._supervisor: asyncio.Task[None] | None = None
        self._step: asyncio.Task[None] | None = None
        """The opening or closing of a connection that is under way: a stop waits for it instead of cutting it off."""
        self._failure: asyncio.Future[NoReturn] = asyncio.get_running_loop().create_future()
        self._failure.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        self._was_ready = False
        self._stopping = False
        self._told: tuple[str, float] = ("", 0.0)

    @property
    def queues(self) -> tuple[QueueState, ...]:
        """As `Consumption.queues`."""
        return tuple(self._state(subscription.queue.name) for subscription in self._subscriptions)

    def _state(self, name: str) -> QueueState:
        if self._stopping:
            return QueueState(name, "stopped")
        if self._main is None:
            return QueueState(name, "connecting", self._told[0])
        asides = [aside for aside in self._asides.values() if aside.wanted.subscription.queue.name == name]
        troubles = [self._main.trouble(name)]
        troubles += [aside.why or (aside.consumers.trouble(name) if aside.consumers else "") for aside in asides]
        why = "; ".join(trouble for trouble in troubles if trouble)
        return QueueState(name, "sick" if why else "consumed", why)

    def _changed(self) -> None:
        if any(state.name == "consumed" for state in self.queues):
            self._fruitless = 0
        self._sink.queues_changed()

    async def failed(self) -> None:
        """As `Consumption.failed`; a consumption that was ready once goes on trying all the same."""
        await asyncio.shield(self._failure)

    def _fail(self, error: BaseException) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)

    async def start(self) -> None:
        """Connect once, then supervise; ConfigurationError if waiting won't help."""
        try:
            await self._establish()
        except ConnectionLost as error:
            self._tell(str(error))
        except BaseException:
            await self._close_asides()
            raise
        self._supervisor = asyncio.create_task(self._supervise())
        self._supervisor.add_done_callback(self._check_ended)

    def _check_ended(self, task: asyncio.Task[None]) -> None:
        """Fail with the traceback of a bug: a worker without a supervisor would run for ever and take nothing."""
        if not task.cancelled() and (bug := task.exception()) is not None:
            self._fail(bug)

    async def _establish(self) -> None:
        """Connect and consume; each queue that can't be consumed costs a connection, and is left out of the next."""
        while True:
            connection = await self._nodes.connect(
                f"leveret {self._runtime.app} consume", self._runtime.settings.connect_timeout_s
            )
            main = Consumers(self._home, connection)
            try:
                await main.start(await self._wanted(), first=not self._was_ready)
            except BaseException as error:
                main.end()
                if isinstance(error, TimeoutError) or isinstance(error.__cause__, TimeoutError):
                    connection.abort()  # a silent peer wouldn't answer a close either
                await main.close()
                self._sink.lost()  # what was delivered, and comes back, killed nobody
                if isinstance(error, Sick):
                    self._set_aside(error)
                    continue
                if isinstance(error, FAULTS):
                    self._raise(error, connection.address)
                raise
            break
        self._told = ("", 0.0)
        self._main = main
        self._was_ready = True
        self._changed()

    async def _wanted(self) -> list[Wanted]:
        """Return what the main connection has to consume: all but what is aside. A queue whose own connection was lost comes back."""
        for name, aside in [(name, aside) for name, aside in self._asides.items() if aside.idle]:
            await aside.close()
            del self._asides[name]
        wanted: list[Wanted] = []
        for subscription in self._subscriptions:
            names = topology.consumed(subscription.queue)
            if left := {name: levels for name, levels in names.items() if name not in self._asides}:
                wanted.append(Wanted(subscription, left))
        return wanted

    def _set_aside(self, sick: Sick) -> None:
        for subscription in self._subscriptions:
            levels = topology.consumed(subscription.queue).get(sick.name)
            if levels is not None and sick.name not in self._asides:
                wanted = Wanted(subscription, {sick.name: levels})
                aside = self._asides[sick.name] = Aside(self._home, wanted, sick, self._connection)
                aside.ended.add_done_callback(self._check_ended)

    def _connection(self) -> Connection | None:
        return self._main.connection if self._main is not None else None

    def _tried_in_vain(self, queues: int) -> None:
        """Count a try to consume `queues` that the broker answered, and that failed; give up if none of all queues can be consumed.

        A refused declare is an answer. A refused login isn't: whoever checks logins for the broker may be down.
        """
        self._fruitless += queues
        names = [name for subscription in self._subscriptions for name in topology.consumed(subscription.queue)]
        consumed = any(state.name == "consumed" for state in self.queues)
        if not consumed and self._fruitless >= FRUITLESS_TRIES * len(names):
            msg = f"RabbitMQ at {self._nodes} answers, but none of the queues could be consumed in {FRUITLESS_TRIES} tries each"
            self._fail(LeveretError(msg))

    def _raise(self, error: BaseException, address: Address) -> NoReturn:
        if kind_of(error) == "refused":
            msg = f"RabbitMQ at {address} doesn't let user {address.user!r} consume: {reason_of(error)}"
            raise ConfigurationError(msg) from error
        raise ConnectionLost(f"RabbitMQ at {address}: {reason_of(error)}") from error

    async def _supervise(self) -> None:
        settings, attempt = self._runtime.settings, 1
        while True:
            if self._main is not None:
                since = time.monotonic()
                reason = await asyncio.shield(self._main.lost)
                await self._undisturbed(self._lost(self._main, reason))
                if time.monotonic() - since > settings.reconnect_base_s:  # a link that flaps is worth a try at once
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
                    self._fail(error)
                    return
                self._tell(str(error))
                await self._runtime.clock.sleep(settings.reconnect_cap_s)

    async def _undisturbed(self, step: Coroutine[Any, Any, None]) -> None:
        self._step = asyncio.create_task(step)
        # its exception is read here, since a stop may have cancelled the task that awaits it below
        self._step.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        await asyncio.shield(self._step)

    async def _lost(self, main: Consumers, reason: str) -> None:
        main.end()
        self._main = None
        if not main.connection.usable:
            self._nodes.leave(main.connection.address)
        if main.sick is not None:
            self._set_aside(main.sick)
        told = f"the consuming connection to RabbitMQ at {main.connection.address} is lost: {reason}"
        self._told = (told, time.monotonic())
        self._sink.lost()
        self._sink.queues_changed()
        await main.close()  # perhaps it is still open: the last acks must arrive

    def _tell(self, reason: str) -> None:
        """Log why the consumption waits: when the reason changes, and once a minute."""
        now = time.monotonic()
        if reason != self._told[0] or now - self._told[1] >= _TELL_EVERY_S:
            self._told = (reason, now)
            self._sink.queues_changed()
            logger.warning("waiting to consume: %s; trying again", reason)

    def _consumers(self) -> list[Consumers]:
        """Return every connection that consumes."""
        found = [self._main, *(aside.consumers for aside in self._asides.values())]
        return [consumers for consumers in found if consumers is not None]

    async def stop_taking(self) -> None:
        """Cancel the consumers; later deliveries are given back."""
        self._stopping = True
        if self._main is None:
            await self._end_supervisor()
        await asyncio.gather(*(consumers.stop() for consumers in self._consumers()))

    async def close(self) -> None:
        """End the supervisor, then the connections, in order."""
        self._stopping = True
        await self._end_supervisor()
        main, self._main = self._main, None
        await self._close_asides()
        if main is not None:
            main.end()
            await main.close()

    async def _close_asides(self) -> None:
        asides, self._asides = self._asides, {}
        await asyncio.gather(*(aside.close() for aside in asides.values()))

    async def _end_supervisor(self) -> None:
        if self._step is not None and not self._step.done():
            # A connection that is being opened may have delivered already; once all its consumers are registered, its jobs can be
            # settled. A connection that is being closed has its last acks to write.
            await asyncio.wait({self._step}, timeout=CLOSE_TIMEOUT_S)
        tasks = {task for task in (self._supervisor, self._step) if task is not None}
        self._supervisor = self._step = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
