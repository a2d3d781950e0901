"""`Consumption.queues`: whether each queue is consumed."""

from __future__ import annotations

import asyncio

import pytest

from tests.contract.broker.jobs import publish
from tests.contract.harness import PATIENCE_S, Harness, consume, ready


async def test_a_consumption_is_ready_once_its_consumers_are_registered(harness: Harness) -> None:
    """Readiness is what a deployment waits for before it stops the old workers."""
    broker, queue = harness.open(), harness.queue()
    consumption, sink = await consume(broker, queue)
    await publish(broker, queue, b"1")
    await sink.next()

    assert ready(consumption)


async def test_each_queue_has_a_state_and_a_sink_hears_of_its_changes(harness: Harness) -> None:
    """A worker that can't say which of its queues it consumes is found out only by the jobs that nobody runs."""
    queues = [harness.queue(), harness.queue()]
    consumption, sink = await consume(harness.open(), *queues)
    sink.follow(consumption)

    async with asyncio.timeout(PATIENCE_S):
        await sink.until(lambda: ready(consumption))
    assert [state.queue for state in consumption.queues] == [queue.name for queue in queues]
    await consumption.stop_taking()
    assert {state.name for state in consumption.queues} == {"stopped"}


@pytest.mark.features(connected=True)
async def test_a_lost_connection_is_told_as_a_state_with_its_reason(harness: Harness) -> None:
    """Without the gap a probe calls a worker ready that takes nothing; without the end of the gap it stays out of service."""
    consumption, sink = await consume(harness.open(), harness.queue())
    sink.follow(consumption)
    async with asyncio.timeout(PATIENCE_S):
        await sink.until(lambda: ready(consumption))
        harness.cut()
        await sink.until(lambda: any(state.name == "connecting" and state.why for state in sink.states))
        await sink.until(lambda: ready(consumption))

    assert sink.losses >= 1
    assert sink.states[-1].name == "consumed"
