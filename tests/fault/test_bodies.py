"""Bodies of every size on one queue, among small jobs."""

import os
import uuid

import pytest

from leveret.broker import Subscription
from leveret.brokers.rabbitmq import open_broker
from leveret.job import Queue
from leveret.runtime import Runtime
from tests.contract.harness import Recorder, make_envelope, soon, timed
from tests.rabbit.node import Rabbit

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

FRAME = 131_072 - 8
SIZES = (0, 1, FRAME - 1, FRAME, FRAME + 1, 1 << 20, 15 << 20)


@pytest.mark.versions
async def test_bodies_of_every_size_arrive_whole_and_in_order_among_small_ones(rabbit: Rabbit) -> None:
    """R36: an octet too few at the end of a frame, and each job behind it is read out of the body before."""
    broker = open_broker(rabbit.url, Runtime(app="bodies"))
    queue = Queue(f"body-{uuid.uuid4().hex[:12]}", priorities=False)
    bodies: list[bytes] = []
    for size in SIZES:
        bodies += [b"small %d" % number for number in range(len(bodies), len(bodies) + 30)]
        bodies.append(os.urandom(size))
    sink = Recorder()
    try:
        await broker.consume([Subscription(queue, 500)], sink)
        for body in bodies:
            await broker.publish(queue, timed(make_envelope(queue, body), soon()))
        came = await sink.take(len(bodies))
        for delivery in came:
            delivery.done()
    finally:
        await broker.close()

    assert [delivery.envelope.body for delivery in came] == bodies
