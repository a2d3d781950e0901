"""RabbitMQ: queues of a node, filled by copies of a message that the contestant published."""

from __future__ import annotations

import asyncio
from functools import cached_property

from pamqp.commands import Basic

from benchmarks.peers.contestants import Contestant, queue
from benchmarks.peers.fill import Wire
from benchmarks.peers.harness import publish
from benchmarks.peers.servers import Queue, Running
from tests.rabbit.node import Node, Rabbit, find_rabbit
from tests.rabbit.raw import connect


class RabbitQueue(Queue):
    """A contestant's queue, and what it declares beside it."""

    def __init__(self, url: str, contestant: Contestant, kind: str) -> None:
        super().__init__(url, queue(contestant, kind))
        self._contestant = contestant
        self._kind = kind
        self._templates: dict[int, tuple[Basic.Properties, bytes]] = {}

    def count(self) -> int:
        """As `Queue.count`: the messages that are ready."""

        async def ask() -> int | None:
            async with connect(self.url) as raw:
                return await raw.count(self.name)

        return asyncio.run(ask()) or 0

    def clear(self) -> None:
        """As `Queue.clear`."""

        async def do() -> None:
            async with connect(self.url) as raw:
                if await raw.count(self.name) is not None:
                    async with raw.channel() as channel:
                        await channel.queue_purge(self.name)

        asyncio.run(do())

    def fill(self, jobs: int, size: int = 200) -> None:
        """As `Queue.fill`."""
        if size not in self._templates:
            self.clear()
            publish(self._contestant, self.url, self._kind, "one", 1, size=size)
            self.expect(1)
            self._templates[size] = asyncio.run(self._take())
        wire = Wire(self.url)
        wire.fill(self.name, *self._templates[size], jobs)
        wire.close()

    async def _take(self) -> tuple[Basic.Properties, bytes]:
        async with connect(self.url) as raw:
            (found,) = await raw.take_all(self.name)
            # what the queue adds to a message that it gives out isn't there when it is first delivered
            headers = found.properties.headers or {}
            found.properties.headers = {
                key: value for key, value in headers.items() if key != "x-delivery-count"
            } or None
            return found.properties, found.body

    def delete(self) -> None:
        """As `Queue.delete`."""

        async def do() -> None:
            async with connect(self.url) as raw:
                for ending in ("", *self._contestant.queues):
                    await raw.delete(self.name + ending)
                await raw.delete_exchange(self.name)

        asyncio.run(do())


class RabbitMQ(Running):
    """A node of the tests, or the broker of LEVERET_TEST_AMQP."""

    def __init__(self, node: Rabbit) -> None:
        super().__init__(node.url, ours=isinstance(node, Node))
        self._node = node

    @cached_property
    def version(self) -> str:
        """As `Running.version`."""
        wire = Wire(self.url)
        wire.close()
        return str(wire.server["version"])

    def _queue(self, contestant: Contestant, kind: str) -> RabbitQueue:
        return RabbitQueue(self.url, contestant, kind)

    def _stop(self) -> None:
        asyncio.run(self._node.close())


def start() -> RabbitMQ:
    """Find a node, or start one; raises Unavailable where there is none."""
    found = find_rabbit()
    node = found if isinstance(found, Rabbit) else Node(found)
    if isinstance(node, Node):
        asyncio.run(node.start())
    return RabbitMQ(node)
