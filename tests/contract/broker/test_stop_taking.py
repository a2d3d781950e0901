"""`Consumption.stop_taking`: no new jobs."""

from __future__ import annotations

import asyncio

import pytest

from leveret.broker import Delivery
from tests.contract.broker.jobs import bodies, publish
from tests.contract.harness import Harness, consume


async def test_no_job_is_held_for_a_consumer_that_has_been_cancelled(harness: Harness) -> None:
    """Jobs that take the place of those that have just ended: unseen, they would wait until the end of the worker, and then look like its killers."""
    broker, queue, jobs = harness.open(), harness.queue(), 200
    await asyncio.gather(*(publish(broker, queue, b"%d" % number) for number in range(jobs)))

    came: list[Delivery] = []
    while len(came) < jobs:
        consumption, sink = await consume(broker, queue, prefetch=20)
        held = await sink.take(min(20, jobs - len(came)))
        stop = asyncio.create_task(consumption.stop_taking())
        while not stop.done() or sink.waiting or held:  # a job ends in every turn of the loop
            held += await sink.take(sink.waiting)
            if held:
                came.append(held.pop())
                came[-1].done()
            await asyncio.sleep(0)
        await consumption.close()

    assert len(came) == jobs
    assert [delivery.envelope.body for delivery in came if delivery.redelivered] == []


@pytest.mark.features(keeps_order=True)
async def test_after_stop_taking_nothing_comes_and_what_is_held_can_be_settled(harness: Harness) -> None:
    """A drain that takes on new jobs never ends; one that can't ack the old ones repeats them."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, b"1", b"2", b"3", b"4")

    consumption, sink = await consume(broker, queue, prefetch=2)
    held = await sink.take(2)
    await consumption.stop_taking()
    for delivery in held:
        assert delivery.live
        delivery.done()
    _, other_sink = await consume(harness.open(), queue)
    others = await other_sink.take(2)

    assert bodies(others) == [b"3", b"4"]
    assert sink.waiting == 0
    await consumption.close()
