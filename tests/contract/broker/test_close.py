"""`close`, of a consumption and of a broker: what isn't settled comes back."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from tests.contract.broker.jobs import bodies, publish, rest_of
from tests.contract.harness import PATIENCE_S, Harness, consume, ready


@pytest.mark.features(keeps_order=True)
async def test_what_was_not_settled_comes_back_in_its_order(harness: Harness) -> None:
    """A worker that ends in the middle of its jobs must lose none."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, b"1", b"2", b"3")

    consumption, sink = await consume(broker, queue)
    deliveries = await sink.take(3)
    deliveries[1].done()
    await consumption.close()

    assert not any(delivery.live for delivery in deliveries)
    rest = await rest_of(harness, queue, 2)
    assert bodies(rest) == [b"1", b"3"]
    if broker.features(queue).counts_redelivery:
        assert [delivery.redelivered for delivery in rest] == [True, True]


async def test_what_was_settled_just_before_the_close_stays_settled(harness: Harness) -> None:
    """A deploy stops workers at full speed: each ack that the broker forgets then is a job that runs twice."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, *(b"%d" % number for number in range(400)))

    consumption, sink = await consume(broker, queue, prefetch=400)
    deliveries = await sink.take(400)
    await consumption.stop_taking()
    for delivery in deliveries[1::2]:
        delivery.give_back()
    for delivery in deliveries[::2]:
        delivery.done()
    await consumption.close()

    assert Counter(bodies(await rest_of(harness, queue, 200))) == Counter(bodies(deliveries[1::2]))


async def test_closing_the_broker_returns_what_its_consumptions_hold(harness: Harness) -> None:
    """A program that closes only its broker must not leave jobs hanging until a lease or a heartbeat runs out."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, b"1")

    _, sink = await consume(broker, queue)
    await sink.next()
    await broker.close()

    assert bodies(await rest_of(harness, queue, 1)) == [b"1"]


async def test_closing_twice_is_closing_once(harness: Harness) -> None:
    """Clean-up code runs more than once; it must neither fail nor hang."""
    broker, queue = harness.open(), harness.queue()
    consumption, _ = await consume(broker, queue)

    async with asyncio.timeout(PATIENCE_S):
        await consumption.stop_taking()
        await consumption.close()
        await consumption.close()
        await broker.close()
        await broker.close()

    assert not ready(consumption)
