"""The order of jobs, and the four levels."""

from __future__ import annotations

import pytest

from leveret.job import LEVELS, Priority
from tests.contract.broker.jobs import bodies, publish
from tests.contract.harness import Harness, consume


@pytest.mark.features(keeps_order=True)
async def test_jobs_of_one_level_come_in_the_order_of_their_publishes(harness: Harness) -> None:
    """Out of order, a fair queue becomes a lottery."""
    broker, queue = harness.open(), harness.queue()
    sent = [b"%d" % number for number in range(50)]

    await publish(broker, queue, *sent)
    _, sink = await consume(broker, queue)

    assert bodies(await sink.take(50)) == sent


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("delay_s", [0.0, 0.25])
async def test_a_level_is_kept(harness: Harness, level: Priority, delay_s: float) -> None:
    """A retry or replay goes back to its own level only if the level can be told from the delivery."""
    broker, queue = harness.open(), harness.queue()

    _, sink = await consume(broker, queue)
    await publish(broker, queue, b"x", priority=level, delay_s=delay_s)

    assert (await sink.next()).envelope.priority is level


async def test_a_queue_without_priorities_works(harness: Harness) -> None:
    """`Queue(priorities=False)` is one queue on the broker, not four."""
    broker, queue = harness.open(), harness.queue(priorities=False)

    _, sink = await consume(broker, queue)
    await publish(broker, queue, b"x")
    delivery = await sink.next()

    assert (delivery.queue, delivery.envelope.priority) == (queue, Priority.NORMAL)


@pytest.mark.features(window_per_level=True)
async def test_an_urgent_job_passes_full_windows_of_low_ones(harness: Harness) -> None:
    """Behind prefetched low jobs an urgent one waits for as long as they run."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, b"1", b"2", b"3", b"4", priority=Priority.LOW)

    _, sink = await consume(broker, queue, prefetch=2)
    await sink.take(2)
    await publish(broker, queue, b"now", priority=Priority.URGENT)

    assert (await sink.next()).envelope.body == b"now"


@pytest.mark.features(window_per_level=False)
async def test_the_most_urgent_job_that_waits_comes_first_where_levels_share_a_window(harness: Harness) -> None:
    """There the broker alone can put levels into their order."""
    broker, queue = harness.open(), harness.queue()
    for level in reversed(LEVELS):
        await publish(broker, queue, level.value.encode(), priority=level)

    _, sink = await consume(broker, queue, prefetch=1)
    order: list[bytes] = []
    for _ in LEVELS:
        delivery = await sink.next()
        order.append(delivery.envelope.body)
        delivery.done()

    assert order == [level.value.encode() for level in LEVELS]
