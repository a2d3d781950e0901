"""Inspect and repair RabbitMQ's queues, on a separate connection that is opened at first use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from pamqp import commands

from leveret.admin import DeadLetters, Depth
from leveret.errors import BrokerUnavailable, ConfigurationError
from leveret.job import LEVELS, Priority, Queue
from leveret.runtime import Runtime

from . import topology
from .channel import Channel
from .connection import Connection
from .letters import RabbitDeadLetters
from .nodes import Nodes
from .publishing import Publishing
from .session import FAULTS, ConnectionLost, kind_of, reason_of
from .wire import Closed

_T = TypeVar("_T")
_STEP_S = 10.0
_PURGE_S = 60.0


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
        self.publishing = Publishing(nodes, runtime, self._name)
        self._connection: Connection | None = None

    async def depths(self, queues: Sequence[Queue]) -> list[Depth]:
        """As `Admin.depths`, by passive declares."""
        return [await self._depth(queue.name) for queue in queues]

    async def _depth(self, name: str) -> Depth:
        counts = {level: await self.count(topology.sibling(name, level)) for level in LEVELS}
        dead = await self.count(topology.dead_queue(name))
        suspects = (await self.count(topology.suspects_queue(name)) or (0, 0))[0]
        there = {level: count for level, count in counts.items() if count is not None}
        one = set(there) == {Priority.NORMAL}
        return Depth(
            queue=name,
            ready=sum(ready for ready, _ in there.values()) + suspects,
            levels={"all" if one else level.value: ready for level, (ready, _) in there.items()}
            | ({"suspects": suspects} if suspects else {}),
            unsettled=None,
            delayed=None,
            dead=0 if dead is None else dead[0],
            # a worker has one consumer per sibling
            consumers=max((consumers for _, consumers in there.values()), default=0),
            exists=Priority.NORMAL in there,
        )

    async def delayed(self) -> int:
        """Count the jobs in the delay ladders, which all queues of the vhost share."""
        return sum([await self._on_channel(partial(_waiting, names)) for names in topology.delay_queues()])

    async def notes(self) -> list[str]:
        """As `Admin.notes`; RabbitMQ says that in its management page."""
        return []

    async def purge(self, queue: Queue) -> int:
        """Delete the waiting jobs of all levels and the suspects; return how many."""
        total = 0
        for name in _holding(queue):
            if await self.count(name) is not None:
                total += await self._on_channel(partial(_purge, name))
        return total

    async def delete(self, queue: Queue) -> None:
        """Delete the queues of all levels and the dead letters, with their jobs; for `leveret.testing`. Delayed jobs end in `lv.lost`."""
        for name in (*_holding(queue), topology.dead_queue(queue.name)):
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
            self._connection = await self._connect()
        return await self._connection.channel(_STEP_S)

    async def _connect(self) -> Connection:
        return await self._nodes.connect(self._name, self._timeout_s)

    @asynccontextmanager
    async def dead(self, queue: Queue) -> AsyncGenerator[DeadLetters]:
        """As `Admin.dead`; empty if the queue has no dead-letter queue."""
        found = await self.count(topology.dead_queue(queue.name))
        count = 0 if found is None else found[0]
        letters = RabbitDeadLetters(self, await self.step(self._connect()), queue.name, count)
        try:
            yield letters
        finally:
            await self.step(letters.close())

    async def close(self) -> None:
        """As `Admin.close`."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
        await self.publishing.close()


def _holding(queue: Queue) -> list[str]:
    """Return every physical queue that may hold jobs of `queue`, whatever its type."""
    return [*(topology.sibling(queue.name, level) for level in LEVELS), topology.suspects_queue(queue.name)]


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


async def _waiting(names: tuple[str, ...], channel: Channel) -> int:
    """Count the jobs in the queues of a delay ladder, all asked at once.

    A queue that isn't there closes the channel, and ends the count: nobody has declared that queue yet, nor any after it.
    """
    counts = await asyncio.gather(*(_count(name, channel) for name in names))
    return sum(found[0] for found in counts if found is not None)
