"""`Broker.publish`: a job arrives as it was sent, or the publisher hears of it in time."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter

import msgspec
import pytest

from leveret.envelope import MSGPACK
from leveret.errors import BrokerUnavailable, PublishTimeout, Unroutable
from leveret.failure import Failure
from leveret.job import Priority
from tests.contract.broker.jobs import bodies, publish, rest_of
from tests.contract.harness import PATIENCE_S, Harness, consume, make_envelope, received, soon, timed


async def test_every_field_of_an_envelope_arrives_as_it_was_sent(harness: Harness) -> None:
    """A field that a broker drops or changes is a retry count, a tenant or a trace lost."""
    broker, queue = harness.open(), harness.queue()
    sent = make_envelope(
        queue,
        b"\x81\xa1n\x01",
        priority=Priority.HIGH,
        content_type=MSGPACK,
        correlation_id="the-first-one",
        reply_to="answers",
        headers={
            "x-tenant-id": "Zoë",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "small": 7,
            "large": (1 << 63) - 1,
            "negative": -(1 << 63),
            "ratio": 0.1,
            "yes": True,
            "no": False,
            "empty": "",
        },
        attempt=3,
        passes=5,
        version=2,
        first_seen_ms=1_800_000_000_123,
        due_ms=1_700_000_000_456,
        expires_at_ms=4_000_000_000_000,
        unknown_since_ms=1_800_000_000_789,
        strangers="0a1b2c3d,4e5f6071",
        bury_since_ms=1_800_000_000_790,
        errors=msgspec.json.encode([Failure(attempt=1, at_ms=1, host="h", error="ValueError", message="mé")]).decode(),
    )

    _, sink = await consume(broker, queue)
    await broker.publish(queue, timed(sent, soon()))
    delivery = await sink.next()

    assert delivery.envelope == sent
    assert {name: type(value) for name, value in delivery.envelope.headers.items()} == {
        name: type(value) for name, value in sent.headers.items()
    }
    assert (delivery.queue, delivery.redelivered, delivery.problem, delivery.live) == (queue, False, None, True)


async def test_what_belongs_to_one_publish_is_not_sent(harness: Harness) -> None:
    """A deadline of this process's clock, or the cause of one republication, means nothing on the other side."""
    broker, queue = harness.open(), harness.queue()
    sent = make_envelope(queue, cause="retry", deadline=soon())

    _, sink = await consume(broker, queue)
    await broker.publish(queue, timed(sent, soon()))

    assert (await sink.next()).envelope == received(sent)


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", bytes(range(256)), os.urandom(1 << 20)],
    ids=["empty", "small", "every byte", "1 MiB of random bytes"],
)
async def test_a_body_arrives_byte_for_byte(harness: Harness, body: bytes) -> None:
    """A body that a broker touches can't be decoded, and can't be shown as it came."""
    broker, queue = harness.open(), harness.queue()

    await publish(broker, queue, body)
    _, sink = await consume(broker, queue)

    assert (await sink.next()).envelope.body == body


async def test_a_job_published_before_anybody_consumes_waits(harness: Harness) -> None:
    """A service may publish before its first worker was ever started."""
    queue = harness.queue()
    publisher = harness.open()
    await publish(publisher, queue, b"early")
    await publisher.close()

    _, sink = await consume(harness.open(), queue)

    assert (await sink.next()).envelope.body == b"early"


async def test_a_thousand_publishes_at_once_all_arrive_once(harness: Harness) -> None:
    """Confirms that are matched to the wrong publish show only under load."""
    broker, queue = harness.open(), harness.queue()
    sent = [make_envelope(queue, b"%d" % number) for number in range(1000)]

    await asyncio.gather(*(broker.publish(queue, timed(each, soon(60))) for each in sent))
    _, sink = await consume(broker, queue, prefetch=2000)
    got = Counter(delivery.envelope.job_id for delivery in await sink.take(1000))

    assert got == Counter(each.job_id for each in sent)
    assert sink.waiting == 0


async def test_a_publish_that_cannot_be_confirmed_is_a_documented_error_by_its_deadline(harness: Harness) -> None:
    """A publisher that hangs, or gets its client library's CancelledError, takes its web service down with it."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, b"before")  # connected

    await harness.break_publishing()
    started = time.monotonic()
    with pytest.raises((BrokerUnavailable, PublishTimeout)) as raised:
        await broker.publish(queue, timed(sent := make_envelope(queue), started + 1))
    took_s = time.monotonic() - started

    assert took_s < 2
    assert raised.value.job_id == sent.job_id
    await harness.heal()
    await publish(broker, queue, b"after")
    assert {b"before", b"after"} <= set(bodies(await rest_of(harness, queue, 2)))


async def test_a_cancelled_publish_ends_and_the_broker_goes_on(harness: Harness) -> None:
    """A request that is cut off must not hang, nor take the connection that others publish on with it."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, b"before")

    await harness.break_publishing()
    task = asyncio.create_task(broker.publish(queue, timed(make_envelope(queue), soon())))
    await asyncio.sleep(0)  # it has begun
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, PATIENCE_S / 2)  # long before its deadline
    await harness.heal()
    await publish(broker, queue, b"after")

    assert {b"before", b"after"} <= set(bodies(await rest_of(harness, queue, 2)))


@pytest.mark.features(deletable=True)
async def test_a_publish_to_a_queue_that_was_deleted_is_unroutable(harness: Harness) -> None:
    """Without this the job goes nowhere, confirmed."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, b"before")
    await harness.delete(queue)

    with pytest.raises(Unroutable) as raised:
        await publish(broker, queue, b"after")

    assert raised.value.queue == queue.name
