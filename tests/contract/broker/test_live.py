"""`Delivery.live`: who lost a delivery has no effect on the job any more."""

from __future__ import annotations

import asyncio

import pytest

from tests.contract.broker.jobs import bodies, publish, rest_of
from tests.contract.harness import PATIENCE_S, Harness, consume, depth, soon, timed


async def test_a_settlement_has_no_effect_once_the_delivery_is_not_live(harness: Harness) -> None:
    """The job went back to its queue: acking it then would lose it, publishing it then would double it."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, b"1")

    consumption, sink = await consume(broker, queue)
    delivery = await sink.next()
    await consumption.close()
    delivery.done()
    delivery.give_back()
    await delivery.again(timed(delivery.envelope, soon()))
    await delivery.bury(timed(delivery.envelope, soon()))

    assert bodies(await rest_of(harness, queue, 1)) == [b"1"]
    assert (await depth(harness.admin(), queue)).dead == 0


@pytest.mark.features(connected=True)
async def test_what_a_lost_connection_held_is_not_live_and_comes_again(harness: Harness) -> None:
    """The broker gives it to another worker: who settles it here nevertheless must not touch the other's."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, b"1")

    consumption, sink = await consume(broker, queue)
    held = await sink.next()
    harness.cut()
    await asyncio.wait_for(sink.lost_once.wait(), PATIENCE_S)
    again = await sink.next()

    assert not held.live
    assert (again.envelope, again.live) == (held.envelope, True)
    if broker.features(queue).counts_redelivery:
        assert again.redelivered
    held.done()  # no effect
    again.done()
    await consumption.close()
    assert await rest_of(harness, queue) == []
