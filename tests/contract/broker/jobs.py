"""Publishing jobs, and taking what is left of them."""

from __future__ import annotations

from leveret.broker import Broker, Delivery
from leveret.job import Queue
from tests.contract.harness import Harness, consume, make_envelope, soon, timed


async def publish(broker: Broker, queue: Queue, *bodies: bytes, delay_s: float = 0.0, **fields: object) -> None:
    """Publish one job a body, in order."""
    for body in bodies:
        await broker.publish(queue, timed(make_envelope(queue, body, **fields), soon(), delay_s=delay_s))


async def declare_delays(broker: Broker, harness: Harness) -> None:
    """Let the broker declare what delays need, which takes it up to a second on a loaded machine."""
    await publish(broker, harness.queue(), b"much later", delay_s=60)


async def rest_of(harness: Harness, queue: Queue, expected: int = 0) -> list[Delivery]:
    """Return what a new consumer gets out of `queue` at NORMAL: the `expected`, and any more before a marker; all of it done.

    The marker goes out once the expected are there, since what a broker takes back may take a moment.
    """
    broker = harness.open()
    consumption, sink = await consume(broker, queue, prefetch=expected + 100)
    deliveries = await sink.take(expected)
    await publish(broker, queue, b"marker")
    while (delivery := await sink.next()).envelope.body != b"marker":
        deliveries.append(delivery)
    for each in (*deliveries, delivery):
        each.done()
    await consumption.close()
    return deliveries


def bodies(deliveries: list[Delivery]) -> list[bytes]:
    """What is in them."""
    return [delivery.envelope.body for delivery in deliveries]
