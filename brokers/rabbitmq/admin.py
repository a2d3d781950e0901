"""Inspect and repair RabbitMQ's queues, on a separate connection that is opened at first use."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, TypeVar, cast

import msgspec
from pamqp import commands

from leveret.admin import DeadLetter, DeadLetters, Depth
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable, ConfigurationError, Unroutable
from leveret.job import LEVELS, Priority, Queue
from leveret.runtime import Runtime

from . import topology
from .channel import Channel
from .connection import Connection
from .nodes import Nodes
from .properties import from_dead_queue, max_delivered_bytes
from .publishing import Publishing
from .route import Route
from .session import FAULTS, ConnectionLost, kind_of, reason_of, settled
from .wire import Closed

_T = TypeVar("_T")
_STEP_S = 10.0
_PURGE_S = 60.0
_RETURN_S = 2.0


class RabbitAdmin:
    """Depths, purging and dead letters over AMQP alone; see `leveret.admin.Admin`.

    AMQP can't count the jobs that workers hold, nor the delayed jobs per queue. The admin doesn't rely on the app for a queue's
    type: a queue whose sibling `<queue>.high` exists is a quorum queue with levels.
    """

    def __init__(self, nodes: Nodes, runtime: Runtime) -> None:
        self._nodes = nodes
        self._name = f"leveret {runtime.app} admin"
        self.max_body_bytes = runtime.settings.max_body_bytes
        self._timeout_s = runtime.settings.connect_timeout_s
        self._publishing = Publishing(nodes, runtime, self._name)
        self._connection: Connection | None = None

    async def depths(self, queues: Sequence[Queue]) -> list[Depth]:
        """As `Admin.depths`, by passive declares."""
        return [await self._depth(queue.name) for queue in queues]

    async def _depth(self, name: str) -> Depth:
        counts = {level: await self.count(topology.sibling(name, level)) for level in LEVELS}
        dead = await self.count(topology.dead_queue(name))
        there = {level: count for level, count in counts.items() if count is not None}
        one = set(there) == {Priority.NORMAL}
        return Depth(
            queue=name,
            ready=sum(ready for ready, _ in there.values()),
            levels={"all" if one else level.value: ready for level, (ready, _) in there.items()},
            unsettled=None,
            delayed=None,
            dead=0 if dead is None else dead[0],
            # a worker has one consumer per sibling
            consumers=max((consumers for _, consumers in there.values()), default=0),
            exists=Priority.NORMAL in there,
        )

    async def delayed(self) -> int:
        """Count the jobs in the delay ladders, which all queues of the vhost share."""
        return sum([await self._on_channel(partial(_waiting, kind)) for kind in ("quorum", "classic")])

    async def purge(self, queue: Queue) -> int:
        """Delete the waiting jobs of all levels; return how many."""
        total = 0
        for level in LEVELS:
            name = topology.sibling(queue.name, level)
            if await self.count(name) is not None:
                total += await self._on_channel(partial(_purge, name))
        return total

    async def delete(self, queue: Queue) -> None:
        """Delete the queues of all levels and the dead letters, with their jobs; for `leveret.testing`. Delayed jobs end in `lv.lost`."""
        for name in (*(topology.sibling(queue.name, level) for level in LEVELS), topology.dead_queue(queue.name)):
            await self._on_channel(partial(_delete, name))

    async def count(self, name: str) -> tuple[int, int] | None:
        """Return the counts of ready messages and of consumers of a physical queue; None if the queue doesn't exist."""
        return await self._on_channel(partial(_count, name))

    async def _on_channel(self, use: Callable[[Channel], Awaitable[_T]]) -> _T:
        """Return the result of `use` on a new channel, since a 404 closes the channel."""

        async def work() -> _T:
            channel = await self.channel()
            result = await use(channel)
            await channel.close()
            return result

        return await self.step(work())

    async def step(self, work: Awaitable[_T]) -> _T:
        """Return the result of `work`; a connection's error is raised as one of leveret's errors."""
        try:
            return await work
        except ConnectionLost as error:
            raise BrokerUnavailable(str(error)) from error
        except FAULTS as error:
            if kind_of(error) == "refused":
                msg = f"RabbitMQ at {self._nodes} refuses access to user {self._nodes.addresses[0].user!r}: {reason_of(error)}"
                raise ConfigurationError(msg) from error
            raise BrokerUnavailable(f"RabbitMQ at {self._nodes}: {reason_of(error)}") from error

    async def channel(self) -> Channel:
        """Open a channel, on a new connection if the old one was lost."""
        if self._connection is None or not self._connection.usable:
            self._connection = await self._nodes.connect(self._name, self._timeout_s)
        return await self._connection.channel(_STEP_S)

    def dead(self, queue: Queue) -> AbstractAsyncContextManager[DeadLetters, None]:
        """As `Admin.dead`; empty if the queue has no dead-letter queue."""
        return cast("AbstractAsyncContextManager[DeadLetters, None]", self._dead(queue.name))

    @asynccontextmanager
    async def _dead(self, name: str) -> AsyncGenerator[RabbitDeadLetters]:
        queue = topology.dead_queue(name)
        found = await self.count(queue)
        count = 0 if found is None else found[0]
        channel = await self.step(self.channel())
        letters = RabbitDeadLetters(self, channel, name, count)
        try:
            yield letters
        finally:
            # The close returns unsettled letters to their places. A nack would reorder them: on 3.10, 012345 becomes 345012.
            await self.step(letters.close())
            if letters.open:
                await self._returned(queue, letters.open)

    async def _returned(self, queue: str, count: int) -> None:
        """Wait until a quorum queue has taken back the letters of a closed channel, so that the next reader sees them all."""
        ends = time.monotonic() + _RETURN_S
        while time.monotonic() < ends:
            found = await self.count(queue)
            if found is None or found[0] >= count:
                return
            await asyncio.sleep(0.02)

    async def replay(self, envelope: Envelope) -> None:
        """Publish `envelope` to its queue at its level, confirmed; only a classic queue gets the priority property."""
        name, level = envelope.queue, envelope.priority
        if await self.count(name) is None:
            msg = f"{envelope.job or 'a job'}: queue {name} doesn't exist; start its worker first"
            raise Unroutable(msg, job_id=envelope.job_id, queue=name)
        siblings = await self.count(topology.sibling(name, Priority.HIGH)) is not None
        priority = None if siblings else topology.PRIORITY_PROPERTY[level]
        again = msgspec.structs.replace(envelope, origin=None)
        route = Route(topology.JOBS, topology.job_key(name, level), priority, None, None, ends_at=name)
        await self._publishing.send(route, again, time.monotonic() + _STEP_S)

    async def close(self) -> None:
        """As `Admin.close`."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
        await self._publishing.close()


async def _purge(name: str, channel: Channel) -> int:
    answer: Any = await channel.call(commands.Queue.Purge(queue=name), _PURGE_S)
    return answer.message_count or 0


async def _delete(name: str, channel: Channel) -> None:
    await channel.call(commands.Queue.Delete(queue=name), _PURGE_S)


async def _count(name: str, channel: Channel) -> tuple[int, int] | None:
    try:
        answer: Any = await channel.call(commands.Queue.Declare(queue=name, passive=True), _STEP_S)
    except Closed as error:
        if error.code == 404:
            return None
        raise
    return answer.message_count or 0, answer.consumer_count or 0


async def _waiting(kind: str, channel: Channel) -> int:
    """Count the jobs in a delay ladder, by asking for all its queues at once; a ladder that was never declared holds none."""
    queues = [record.name for record in topology.of_ladder(kind) if isinstance(record, topology.PhysicalQueue)]
    counts = await asyncio.gather(*(_count(name, channel) for name in queues))
    return sum(found[0] for found in counts if found is not None)


class RabbitDeadLetter:
    """One buried job; see `leveret.admin.DeadLetter`."""

    __slots__ = ("envelope", "tag")

    def __init__(self, envelope: Envelope, tag: int) -> None:
        self.envelope = envelope
        self.tag = tag


class RabbitDeadLetters:
    """The dead letters of one queue, as many as at opening: a replayed job that fails again at once isn't read twice."""

    def __init__(self, admin: RabbitAdmin, channel: Channel, name: str, count: int) -> None:
        self._admin = admin
        self._channel = channel
        self._name = name
        self._left = count
        self._open: set[int] = set()
        self._dropped = False

    @property
    def open(self) -> int:
        """The number of letters that were read, but neither replayed nor dropped."""
        return len(self._open)

    async def __aiter__(self) -> AsyncIterator[DeadLetter]:
        while self._left > 0:
            self._left -= 1
            got = await self._admin.step(self._channel.get(topology.dead_queue(self._name), _STEP_S))
            if got is None:
                return
            self._open.add(got.tag)
            most_properties = max_delivered_bytes(self._channel.connection.frame_max)
            envelope, _ = from_dead_queue(
                got.properties, got.body, self._name, most_properties, self._admin.max_body_bytes
            )
            yield RabbitDeadLetter(envelope, got.tag)

    async def replay(self, letter: DeadLetter, envelope: Envelope) -> None:
        """Publish `envelope` to the queue that it came from, confirmed; then ack the letter."""
        self._held(letter)  # before the publish: a letter that can't be acked then would be replayed again
        await self._admin.replay(envelope)
        await self.drop(letter)

    async def drop(self, letter: DeadLetter) -> None:
        """Ack the letter, which deletes it."""
        tag = self._held(letter).tag
        self._channel.ack(tag, multiple=False)
        self._open.discard(tag)
        self._dropped = True

    def _held(self, letter: DeadLetter) -> RabbitDeadLetter:
        """Return the letter, or raise: it isn't one of RabbitMQ's, or the channel that it came on is closed."""
        if not isinstance(letter, RabbitDeadLetter):
            msg = f"replay() and drop() take a dead letter of RabbitMQ, not {letter!r}"
            raise TypeError(msg)
        if self._channel.closed is not None:
            msg = f"the channel to the dead letters of {self._name} is closed: {self._channel.closed}"
            raise BrokerUnavailable(msg)
        return letter

    async def close(self) -> None:
        """Close the channel, once the broker has received the drops; a dead-letter queue is always a quorum queue."""
        try:
            if self._dropped:
                await settled(self._channel, [topology.dead_queue(self._name)], _STEP_S)
        finally:
            await self._channel.close()
