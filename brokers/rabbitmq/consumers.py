"""One consuming connection: a taker per queue, each of which comes and goes by itself, and a watchdog that counts their consumers."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec

from leveret.backoff import full_jitter
from leveret.broker import Sink, Subscription
from leveret.errors import ConfigurationError
from leveret.job import Priority
from leveret.runtime import Runtime

from . import topology
from .connection import Connection
from .nodes import Nodes
from .session import FAULTS, ConnectionLost, Sick, counts, declare, kind_of, reason_of
from .settling import Settling
from .taker import Taker
from .wire import CLOSE_TIMEOUT_S, Closed, check_open

logger = logging.getLogger("leveret.rabbitmq")

SICK_AFTER_S = 2.0
"""A consume that isn't answered for so long marks its queue as sick. A healthy one takes 2 to 10 ms."""
WATCH_S = 10.0
"""Seconds between two looks at the number of consumers that the broker counts."""
_CANCELLED = "the broker cancelled a consumer (the queue was deleted, or a delivery was held too long)"
_HELD_TOO_LONG = "RabbitMQ cancelled its consumer, because a delivery was held for longer than the consumer timeout"
_DELETED = "RabbitMQ cancelled its consumer, because the queue is gone"
_TIMED_OUT = re.compile(r"delivery acknowledgement on channel .* timed out(?:.*value used: (\d+) ms)?")


class Wanted(msgspec.Struct, frozen=True):
    """The physical queues to consume of a subscription."""

    subscription: Subscription
    names: Mapping[str, tuple[Priority, ...]]


class Home(msgspec.Struct, frozen=True):
    """What all connections of a consumption have in common."""

    nodes: Nodes
    runtime: Runtime
    sink: Sink
    settling: Settling
    changed: Callable[[], None]
    """Called when the state of a queue has changed."""
    known: set[str]
    """The queues that were consumed before, and so existed."""
    failed: Callable[[int], None]
    """Called after a try that the broker answered, and that failed, with the number of physical queues that it left without a consumer."""


class Consumers:
    """One consuming connection, from its start to its loss."""

    def __init__(self, home: Home, connection: Connection) -> None:
        self.home = home
        self.connection = connection
        self.runtime, self.sink, self.settling = home.runtime, home.sink, home.settling
        self.taking = True
        self.takers: dict[str, Taker] = {}
        """By queue: its taker."""
        self.failing: dict[str, str] = {}
        """By queue: why it has no taker now. Each is tried again."""
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Resolved with the reason."""
        self.sick: Sick | None = None
        """The queue that cost the connection."""
        self._made: dict[str, tuple[int, float]] = {}
        """By queue: which try it was that made its taker, and when."""
        self._tasks: set[asyncio.Task[None]] = set()

    def lose(self, reason: str, sick: Sick | None = None) -> None:
        """Give up the connection: its owner makes a new one."""
        if not self.lost.done():
            self.sick = sick
            self.lost.set_result(reason)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` as a task; if it fails for another reason than the end of its channel, the connection is lost."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not (isinstance(error, Closed) and error.scope == "channel"):  # its taker is made again
            self.lose(reason_of(error), error if isinstance(error, Sick) else None)

    async def start(
        self, wanted: Sequence[Wanted], *, patience_s: float = SICK_AFTER_S, trial: bool = False, first: bool = False
    ) -> None:
        """Declare every queue, register every consumer, and only then let deliveries through.

        Raises Sick for a queue that can't be consumed, which costs the connection. What concerns one queue alone is tried again
        later, except in the `first` start: there a queue that differs or isn't permitted raises ConfigurationError.
        """
        self.connection.on_closed = lambda why: self.lose(reason_of(why))
        ready: list[Wanted] = []
        broken: list[Wanted] = []
        for each in wanted:
            try:
                await self._declare(each)
            except ConfigurationError as error:
                if first:
                    raise
                self._fail(each, str(error))
                broken.append(each)
            except ConnectionLost as error:
                self._own_fault(error)
                self._fail(each, str(error))
                broken.append(each)
            else:
                ready.append(each)
        for each in ready:
            try:
                await self._register(each, patience_s, trial=trial)
            except Closed as closed:
                if closed.scope != "channel" or (first and kind_of(closed) == "refused"):
                    raise
                self._fail(each, reason_of(closed))
                broken.append(each)
        if self.lost.done():
            raise ConnectionLost(self.lost.result())
        for taker in list(self.takers.values()):
            self._open(taker)
        for each in broken:
            self.spawn(self._make(each, 1))
        self.spawn(self._watch())

    def _own_fault(self, error: ConnectionLost) -> None:
        """Raise `error` again unless it concerns one queue alone."""
        if not self.connection.usable or isinstance(error.__cause__, TimeoutError):
            raise error

    def _fail(self, each: Wanted, reason: str) -> None:
        self.failing[each.subscription.queue.name] = reason

    def _open(self, taker: Taker) -> None:
        self.home.known.add(taker.queue.name)
        taker.open()

    async def _declare(self, each: Wanted) -> None:
        """Declare a queue; on a cluster, one that this node doesn't know any more only if another node doesn't know it either."""
        queue, step_s = each.subscription.queue, self.runtime.settings.connect_timeout_s
        if self.home.nodes.cluster and queue.name in self.home.known:
            try:
                found = await counts(self.connection, each.names, step_s)
                gone = [name for name, there in found.items() if there is None]
                agreed = not gone or await self._others_agree(gone, step_s)
            except FAULTS as error:
                msg = f"queue {queue.name!r} couldn't be looked at: {reason_of(error)}"
                raise ConnectionLost(msg) from error
            if not agreed:
                msg = f"{', '.join(gone)} is gone on the node at {self.connection.address}, and no other node agrees"
                raise ConnectionLost(msg)
        await declare(self.connection, topology.SHARED + topology.of_queue(queue), queue.name, step_s)

    async def _others_agree(self, gone: Sequence[str], step_s: float) -> bool:
        """Return whether another node doesn't know the queues either. Behind one address, a new connection may reach another node."""
        nodes = self.home.nodes
        besides = self.connection.address if len(nodes.addresses) > 1 else None
        try:
            other = await nodes.connect(f"leveret {self.runtime.app} look", step_s, besides=besides)
        except (ConnectionLost, ConfigurationError):
            return False
        try:
            return not any((await counts(other, gone, step_s)).values())
        except FAULTS:
            return False
        finally:
            await other.close()

    async def _register(self, each: Wanted, patience_s: float, *, trial: bool = False) -> Taker:
        """Register the consumers of a queue on a new channel; `Closed` if the channel or one of its consumers ends meanwhile."""
        channel = await self.connection.channel(self.runtime.settings.connect_timeout_s)
        taker = Taker(self, each.subscription, each.names, channel)
        cancelled: list[str] = []
        channel.on_cancelled = cancelled.append
        await taker.start(patience_s, trial=trial)
        check_open(channel.closed)
        if cancelled:
            taker.leave()
            raise Closed("channel", 0, _CANCELLED)
        channel.on_closed = partial(self._channel_closed, each, taker)
        channel.on_cancelled = partial(self._cancelled, each, taker)
        self.takers[each.subscription.queue.name] = taker
        return taker

    def _channel_closed(self, each: Wanted, taker: Taker, why: Closed) -> None:
        if why.scope == "channel":
            timed_out = _TIMED_OUT.search(why.text)
            limit_s = int(timed_out[1]) / 1000 if timed_out and timed_out[1] else None
            reason = f"its channel was closed: {reason_of(why)}"
            self._drop(each, taker, reason, overdue=timed_out is not None, limit_s=limit_s)

    def _cancelled(self, each: Wanted, taker: Taker, _: str) -> None:
        self.spawn(self._drop_cancelled(each, taker))

    async def _drop_cancelled(self, each: Wanted, taker: Taker) -> None:
        """Give up a queue with a cancelled consumer.

        RabbitMQ 4.3 cancels a quorum queue's consumer that held a delivery too long, and counts it all the same. If it counts none,
        the queue was deleted: others still see such a queue for 50 ms.
        """
        reason = _CANCELLED
        with suppress(*FAULTS):
            found = await counts(self.connection, each.names, SICK_AFTER_S)
            if any(not counted or not (counted[1] or name in taker.mute) for name, counted in found.items()):
                reason = _DELETED
            elif each.subscription.queue.type == "quorum":
                reason = _HELD_TOO_LONG
        self._drop(each, taker, reason, overdue=reason is _HELD_TOO_LONG)

    def _drop(
        self, each: Wanted, taker: Taker, reason: str, *, overdue: bool = False, limit_s: float | None = None
    ) -> None:
        """Give up one queue's channel and make its taker again; the other queues' deliveries stay live."""
        name = each.subscription.queue.name
        if self.takers.get(name) is not taker or self.lost.done():
            return
        del self.takers[name]
        if overdue:
            self.sink.overdue(name, limit_s)
        taker.end()
        taker.leave()
        self._fail(each, reason)
        attempt, made = self._made.pop(name, (0, 0.0))
        self.sink.lost()
        self.home.changed()
        if self.taking:
            soon = time.monotonic() - made < self.runtime.settings.reconnect_cap_s
            self.spawn(self._make(each, attempt + 1 if soon else 1))

    async def _make(self, each: Wanted, attempt: int) -> None:
        """Make a queue's taker on this connection, with back-off; return once it consumes."""
        name, settings = each.subscription.queue.name, self.runtime.settings
        while True:
            await self.runtime.clock.sleep(
                full_jitter(
                    attempt, base_s=settings.reconnect_base_s, cap_s=settings.reconnect_cap_s, rng=self.runtime.rng
                )
            )
            attempt += 1
            if not self.taking:
                return
            try:
                await self._declare(each)
                taker = await self._register(each, SICK_AFTER_S)
            except ConfigurationError as error:
                reason = str(error)
                self.home.failed(len(each.names))
            except ConnectionLost as error:
                self._own_fault(error)
                reason = str(error)
            except Closed as closed:
                if closed.scope != "channel":
                    raise
                reason = reason_of(closed)
            else:
                self._made[name] = (attempt, time.monotonic())
                del self.failing[name]
                self._open(taker)
                self.home.changed()
                return
            if reason != self.failing[name]:
                self._fail(each, reason)
                self.home.changed()

    async def _watch(self) -> None:
        """Compare the registered consumers with those that the broker counts. Nothing is registered again because of a count.

        A count may be a moment late, so only the second look in a row without a consumer means anything.
        """
        before: set[str] = set()
        while True:
            with suppress(TimeoutError):
                counted = await self._counted(self.runtime.settings.connect_timeout_s)
                idle = {name for name, count in counted.items() if not count}
                for taker in self.takers.values():
                    taker.consumers = counted
                    mute = idle & before & taker.names.keys()
                    if mute != taker.mute:
                        taker.mute = mute
                        self.home.changed()
                before = idle
            await self.runtime.clock.sleep(WATCH_S)

    async def _counted(self, timeout_s: float) -> dict[str, int]:
        """Return the number of consumers of each physical queue that this connection consumes."""
        names = [name for taker in self.takers.values() for name in taker.names]
        found = await counts(self.connection, names, timeout_s)
        return {name: there[1] for name, there in found.items() if there is not None}

    def trouble(self, queue: str) -> str:
        """Return why `queue` isn't consumed here; empty if it is."""
        if queue in self.failing:
            return self.failing[queue]
        taker = self.takers.get(queue)
        if taker is not None and taker.mute:
            return f"RabbitMQ counts no consumer of {', '.join(sorted(taker.mute))}, where this worker has one"
        return ""

    async def stop(self) -> None:
        """Cancel the consumers; the deliveries can still be settled, and later ones are given back."""
        self.taking = False
        try:
            # the cancel of a sick queue's consumer would end the connection, and with it the acks of the running jobs
            counted = await self._counted(CLOSE_TIMEOUT_S)
            for taker in self.takers.values():
                taker.mute = {name for name in taker.names if counted.get(name) == 0}
            await asyncio.gather(*(taker.stop() for taker in self.takers.values()))
        except FAULTS as error:
            reason = reason_of(error)
            logger.warning(
                "RabbitMQ at %s: the consumers couldn't be cancelled, so the last acks may be lost: %s",
                self.connection.address,
                reason,
            )
            self.lose(f"its consumers couldn't be cancelled: {reason}")

    def end(self) -> None:
        """Write the pending settlements of channels that are still open; the other settlements are lost."""
        for taker in self.takers.values():
            taker.end()
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """After `end`: wait until the broker has every settlement, then disconnect; a dead peer delays this by seconds at most."""
        try:
            # a taker that fails (its queue was deleted) must not cut off the other takers' last acks
            takers = list(self.takers.values())
            for error in await asyncio.gather(*(taker.settled() for taker in takers), return_exceptions=True):
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
