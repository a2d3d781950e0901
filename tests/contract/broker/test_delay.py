"""A delayed job comes when it is due."""

from __future__ import annotations

import time

import pytest

from tests.contract.broker.jobs import bodies, declare_delays, publish
from tests.contract.harness import Harness, consume, soonest_s


@pytest.mark.parametrize("delay_s", [0.25, 0.8, 2.3])
async def test_a_delayed_job_comes_on_time(harness: Harness, delay_s: float) -> None:
    """Not before, because it was asked for; and at most 1.6 % and a second late."""
    broker, queue = harness.open(), harness.queue()
    _, sink = await consume(broker, queue)

    async def took_s() -> float:
        started = time.monotonic()
        await publish(broker, queue, b"later", delay_s=delay_s)
        confirmed = time.monotonic()
        await sink.next()
        arrived = time.monotonic()
        assert arrived - started >= delay_s
        return arrived - confirmed

    limit_s = delay_s * (1 + 1 / 64) + 1
    assert await soonest_s(took_s, limit_s) <= limit_s


async def test_a_short_delay_is_not_held_up_by_a_long_one(harness: Harness) -> None:
    """In a single queue of delayed jobs the one at the head blocks all behind it."""
    broker, queue = harness.open(), harness.queue()
    _, sink = await consume(broker, queue)
    await declare_delays(broker, harness)

    await publish(broker, queue, b"long", delay_s=2.0)
    await publish(broker, queue, b"short", delay_s=0.25)

    assert bodies(await sink.take(2)) == [b"short", b"long"]


async def test_a_delayed_job_survives_its_publisher(harness: Harness) -> None:
    """A delay kept in the publisher's memory is lost with it."""
    queue, publisher = harness.queue(), harness.open()
    await publish(publisher, queue, b"later", delay_s=0.5)
    await publisher.close()

    _, sink = await consume(harness.open(), queue)

    assert (await sink.next()).envelope.body == b"later"
