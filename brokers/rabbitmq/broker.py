"""RabbitMQ 3.10 and later: a connection publishes, one settles (retries, burials), one consumes, so that what one waits for touches no other.

    publish ─► `publishing`: connection ─► topology declared ─► window ─► basic.publish ─► confirm
    queue ─► `consuming`: a channel a logical queue, a consumer a physical one ─► sink.deliver … done / again / bury / give_back ─► acks

The protocol is `amqp` and `frames`, what is declared `topology`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import msgspec

from leveret.broker import Consumption, Delivery, Features, Posted, Sink, Subscription
from leveret.envelope import Envelope
from leveret.errors import InvalidJob
from leveret.job import Priority, Queue
from leveret.runtime import Runtime

from . import topology
from .address import Address
from .consuming import RabbitConsumption, RabbitDelivery
from .properties import priority_property
from .publishing import Publishing, encoded
from .routes import Route


class RabbitBroker:
    """A broker on RabbitMQ; see `leveret.broker.Broker`."""

    def __init__(self, where: tuple[Address, ...], runtime: Runtime) -> None:
        self._where = where
        self._runtime = runtime
        self._publishing = Publishing(where, runtime, f"leveret {runtime.app} publish")
        self._settling = Publishing(where, runtime, f"leveret {runtime.app} settle")
        """For retries and burials: what handlers publish to a queue that confirms nothing holds them up on no connection of theirs."""
        self._consumptions: set[RabbitConsumption] = set()
        self._routes: dict[tuple[str, Priority], Route] = {}

    @property
    def features(self) -> Features:
        """What it promises."""
        return Features(durable=True, shared=True, counts_redelivery=True)

    async def publish(self, queue: Queue, envelope: Envelope, *, delay_s: float, deadline: float) -> None:
        """Return once the broker has confirmed it, persistent and routed."""
        await self._publishing.send(
            await self._routed(self._publishing, queue, envelope, delay_s, deadline), envelope, deadline
        )

    async def _routed(
        self, publishing: Publishing, queue: Queue, envelope: Envelope, delay_s: float, deadline: float
    ) -> Route:
        """Return the way to `queue`; of a delay, what is left once all that it needs is there."""
        route = self._delayed(queue, envelope, delay_s)
        if delay_s > 0 and not publishing.ready(route):
            encoded(route, envelope)  # what AMQP can't carry is refused at once, broker or not
            begun = time.monotonic()
            await publishing.prepare(route, envelope, deadline)
            # connecting, and declaring all that a delay needs, took a part of it
            route = self._delayed(queue, envelope, delay_s - (time.monotonic() - begun))
        return route

    def _delayed(self, queue: Queue, envelope: Envelope, delay_s: float) -> Route:
        if delay_s <= 0:
            return self._route(queue, envelope.priority)
        try:
            exchange, key = topology.route(queue, envelope.priority, delay_s)
        except ValueError as error:
            msg = f"{envelope.job} to queue {queue.name}: {error}"
            raise InvalidJob(msg, job_id=envelope.job_id) from None
        return Route(exchange, key, priority_property(queue, envelope.priority), queue, queue.type)

    def post(self, queue: Queue, envelope: Envelope, *, deadline: float) -> Posted | None:
        """Publish without a task, if the connection is there, the queue declared and the window open."""
        return self._publishing.post(self._route(queue, envelope.priority), envelope, deadline)

    def _route(self, queue: Queue, level: Priority) -> Route:
        known = self._routes.get((queue.name, level))
        if known is None or (known.queue is not queue and known.queue != queue):
            exchange, key = topology.route(queue, level, 0)
            known = self._routes[queue.name, level] = Route(
                exchange, key, priority_property(queue, level), queue, None, kept=True
            )
        return known

    async def consume(self, subscriptions: Sequence[Subscription], sink: Sink) -> Consumption:
        """Start to take; returns after the first try to connect."""
        consumption = RabbitConsumption(self._where, self._runtime, subscriptions, sink)
        await consumption.start()
        self._consumptions.add(consumption)
        return consumption

    def done(self, delivery: Delivery) -> None:
        """Ack it, at the end of this loop turn."""
        if isinstance(delivery, RabbitDelivery):
            delivery.taker.ack(delivery)

    async def again(self, delivery: Delivery, envelope: Envelope, *, delay_s: float, deadline: float) -> None:
        """Publish `envelope` to the delivery's queue, confirmed, then ack; no effect on a delivery that isn't live."""
        if isinstance(delivery, RabbitDelivery) and delivery.live:
            if delivery.instead is None:
                route = await self._routed(self._settling, delivery.queue, envelope, delay_s, deadline)
                await self._write_instead(delivery, route, envelope, deadline)
            await self._replaced(delivery, deadline)

    async def bury(self, delivery: Delivery, envelope: Envelope, *, deadline: float) -> None:
        """Publish it to the queue's dead letters, confirmed, then ack; no effect on a delivery that isn't live."""
        if isinstance(delivery, RabbitDelivery) and delivery.live:
            if delivery.instead is None:
                queue = delivery.queue
                buried = envelope if envelope.origin else msgspec.structs.replace(envelope, origin=queue.name)
                route = Route(topology.DEAD, queue.name, None, queue, None, topology.dead_queue(queue.name))
                await self._write_instead(delivery, route, buried, deadline)
            await self._replaced(delivery, deadline)

    async def _write_instead(self, delivery: RabbitDelivery, route: Route, envelope: Envelope, deadline: float) -> None:
        """Write what takes the place of `delivery`, where that is still ours: while a link was waited for, the broker may have it back."""
        link = await self._settling.linked(route, envelope, deadline)
        if delivery.live:
            delivery.instead = self._settling.write(link, route, envelope)

    async def _replaced(self, delivery: RabbitDelivery, deadline: float) -> None:
        """Ack `delivery` once what takes its place is confirmed.

        Where no confirm comes in time (a broker that blocks publishers), the next call waits for the same publish: each
        copy that is written runs.
        """
        publish = delivery.instead
        if publish is None:
            return
        try:
            async with asyncio.timeout_at(deadline):
                await publish.wait()
        except TimeoutError:
            raise publish.late() from None
        delivery.instead = None
        await publish
        self.done(delivery)

    def give_back(self, delivery: Delivery) -> None:
        """Requeue it, at the end of this loop turn."""
        if isinstance(delivery, RabbitDelivery):
            delivery.taker.nack(delivery)

    async def close(self) -> None:
        """End all connections."""
        for consumption in list(self._consumptions):
            await consumption.close()
        self._consumptions.clear()
        await asyncio.gather(self._publishing.close(), self._settling.close())
