"""What every broker promises: publish, deliver, settle, delay, bury, give back."""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections import Counter

import msgspec
import pytest

from leveret.broker import Broker, Delivery
from leveret.envelope import MSGPACK
from leveret.errors import BrokerUnavailable, PublishError, PublishTimeout, Unroutable
from leveret.failure import Failure, failures_of
from leveret.job import LEVELS, Priority, Queue
from tests.contract.harness import (
    PATIENCE_S,
    Harness,
    Recorder,
    consume,
    depth,
    make_envelope,
    ready,
    received,
    soon,
    timed,
)


async def publish(broker: Broker, queue: Queue, *bodies: bytes, delay_s: float = 0.0, **fields: object) -> None:
    """Publish one job a body, in order."""
    for body in bodies:
        await broker.publish(queue, timed(make_envelope(queue, body, **fields), soon(), delay_s=delay_s))


async def rest_of(harness: Harness, queue: Queue, expected: int = 0) -> list[Delivery]:
    """Return what a new consumer gets out of `queue` at NORMAL: the `expected`, and any more before a marker; all of it done.

    The marker goes out once the expected are there, since what a broker takes back may take a moment.
    """
    broker = harness.open()
    consumption, sink = await consume(broker, queue, prefetch=expected + 100)
    deliveries = await sink.take(expected)
    await publish(broker, queue, b"marker")
    while (delivery := await sink.next()).envelope.body != b"marker":
        deliveries.append(delivery)
    for each in (*deliveries, delivery):
        each.done()
    await consumption.close()
    return deliveries


def bodies(deliveries: list[Delivery]) -> list[bytes]:
    """What is in them."""
    return [delivery.envelope.body for delivery in deliveries]


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


async def test_one_consumption_takes_from_several_queues(harness: Harness) -> None:
    """A worker that mixes up its queues runs one queue's handler on the other's job."""
    broker, first, second = harness.open(), harness.queue(), harness.queue()

    _, sink = await consume(broker, first, second)
    await publish(broker, first, b"first")
    await publish(broker, second, b"second")

    got = {delivery.envelope.body: (delivery.queue, delivery.envelope.queue) for delivery in await sink.take(2)}
    assert got == {b"first": (first, first.name), b"second": (second, second.name)}


async def test_a_thousand_publishes_at_once_all_arrive_once(harness: Harness) -> None:
    """Confirms that are matched to the wrong publish show only under load."""
    broker, queue = harness.open(), harness.queue()
    sent = [make_envelope(queue, b"%d" % number) for number in range(1000)]

    await asyncio.gather(*(broker.publish(queue, timed(each, soon(60))) for each in sent))
    _, sink = await consume(broker, queue, prefetch=2000)
    got = Counter(delivery.envelope.job_id for delivery in await sink.take(1000))

    assert got == Counter(each.job_id for each in sent)
    assert sink.waiting == 0


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


async def test_closing_the_broker_returns_what_its_consumptions_hold(harness: Harness) -> None:
    """A program that closes only its broker must not leave jobs hanging until a lease or a heartbeat runs out."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, b"1")

    _, sink = await consume(broker, queue)
    await sink.next()
    await broker.close()

    assert bodies(await rest_of(harness, queue, 1)) == [b"1"]


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


async def test_a_job_given_back_goes_to_another_consumer(harness: Harness) -> None:
    """At a shutdown what hasn't started must not wait for the process to end."""
    broker, other, queue = harness.open(), harness.open(), harness.queue()
    await publish(broker, queue, b"1")

    consumption, sink = await consume(broker, queue)
    delivery = await sink.next()
    await consumption.stop_taking()
    _, other_sink = await consume(other, queue)
    delivery.give_back()
    again = await other_sink.next()

    assert again.envelope == delivery.envelope


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


@pytest.mark.parametrize("delay_s", [0.0, 0.5])
async def test_again_delivers_the_new_envelope_and_the_original_is_gone(harness: Harness, delay_s: float) -> None:
    """A retry that keeps the original runs twice; one that comes early hammers what just failed."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, b"1", headers={"x-tenant-id": "a"}, priority=Priority.HIGH)

    consumption, sink = await consume(broker, queue)
    first = await sink.next()
    changed = msgspec.structs.replace(first.envelope, attempt=2, passes=1, errors="[]", cause="retry")
    started = time.monotonic()
    retried = timed(changed, soon(), delay_s=delay_s)
    await first.again(retried)
    second = await sink.next()
    took_s = time.monotonic() - started

    assert second.envelope == received(retried)
    assert second.queue == queue
    assert delay_s <= took_s < delay_s * (1 + 1 / 64) + 1
    second.done()
    await consumption.close()
    assert await rest_of(harness, queue) == []
    assert (await depth(harness.admin(), queue)).ready == 0


@pytest.mark.parametrize("delay_s", [0.25, 0.8, 2.3])
async def test_a_delayed_job_comes_on_time(harness: Harness, delay_s: float) -> None:
    """Not before, because it was asked for; and at most 1.6 % and a second late."""
    broker, queue = harness.open(), harness.queue()
    _, sink = await consume(broker, queue)

    started = time.monotonic()
    await publish(broker, queue, b"later", delay_s=delay_s)
    confirmed = time.monotonic()
    await sink.next()
    arrived = time.monotonic()

    assert arrived - started >= delay_s
    assert arrived - confirmed <= delay_s * (1 + 1 / 64) + 1


async def test_a_short_delay_is_not_held_up_by_a_long_one(harness: Harness) -> None:
    """In a single queue of delayed jobs the one at the head blocks all behind it."""
    broker, queue = harness.open(), harness.queue()
    _, sink = await consume(broker, queue)

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


async def test_a_buried_job_is_kept_byte_for_byte_with_its_origin(harness: Harness) -> None:
    """The dead letters are where a person finds out what went wrong, and from where it is replayed."""
    broker, queue, admin = harness.open(), harness.queue(), harness.admin()
    body = os.urandom(500)
    await publish(broker, queue, body, priority=Priority.LOW, headers={"x-tenant-id": "a"}, correlation_id="c")

    consumption, sink = await consume(broker, queue)
    delivery = await sink.next()
    errors = msgspec.json.encode([Failure(attempt=4, at_ms=1, host="h", error="ValueError", message="no")]).decode()
    buried = msgspec.structs.replace(
        delivery.envelope, attempt=4, passes=3, errors=errors, origin=queue.name, cause="bury", deadline=soon()
    )
    await delivery.bury(timed(buried, soon()))
    await consumption.close()

    async with admin.dead(queue) as letters:
        [letter] = [letter async for letter in letters]
    assert letter.envelope == received(buried)
    assert (letter.envelope.queue, letter.envelope.priority) == (queue.name, Priority.LOW)
    assert await rest_of(harness, queue) == []


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


@pytest.mark.parametrize("verb", ["again", "again later", "bury"])
async def test_a_settlement_that_cannot_be_confirmed_leaves_the_delivery_unsettled(harness: Harness, verb: str) -> None:
    """Acked before its republication is confirmed, a job is lost for good."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, b"1", b"other")
    consumption, sink = await consume(broker, queue)
    delivery, other = await sink.take(2)
    await other.again(timed(other.envelope, soon()))  # so that it is connected and everything declared
    (await sink.next()).done()
    envelope = msgspec.structs.replace(delivery.envelope, passes=1, origin=queue.name if verb == "bury" else None)

    envelope = timed(envelope, soon(), delay_s=0.25 if verb == "again later" else 0)

    async def settle(deadline: float) -> None:
        await (delivery.bury if verb == "bury" else delivery.again)(timed(envelope, deadline))

    await harness.break_publishing()
    started = time.monotonic()
    with pytest.raises(PublishError):
        await settle(started + 1)
    assert time.monotonic() - started < 2
    assert delivery.live
    await harness.heal()
    await settle(soon())

    if verb == "bury":
        async with harness.admin().dead(queue) as letters:
            found = {letter.envelope.job_id async for letter in letters}
        assert found == {delivery.envelope.job_id}
    else:
        assert (await sink.next()).envelope == received(envelope)
    await consumption.close()


async def test_a_cancelled_publish_ends_and_the_broker_goes_on(harness: Harness) -> None:
    """A request that is cut off must not hang, nor take the connection that others publish on with it."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, b"before")

    await harness.break_publishing()
    task = asyncio.create_task(broker.publish(queue, timed(make_envelope(queue), soon())))
    await asyncio.sleep(0)  # it has begun
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 2)
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


async def test_a_foreign_message_without_properties_arrives(harness: Harness) -> None:
    """A producer in another language sends a body and no more; it is a job all the same."""
    broker, queue = harness.open(), harness.queue()
    _, sink = await consume(broker, queue)

    await harness.put(queue, b'{"n": 1}')
    delivery = await sink.next()

    assert (delivery.envelope.body, delivery.envelope.job, delivery.envelope.attempt) == (b'{"n": 1}', "", 1)
    assert delivery.problem is None


async def test_content_type_and_encoding_arrive_as_they_were_sent(harness: Harness) -> None:
    """The decoder refuses what it can't read by these two."""
    broker, queue = harness.open(), harness.queue()
    _, sink = await consume(broker, queue)

    await harness.put(
        queue,
        b"\x1f\x8b",
        content_type="text/plain; charset=latin-1",
        content_encoding="gzip",
        job="n",
        job_id="foreign-1",
    )
    delivery = await sink.next()

    assert (delivery.envelope.content_type, delivery.envelope.content_encoding) == (
        "text/plain; charset=latin-1",
        "gzip",
    )
    assert (delivery.envelope.job, delivery.envelope.job_id) == ("n", "foreign-1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lv-attempt", "many"),
        ("lv-attempt", 0),
        ("lv-attempt", -3),
        ("lv-pass", 1.5),
        ("lv-crashes", -1),
        ("lv-errors", 7),
        ("lv-due", "soon"),
        ("lv-expires-at", True),
    ],
)
async def test_a_header_of_leverets_own_that_makes_no_sense_is_a_problem_not_a_crash(
    harness: Harness, name: str, value: object
) -> None:
    """One odd message must not stop the queue; it is buried with its reason, and those behind it run."""
    broker, queue = harness.open(), harness.queue()
    _, sink = await consume(broker, queue)

    await harness.put(queue, b"odd", headers={name: value, "x-tenant-id": "a"})
    await publish(broker, queue, b"good")
    odd, good = await sink.take(2)

    assert name in (odd.problem or "")
    assert (odd.envelope.body, odd.envelope.headers, odd.envelope.attempt) == (b"odd", {"x-tenant-id": "a"}, 1)
    assert (good.envelope.body, good.problem) == (b"good", None)


async def test_foreign_headers_of_any_type_survive_a_retry_and_a_burial(harness: Harness) -> None:
    """Leveret may not understand them; who sent them will, when the job comes back out."""
    broker, queue, admin = harness.open(), harness.queue(), harness.admin()
    _, sink = await consume(broker, queue)
    headers = {
        "x-list": [1, "a", True],
        "x-bytes": bytearray(b"\x00\xff"),
        "x-none": None,
        "x-table": {"deep": {"er": 1}},
        "x-float": 2.5,
    }

    await harness.put(queue, b"1", job_id="foreign-1", headers=headers)
    first = await sink.next()
    assert first.envelope.headers == headers
    await first.again(timed(msgspec.structs.replace(first.envelope, attempt=2), soon()))
    second = await sink.next()
    await second.bury(timed(msgspec.structs.replace(second.envelope, origin=queue.name), soon()))

    assert second.envelope.headers == headers
    async with admin.dead(queue) as letters:
        [letter] = [letter async for letter in letters]
    assert letter.envelope.headers == headers


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


async def test_a_job_given_back_keeps_its_place(harness: Harness) -> None:
    """A stop gives back the jobs that a worker holds: at the end of the queue the oldest jobs would wait longest."""
    broker, queue = harness.open(), harness.queue()
    sent = [b"%d" % number for number in range(8)]
    await publish(broker, queue, *sent)

    consumption, sink = await consume(broker, queue, prefetch=6)
    held = await sink.take(6)
    await consumption.stop_taking()
    for number in (4, 1, 3):
        held[number].give_back()
        await asyncio.sleep(0.02)  # one settlement per loop turn, so that the broker sees this order
    await consumption.close()  # 0, 2 and 5 come back

    order = bodies(await rest_of(harness, queue, 8))
    if broker.features(queue).keeps_place:
        assert order == sent
    else:
        assert (sorted(order[:6]), order[6:]) == (sent[:6], sent[6:])


@pytest.mark.features(bounds_headers=True)
async def test_a_message_too_large_to_be_published_again_is_buried_with_its_size(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator who reads "rejected" alone looks for a program that rejects: the log and the letter name id, size and limit."""
    queue, admin = harness.queue(), harness.admin()
    _, sink = await consume(harness.open(), queue)

    await harness.put(queue, b"{}", job_id="too-large", headers={"x": "y" * 100_000})
    await publish(harness.open(), queue, b"behind")
    assert (await sink.next()).envelope.body == b"behind"
    async with asyncio.timeout(PATIENCE_S):
        while (await depth(admin, queue)).dead == 0:
            await asyncio.sleep(0.05)
    async with admin.dead(queue) as letters:
        [letter] = [letter async for letter in letters]

    [failure] = failures_of(letter.envelope)
    [said] = [record.getMessage() for record in caplog.records if "too large to be published again" in record.message]
    size = re.search(r"too large to be published again: 100\d{3} bytes of properties, limit \d+", said)
    assert said.startswith(f"job too-large from queue {queue.name} "), said
    assert size is not None, said
    assert size.group() in failure.message


async def test_a_broker_says_how_publishing_is(harness: Harness) -> None:
    """A service that is asked whether it is ready must know without publishing a job."""
    broker, queue = harness.open(), harness.queue()

    before = broker.publishing
    assert (before.name, before.why != "") in [("connecting", True), ("ready", False)]
    await publish(broker, queue, b"x")
    ready = broker.publishing
    assert (ready.name, ready.why) == ("ready", "")
    await publish(broker, queue, b"x")
    assert broker.publishing == ready, "`since` is when the state began"
    await broker.close()

    closed = broker.publishing
    assert (closed.name, closed.why, closed.since >= ready.since) == ("closed", "", True)


@pytest.mark.features(connected=True)
async def test_a_lost_publishing_connection_is_told_and_opened_again(harness: Harness) -> None:
    """A service that isn't ready gets no traffic: if only a publish could bring it back, it would never be ready again."""
    broker, queue = harness.open(), harness.queue()
    connects = broker.publishing.name == "connecting"
    await publish(broker, queue, b"x")
    ready = broker.publishing

    harness.cut()
    async with asyncio.timeout(PATIENCE_S):
        while connects and broker.publishing.since == ready.since:
            await asyncio.sleep(0.001)
        while broker.publishing.name != "ready":
            assert broker.publishing.why
            await asyncio.sleep(0.001)
