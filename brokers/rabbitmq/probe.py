"""Leaving a node that is cut off from its cluster: it keeps its connections open, and neither confirms nor delivers anything.

The probe is a `basic.get` of an empty quorum queue, which only a node that reaches a majority answers. It is asked when a node
has neither delivered nor confirmed anything for a while. A node is left if its probe is silent twice and another node answers the
same probe: where all are silent, the cluster has lost its majority, and no node is better than another.
"""

from __future__ import annotations

import asyncio
import logging
import time

from leveret.errors import ConfigurationError
from leveret.runtime import Runtime

from . import topology
from .address import Address
from .channel import Channel
from .connection import Connection, connect
from .nodes import Nodes
from .session import FAULTS, ConnectionLost, declare

logger = logging.getLogger("leveret.rabbitmq")

QUIET_S = 2.5
"""A node is asked after so long without a delivery or a confirm."""
PATIENCE_S = 2.0
"""How long an answer is waited for; a healthy node takes 2 ms, and 6 s during an election."""
BACK_S = 5.0
"""How often a node that was left is asked whether it is back."""
_TICK_S = 0.5


class Probe:
    """Watches the nodes to which a program has connections, as long as it has any. For several addresses only."""

    def __init__(self, nodes: Nodes, runtime: Runtime) -> None:
        self._nodes = nodes
        self._name = f"leveret {runtime.app} probe"
        self._channels: dict[Address, Channel] = {}
        """The open connections of the probe, by node."""
        self._task: asyncio.Task[None] | None = None
        self._asked_back = 0.0

    def wake(self) -> None:
        """Begin to watch, unless this probe watches already or has failed."""
        if self._task is None or (self._task.done() and not self._task.cancelled() and self._task.exception() is None):
            self._task = asyncio.get_running_loop().create_task(self._run())
            self._task.add_done_callback(_check_ended)

    async def _run(self) -> None:
        progress: dict[Address, tuple[object, float]] = {}
        try:
            while used := self._nodes.used():
                await asyncio.sleep(_TICK_S)
                await self._ask_back()
                for address in used:
                    if address not in progress:  # declares the queue: during an election, that takes up to 15 s
                        await self._answers(address)
                    now, seen = time.monotonic(), self._progress(address)
                    before, since = progress.get(address, (None, now))
                    if seen != before:
                        progress[address] = (seen, now)
                    elif now - since >= QUIET_S:
                        await self._look_at(address)
                        progress[address] = (seen, time.monotonic())
        finally:
            self._drop_all()

    def _progress(self, address: Address) -> list[tuple[int, ...]]:
        return sorted(one.progress() for one in self._nodes.open if one.usable and one.address == address)

    async def _look_at(self, address: Address) -> None:
        """Leave a node whose probe is silent twice, if another node answers the same probe."""
        others = [other for other in self._nodes.addresses if other != address and other not in self._nodes.shunned]
        answers = await self._answers(address)
        while not answers and self._progress(address):  # a cluster without a majority is asked again and again
            answers, *elsewhere = await asyncio.gather(*(self._answers(node) for node in (address, *others)))
            ended = not self._progress(address)  # a minority that pauses itself ends its connections
            if not answers and any(elsewhere) and not ended:
                self._leave(address, others[elsewhere.index(True)])
                return

    def _leave(self, address: Address, other: Address) -> None:
        self._nodes.shunned.add(address)
        self._nodes.leave(address)
        left = [connection for connection in self._nodes.open if connection.usable and connection.address == address]
        logger.warning(
            "RabbitMQ at %s is cut off from its cluster: it doesn't say whether a queue is empty, and %s does; moving %d connections",
            address,
            other,
            len(left),
        )
        for connection in left:  # at once: beside an open connection, each publish that is sent again becomes a copy
            connection.abort("its node is cut off from the cluster")

    async def _ask_back(self) -> None:
        """Allow connections to a node again that answers the probe again."""
        if not self._nodes.shunned or time.monotonic() - self._asked_back < BACK_S:
            return
        self._asked_back = time.monotonic()
        for address in list(self._nodes.shunned):
            if await self._answers(address):
                self._nodes.shunned.discard(address)
                logger.info("RabbitMQ at %s is back in its cluster", address)

    async def _answers(self, address: Address) -> bool:
        """Return whether a node says that the probe's queue is empty. A connection that was silent is dropped."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                channel = self._channels.get(address)
                if channel is None or channel.closed is not None:
                    channel = self._channels[address] = await self._open(address)
                await channel.get(topology.PROBE, PATIENCE_S)
        except (ConnectionLost, UnicodeError, *FAULTS):
            self._drop(address)
            return False
        return True

    async def _open(self, address: Address) -> Channel:
        connection = await connect(address, self._name, PATIENCE_S)
        try:
            await declare(connection, topology.OF_PROBE, topology.PROBE, PATIENCE_S)
            return await connection.channel(PATIENCE_S)
        except BaseException:
            connection.abort()
            raise

    def _drop(self, address: Address) -> None:
        channel = self._channels.pop(address, None)
        if channel is not None and isinstance(connection := channel.connection, Connection):
            connection.abort()

    def _drop_all(self) -> None:
        for address in list(self._channels):
            self._drop(address)

    async def close(self) -> None:
        """End the probe and drop its connections."""
        task, self._task = self._task, None  # a connection that is opened meanwhile is watched by another task
        if task is not None:
            task.cancel()
            await asyncio.wait([task])


def _check_ended(task: asyncio.Task[None]) -> None:
    if task.cancelled() or (error := task.exception()) is None:
        return
    if isinstance(error, ConfigurationError):
        logger.warning("a node that is cut off from its cluster isn't left, since the probe isn't allowed: %s", error)
    else:
        logger.critical("a bug in leveret: a node that is cut off from its cluster isn't left", exc_info=error)
