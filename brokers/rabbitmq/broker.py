"""RabbitMQ 3.10 and later: one connection publishes, one settles (retries, burials), one consumes, so that none waits for another.

    publish ─► `routing` ─► `publishing`: connection ─► topology declared ─► window ─► basic.publish ─► confirm
    queue ─► `consuming`: a channel per logical queue, a consumer per physical one ─► sink.deliver
    delivery.done, .give_back ─► acks, once per loop turn      delivery.again, .bury ─► `settling`: publish ─► confirm ─► ack

The protocol is in `connection`, `channel` and `frames`; exchanges, queues and bindings are in `topology`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from leveret.broker import Consumption, Features, Posted, PublisherState, Sink, Subscription
from leveret.envelope import Envelope
from leveret.job import Queue
from leveret.runtime import Runtime

from . import topology
from .consuming import RabbitConsumption
from .nodes import Nodes
from .probe import Probe
from .publishing import Publishing
from .routing import Routing
from .settling import Settling

_ANY = Queue("any")


class RabbitBroker:
    """A broker on RabbitMQ; see `leveret.broker.Broker`."""

    def __init__(self, nodes: Nodes, runtime: Runtime) -> None:
        self._nodes = nodes
        if nodes.watcher is None and len(nodes.addresses) > 1:
            nodes.watcher = Probe(nodes, runtime)
        self._runtime = runtime
        self._routes = Routing(runtime.clock)
        self._publishing = Publishing(nodes, runtime, f"leveret {runtime.app} publish")
        retrying, burying = (Publishing(nodes, runtime, f"leveret {runtime.app} {what}") for what in ("settle", "bury"))
        self._settling = Settling(retrying, burying, self._routes)
        self._consumptions: set[RabbitConsumption] = set()

    def features(self, queue: Queue | None = None, /) -> Features:
        """As `Broker.features`; a classic queue holds all levels in one physical queue, with one window.

        A quorum queue puts returned jobs ahead of all others, but not back into their order (measured on 3.10.8).
        """
        queue = queue or _ANY
        return Features(
            durable=True,
            shared=True,
            counts_redelivery=True,
            connected=True,
            queue_type=queue.type,
            keeps_order=True,
            keeps_place=queue.type == "classic",
            window_per_level=queue.type == "quorum",
            deletable=True,
            bounds_headers=True,
            held_at_most_s=min(address.consumer_timeout_s for address in self._nodes.addresses),
            physical=(*topology.consumed(queue), topology.dead_queue(queue.name)),
        )

    @property
    def publishing(self) -> PublisherState:
        """As `Broker.publishing`."""
        return self._publishing.state

    async def publish(self, queue: Queue, envelope: Envelope) -> None:
        """As `Broker.publish`: return once RabbitMQ has confirmed the job, persistent and routed."""
        route = await self._routes.ready(queue, envelope, self._publishing)
        await self._publishing.send(route, envelope, envelope.deadline)

    def post(self, queue: Queue, envelope: Envelope) -> Posted | None:
        """As `Broker.post`; None unless the connection is open, the queue is declared and the window has room."""
        route = self._routes.level(queue, envelope.priority)
        return self._publishing.post(route, envelope, envelope.deadline)

    async def consume(self, subscriptions: Sequence[Subscription], sink: Sink) -> Consumption:
        """As `Broker.consume`; returns after the first attempt to connect."""
        consumption = RabbitConsumption(self._nodes, self._runtime, subscriptions, sink, self._settling)
        await consumption.start()
        self._consumptions.add(consumption)
        return consumption

    async def close(self) -> None:
        """As `Broker.close`."""
        for consumption in list(self._consumptions):
            await consumption.close()
        self._consumptions.clear()
        await asyncio.gather(self._publishing.close(), self._settling.close())
        if self._nodes.watcher is not None and not self._nodes.used():
            await self._nodes.watcher.close()
