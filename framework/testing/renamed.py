"""A broker whose queues have other names than the app's: each test has its own queues on a broker that tests share."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..broker import Broker, Consumption, Delivery, Features, PublisherState, Sink, Subscription
from ..envelope import Envelope
from ..job import Queue


class Names:
    """The names of one test's queues on the broker: a prefix, and a record of every queue that was used."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.used: dict[Queue, None] = {}
        """The broker's queues, in the order of their first use."""

    def of(self, queue: Queue) -> Queue:
        """Return the queue that stands for `queue` on the broker."""
        renamed = Queue(
            f"{self._prefix}.{queue.name}", type=queue.type, priorities=queue.priorities, expired=queue.expired
        )
        self.used[renamed] = None
        return renamed


def _to(queue: Queue, envelope: Envelope) -> Envelope:
    return msgspec.structs.replace(envelope, queue=queue.name)


class RenamedDelivery:
    """A delivery under the app's name of its queue."""

    def __init__(self, delivery: Delivery, queue: Queue) -> None:
        self._delivery = delivery
        self.queue = queue
        self.envelope = _to(queue, delivery.envelope)
        self.redelivered = delivery.redelivered
        self.counted = delivery.counted
        self.begin = delivery.begin
        self.problem = delivery.problem
        self.consumers = delivery.consumers
        self.done = delivery.done
        self.give_back = delivery.give_back

    @property
    def live(self) -> bool:
        """As `Delivery.live`."""
        return self._delivery.live

    async def again(self, envelope: Envelope, /) -> bool:
        """As `Delivery.again`."""
        return await self._delivery.again(_to(self._delivery.queue, envelope))

    async def bury(self, envelope: Envelope, /) -> bool:
        """As `Delivery.bury`."""
        return await self._delivery.bury(_to(self._delivery.queue, envelope))


class RenamedSink:
    """A sink that gets its deliveries under the app's names; `queues` has the app's queues by their names on the broker."""

    def __init__(self, sink: Sink, queues: dict[str, Queue]) -> None:
        self._sink = sink
        self._queues = queues
        self.lost = sink.lost
        self.queues_changed = sink.queues_changed

    def overdue(self, queue: str, limit_s: float | None) -> None:
        """As `Sink.overdue`."""
        self._sink.overdue(self._queues[queue].name, limit_s)

    def deliver(self, delivery: Delivery, /) -> None:
        """As `Sink.deliver`."""
        self._sink.deliver(RenamedDelivery(delivery, self._queues[delivery.queue.name]))


class RenamedBroker:
    """A `Broker` that renames the queues of another."""

    def __init__(self, broker: Broker, names: Names) -> None:
        self._broker = broker
        self._names = names
        self.close = broker.close

    def features(self, queue: Queue | None = None, /) -> Features:
        """As `Broker.features`."""
        return self._broker.features(queue)

    @property
    def publishing(self) -> PublisherState:
        """As `Broker.publishing`."""
        return self._broker.publishing

    def post(self, queue: Queue, envelope: Envelope) -> None:
        """Return None: this broker publishes only through `publish`."""

    async def publish(self, queue: Queue, envelope: Envelope) -> None:
        """As `Broker.publish`."""
        renamed = self._names.of(queue)
        await self._broker.publish(renamed, _to(renamed, envelope))

    async def consume(self, subscriptions: Sequence[Subscription], sink: Sink) -> Consumption:
        """As `Broker.consume`."""
        renamed = [Subscription(self._names.of(one.queue), one.prefetch) for one in subscriptions]
        queues = {new.queue.name: one.queue for new, one in zip(renamed, subscriptions, strict=True)}
        return await self._broker.consume(renamed, RenamedSink(sink, queues))
