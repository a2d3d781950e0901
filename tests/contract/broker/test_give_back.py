"""`Delivery.give_back`: a job that wasn't started goes to another worker."""

from __future__ import annotations

import asyncio

from tests.contract.broker.jobs import bodies, publish, rest_of
from tests.contract.harness import Harness, consume


async def test_a_job_given_back_goes_to_another_consumer(harness: Harness) -> None:
    """At a shutdown what hasn't started must not wait for the process to end."""
    broker, other, queue = harness.open(), harness.open(), harness.queue()
    await publish(broker, queue, b"1")

    consumption, sink = await consume(broker, queue)
    delivery = await sink.next()
    await consumption.stop_taking()
    _, other_sink = await consume(other, queue)
    delivery.give_back()
    again = await other_sink.next()

    assert again.envelope == delivery.envelope


async def test_a_job_given_back_keeps_its_place(harness: Harness) -> None:
    """A stop gives back the jobs that a worker holds: at the end of the queue the oldest jobs would wait longest."""
    broker, queue = harness.open(), harness.queue()
    sent = [b"%d" % number for number in range(8)]
    await publish(broker, queue, *sent)

    consumption, sink = await consume(broker, queue, prefetch=6)
    held = await sink.take(6)
    await consumption.stop_taking()
    for number in (4, 1, 3):
        held[number].give_back()
        await asyncio.sleep(0.02)  # one settlement per loop turn, so that the broker sees this order
    await consumption.close()  # 0, 2 and 5 come back

    order = bodies(await rest_of(harness, queue, 8))
    if broker.features(queue).keeps_place:
        assert order == sent
    else:
        assert (sorted(order[:6]), order[6:]) == (sent[:6], sent[6:])
