"""The memory broker's own: what makes it fit for users' tests."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid

import msgspec
import pytest

from leveret.broker import Subscription
from leveret.brokers.memory import MemoryBroker, MemoryStore, open_admin, open_broker
from leveret.brokers.memory.admin import MemoryAdmin
from leveret.brokers.memory.store import memory_store
from leveret.clock import Clock, ManualClock, SystemClock
from leveret.errors import BrokerUnavailable, ConfigurationError, PublishTimeout
from leveret.job import Priority, Queue
from leveret.runtime import Runtime
from tests.contract.harness import Recorder, consume, make_envelope, ready, soon, timed

QUEUE = Queue("jobs")
RUNTIME = Runtime(app="contract")


async def publish(broker: MemoryBroker, *bodies: bytes, delay_s: float = 0.0, clock: Clock | None = None) -> None:
    """Publish one job a body, in order."""
    for body in bodies:
        await broker.publish(QUEUE, timed(make_envelope(QUEUE, body), soon(), delay_s=delay_s, clock=clock))


async def test_a_url_names_one_store_of_the_process() -> None:
    """An app's publisher and its worker each open the URL; they must meet."""
    url = f"memory://{uuid.uuid4().hex}"
    _, sink = await consume(open_broker(url, RUNTIME), QUEUE)

    await publish(open_broker(url, RUNTIME), b"1")

    assert (await sink.next()).envelope.body == b"1"
    assert [row.unsettled for row in await open_admin(url, RUNTIME).depths([QUEUE])] == [1]
    assert memory_store(url).state(SystemClock()).unsettled == 1
    assert memory_store(f"{url}-other").state(SystemClock()).unsettled == 0


async def test_a_private_store_shares_nothing() -> None:
    """Tests that share a store fail by what another left behind."""
    mine, other = MemoryStore(), MemoryStore()

    await publish(MemoryBroker(mine, RUNTIME), b"1")

    assert mine.state(SystemClock()).ready == 1
    assert other.state(SystemClock()).ready == 0


@pytest.mark.parametrize(
    "url", ["memory://a/b", "memory:///file.db", "memory://user:secret@host", "memory://a?b=c", "memory:a"]
)
def test_a_url_that_cannot_be_is_one_clear_error(url: str) -> None:
    """Somebody who takes memory:///jobs.db for a file must be told, and no password shown."""
    with pytest.raises(ConfigurationError, match="memory://name") as raised:
        open_broker(url, RUNTIME)

    assert "secret" not in str(raised.value)


async def test_a_delayed_job_comes_when_the_clock_says_so() -> None:
    """A test of a retry an hour later must not take an hour, and must not see it a second early."""
    clock, store = ManualClock(), MemoryStore()
    broker = MemoryBroker(store, Runtime(app="contract", clock=clock))
    _, sink = await consume(broker, QUEUE)

    await publish(broker, b"later", delay_s=3600, clock=clock)
    clock.advance(3599.9)
    await publish(broker, b"now")
    assert (await sink.next()).envelope.body == b"now"
    state = store.state(clock)
    assert (state.delayed, state.next_due_in_s) == (1, pytest.approx(0.1))
    clock.advance(0.1)

    assert (await sink.next()).envelope.body == b"later"
    assert store.state(clock).next_due_in_s is None


async def test_a_job_put_off_twice_is_woken_at_the_earlier_time_again() -> None:
    """A consumer that armed its timer for a late job must still wake for an earlier one that came after."""
    clock = ManualClock()
    broker = MemoryBroker(MemoryStore(), Runtime(app="contract", clock=clock))
    _, sink = await consume(broker, QUEUE)

    await publish(broker, b"late", delay_s=100, clock=clock)
    await publish(broker, b"early", delay_s=10, clock=clock)
    await publish(broker, b"now")
    (await sink.next()).done()  # so that the timer is armed
    clock.advance(10)
    assert (await sink.next()).envelope.body == b"early"
    clock.advance(90)

    assert (await sink.next()).envelope.body == b"late"


async def test_refuse_stops_every_publish_and_accept_ends_it() -> None:
    """This is how a user tests what a service does while its broker is away."""
    store = MemoryStore()
    broker, admin = MemoryBroker(store, RUNTIME), MemoryAdmin(store, RUNTIME)
    _, sink = await consume(broker, QUEUE)
    await publish(broker, b"1", b"2")
    first, second = await sink.take(2)
    await first.bury(timed(first.envelope, soon()))

    store.refuse("down for a test")
    with pytest.raises(BrokerUnavailable, match="down for a test"):
        await publish(broker, b"3")
    with pytest.raises(BrokerUnavailable):
        await second.again(timed(second.envelope, soon(), delay_s=1))
    with pytest.raises(BrokerUnavailable):
        await second.bury(timed(second.envelope, soon()))
    async with admin.dead(QUEUE) as letters:
        [letter] = [letter async for letter in letters]
        with pytest.raises(BrokerUnavailable):
            await letters.replay(letter, letter.envelope)
    assert second.live
    store.accept()
    await publish(broker, b"4")

    assert (await sink.next()).envelope.body == b"4"
    state = store.state(SystemClock())
    assert (state.ready, state.unsettled, state.dead) == (0, 2, 1)


async def test_disconnect_returns_what_is_held_and_says_so_first() -> None:
    """What a worker does when its connection is cut is tested with this: it must hear of the loss before the redelivery."""
    store = MemoryStore()
    broker = MemoryBroker(store, RUNTIME)
    await publish(broker, b"1", b"2")
    heard: list[object] = []

    class Order(Recorder):
        def deliver(self, delivery, /):
            heard.append((delivery.envelope.body, delivery.redelivered))
            super().deliver(delivery)

        def lost(self):
            heard.append("lost")
            super().lost()

    consumption, sink = await consume(broker, QUEUE, sink=Order())
    first, second = await sink.take(2)
    first.done()
    store.disconnect()

    assert not second.live
    assert not ready(consumption)
    await second.bury(timed(second.envelope, soon()))  # too late: no effect
    again = await sink.next()
    assert (again.envelope.body, again.redelivered, again.live) == (b"2", True, True)
    assert heard == [(b"1", False), (b"2", False), "lost", (b"2", True)]
    assert ready(consumption)
    assert store.state(SystemClock()).dead == 0


async def test_a_publisher_on_another_loop_reaches_the_consumer() -> None:
    """`blocking_publisher` has a thread and a loop of its own."""
    store = MemoryStore()
    consumer = MemoryBroker(store, RUNTIME)
    _, sink = await consume(consumer, QUEUE, prefetch=300)

    async def many(number: int) -> None:
        await publish(MemoryBroker(store, RUNTIME), *(b"%d" % (number * 100 + each) for each in range(100)))
        await publish(MemoryBroker(store, RUNTIME), b"%d" % (number + 1000), delay_s=0.05)

    threads = [threading.Thread(target=asyncio.run, args=(many(number),)) for number in range(2)]
    for thread in threads:
        thread.start()
    got = {int(delivery.envelope.body) for delivery in await sink.take(202)}
    for thread in threads:
        await asyncio.to_thread(thread.join, 10)

    assert got == {*range(200), 1000, 1001}


async def test_what_a_dead_loop_held_comes_back() -> None:
    """A worker whose loop ended without closing died: its jobs must not be held for ever."""
    store = MemoryStore()
    await publish(MemoryBroker(store, RUNTIME), b"1", b"2")

    async def die() -> None:
        _, sink = await consume(MemoryBroker(store, RUNTIME), QUEUE, prefetch=1)
        await sink.next()

    await asyncio.to_thread(asyncio.run, die())
    _, sink = await consume(MemoryBroker(store, RUNTIME), QUEUE)

    assert [(each.envelope.body, each.redelivered) for each in await sink.take(2)] == [(b"1", True), (b"2", False)]


async def test_a_job_given_back_stands_where_it_stood() -> None:
    """What a worker gives back at its shutdown must not lose its place to jobs that came later."""
    broker = MemoryBroker(MemoryStore(), RUNTIME)
    await publish(broker, b"1", b"2", b"3")
    consumption, sink = await consume(broker, QUEUE, prefetch=2)
    for delivery in await sink.take(2):
        delivery.give_back() if delivery.envelope.body == b"1" else delivery.done()
    await consumption.close()

    _, sink = await consume(broker, QUEUE)

    assert [each.envelope.body for each in await sink.take(2)] == [b"1", b"3"]


async def test_changed_returns_for_what_happened_before_it_was_called() -> None:
    """A test that waits for an idle store must not miss the change that made it so."""
    store, clock = MemoryStore(), SystemClock()
    broker = MemoryBroker(store, RUNTIME)
    before = store.state(clock).version
    await publish(broker, b"1")
    await asyncio.wait_for(store.changed(before), 5)

    waiting = asyncio.ensure_future(store.changed(store.state(clock).version))
    await asyncio.sleep(0)
    assert not waiting.done()
    await publish(broker, b"2")

    await asyncio.wait_for(waiting, 5)
    assert store.state(clock).ready == 2


async def test_a_deadline_that_passed_before_the_publish_is_a_timeout_that_published_nothing() -> None:
    """The publisher must know that it may publish again without making a duplicate."""
    store = MemoryStore()

    with pytest.raises(PublishTimeout) as raised:
        await MemoryBroker(store, RUNTIME).publish(QUEUE, timed(make_envelope(QUEUE), time.monotonic() - 1))

    assert not raised.value.maybe_published
    assert store.state(SystemClock()).ready == 0


async def test_a_closed_broker_publishes_and_consumes_no_more() -> None:
    """Used after its end it would work here and fail in production."""
    broker = MemoryBroker(MemoryStore(), RUNTIME)
    await broker.close()

    with pytest.raises(BrokerUnavailable, match="closed"):
        await publish(broker, b"1")
    with pytest.raises(ConfigurationError, match="closed"):
        await broker.consume([Subscription(QUEUE, 1)], Recorder())


async def test_an_envelope_is_a_copy() -> None:
    """A publisher that changes its headers after the publish would change the job in the queue, which no real broker does."""
    broker = MemoryBroker(MemoryStore(), RUNTIME)
    headers: dict[str, object] = {"x-tenant-id": "a", "x-death": "the broker's own isn't passed on"}
    _, sink = await consume(broker, QUEUE)

    await broker.publish(QUEUE, timed(msgspec.structs.replace(make_envelope(QUEUE), headers=headers), soon()))
    headers["x-tenant-id"] = "b"

    assert (await sink.next()).envelope.headers == {"x-tenant-id": "a"}


async def test_injected_headers_are_read_as_they_would_be_off_the_wire() -> None:
    """How an app deals with odd input is tested with this."""
    store = MemoryStore()
    _, sink = await consume(MemoryBroker(store, RUNTIME), QUEUE)

    store.inject(QUEUE.name, b"\xff", priority=Priority.HIGH, headers={"lv-attempt": "many", "lv-pass": 2, "x": 1})
    delivery = await sink.next()

    assert "lv-attempt" in (delivery.problem or "")
    assert (delivery.envelope.attempt, delivery.envelope.passes, delivery.envelope.priority) == (1, 2, Priority.HIGH)
    assert (delivery.envelope.body, delivery.envelope.headers) == (b"\xff", {"x": 1})
