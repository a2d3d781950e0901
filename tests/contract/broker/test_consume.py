"""`Broker.consume`: who gets which jobs, and how many."""

from __future__ import annotations

import asyncio

import pytest

from leveret.broker import Broker
from tests.contract.broker.jobs import bodies, publish
from tests.contract.harness import Harness, Recorder, consume


async def test_one_consumption_takes_from_several_queues(harness: Harness) -> None:
    """A worker that mixes up its queues runs one queue's handler on the other's job."""
    broker, first, second = harness.open(), harness.queue(), harness.queue()

    _, sink = await consume(broker, first, second)
    await publish(broker, first, b"first")
    await publish(broker, second, b"second")

    got = {delivery.envelope.body: (delivery.queue, delivery.envelope.queue) for delivery in await sink.take(2)}
    assert got == {b"first": (first, first.name), b"second": (second, second.name)}


@pytest.mark.features(keeps_order=True)
async def test_prefetch_bounds_what_is_held_and_done_opens_the_window(harness: Harness) -> None:
    """Without the bound one worker hoards the queue; if done doesn't open it, the worker stops after its first window."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, b"1", b"2", b"3", b"4")

    first, sink = await consume(broker, queue, prefetch=2)
    held = await sink.take(2)
    other = harness.open()
    _, other_sink = await consume(other, queue, prefetch=1)
    third = await other_sink.next()  # it would be the first's if its window weren't full
    held[0].done()
    fourth = await sink.next()

    assert bodies([*held, third, fourth]) == [b"1", b"2", b"3", b"4"]
    assert (sink.waiting, other_sink.waiting) == (0, 0)
    await first.close()


async def test_two_consumers_share_a_queue_and_no_job_comes_twice(harness: Harness) -> None:
    """Two workers on one queue is the normal case; a job given to both runs twice with nobody at fault."""
    queue, publisher = harness.queue(), harness.open()
    got: list[bytes] = []

    async def work(broker: Broker) -> None:
        _, sink = await consume(broker, queue, prefetch=5)
        while len(got) < 200:
            try:
                delivery = await sink.next(0.5)  # the other one may have had the last
            except TimeoutError:
                continue
            got.append(delivery.envelope.body)
            delivery.done()

    workers = asyncio.gather(work(harness.open()), work(harness.open()))
    await asyncio.gather(*(publish(publisher, queue, b"%d" % number) for number in range(200)))
    await asyncio.wait_for(workers, 60)

    assert sorted(got, key=int) == [b"%d" % number for number in range(200)]


async def test_a_sink_hears_only_of_its_own_consumption(harness: Harness) -> None:
    """Two workers in one program (two queues, two policies) must not run each other's jobs."""
    broker, first, second = harness.open(), harness.queue(), harness.queue()
    sinks = Recorder(), Recorder()
    await consume(broker, first, sink=sinks[0])
    await consume(broker, second, sink=sinks[1])

    await publish(broker, first, b"first")
    await publish(broker, second, b"second")

    assert (await sinks[0].next()).envelope.body == b"first"
    assert (await sinks[1].next()).envelope.body == b"second"
    assert (sinks[0].waiting, sinks[1].waiting) == (0, 0)
