"""`Delivery.done`: the job is finished."""

from __future__ import annotations

import random
from collections import Counter

from leveret.broker import Delivery
from tests.contract.broker.jobs import bodies, publish, rest_of
from tests.contract.harness import Harness, consume


async def test_done_is_final(harness: Harness) -> None:
    """A job that comes back after its ack runs twice."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, b"1", b"2", b"3")

    consumption, sink = await consume(broker, queue)
    for delivery in await sink.take(3):
        delivery.done()
        assert delivery.problem is None
    await consumption.close()  # flushes

    assert await rest_of(harness, queue) == []


async def test_jobs_may_be_settled_in_any_order(harness: Harness) -> None:
    """Jobs end when they end: an ack too many costs the channel and all that is held, one too few runs a job twice."""
    broker, queue, chance = harness.open(), harness.queue(), random.Random(7)
    await publish(broker, queue, *(b"%d" % number for number in range(600)))

    consumption, sink = await consume(broker, queue, prefetch=50)
    held, ended, came = list[Delivery](), list[bytes](), 0
    while came < 600:
        held.append(await sink.next())
        came += 1
        while len(held) == 50 or (held and chance.random() < 0.4):
            delivery = held.pop(
                chance.randrange(1, len(held)) if len(held) > 1 and came < 500 else 0
            )  # the first is a long one
            ended.append(delivery.envelope.body)
            delivery.done()
    await consumption.close()

    assert sink.losses == 0
    assert Counter(bodies(await rest_of(harness, queue, len(held)))) == Counter(bodies(held))
    assert len(set(ended)) == 600 - len(held)
