"""Brokers that are away, silent, full, hung or killed: a worker waits and says for what, a publisher has its answer in time."""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any, Literal

import msgspec
import pytest

from leveret import App, BrokerUnavailable, Job, Outgoing, PublishError, PublishManyError, PublishTimeout, Receipt
from leveret.broker import Delivery
from leveret.brokers.rabbitmq import open_admin, open_broker
from leveret.brokers.rabbitmq.taker import RabbitDelivery
from leveret.cron import scheduler
from leveret.cron.scheduler import Scheduler
from leveret.ids import new_job_id
from leveret.job import Queue
from leveret.runtime import Runtime
from tests.conftest import StartNode
from tests.contract.harness import consume, make_envelope, soon, timed
from tests.fault.bench import Bench, eventually, link_to
from tests.nodes import free_ports
from tests.rabbit.node import Node, Rabbit
from tests.rabbit.proxy import FaultProxy
from tests.rabbit.raw import connect

SLACK_S = 0.5
"""How late an error may come after its deadline."""

slots = Queue("slots")


class Slot(Job, name="slot", queue=slots):
    what: str = "nightly"


async def refused(publishing: Any, timeout_s: float) -> PublishError:
    """Return the one documented error that `publishing` ends with, which comes in time."""
    began = time.monotonic()
    with pytest.raises(PublishError) as raised:
        await publishing
    assert time.monotonic() - began < timeout_s + SLACK_S, raised.value
    assert "\n" not in str(raised.value)
    assert "guest:guest" not in str(raised.value)
    return raised.value


async def test_a_publisher_without_a_broker_has_one_documented_error_in_time(bench: Callable[..., Bench]) -> None:
    """A web request that hangs with the broker takes the whole service down with it."""
    port = free_ports(1)[0]
    one = bench(f"amqp://guest:guest@127.0.0.1:{port}/")
    async with one.app.publisher() as publisher:
        errors = await asyncio.gather(
            *(refused(publisher.publish(one.recorder.Note(), timeout_s=1), 1) for _ in range(50))
        )
        began = time.monotonic()
        with pytest.raises(PublishManyError) as many:
            await publisher.publish_many([one.recorder.Note() for _ in range(3000)], timeout_s=1)
        took_s = time.monotonic() - began

    assert {type(error) for error in errors} == {BrokerUnavailable}
    assert all(f"127.0.0.1:{port}" in str(error) and "Connection refused" in str(error) for error in errors), errors[0]
    assert took_s < 1 + 4 * SLACK_S  # 3000 errors are made, beside another process of tests
    assert all(isinstance(result, (BrokerUnavailable, PublishTimeout)) for result in many.value.results)
    assert not any(isinstance(result, PublishTimeout) and result.maybe_published for result in many.value.results)


@pytest.mark.parametrize("of", ["vhost", "user"])
async def test_a_limit_of_connections_is_waited_for(
    bench: Callable[..., Bench], rabbit_node: StartNode, of: Literal["user", "vhost"]
) -> None:
    """In a rolling deploy the old workers still have their connections: new ones that end at once, and aren't restarted, leave nobody."""
    node = await rabbit_node()
    one = bench(node.url, reconnect_cap_s=1.0)
    async with connect(node.url):
        await node.limit_connections(1, of=of)
        worker = one.start("-p", "2")
        await worker.says(r"waiting to consume: .*connection limit \(1\) is reached")
        async with one.app.publisher() as publisher:
            error = await refused(publisher.publish(one.recorder.Note(), timeout_s=2), 2)
        await node.limit_connections(4, of=of)
        ids = await one.publish(one.recorder.Note())
        await one.until_ended(ids)
        await worker.drained()

    assert isinstance(error, BrokerUnavailable)
    assert "connection limit (1) is reached" in str(error)


async def test_a_black_hole_at_connect_is_an_error_in_time_and_heals(
    bench: Callable[..., Bench], rabbit: Rabbit
) -> None:
    """A firewall that drops packets answers nothing at all: no error of the operating system's comes for minutes."""
    async with link_to(rabbit) as link:
        link.freeze()
        one = bench(link.url)
        async with one.app.publisher() as publisher:
            error = await refused(publisher.publish(one.recorder.Note(), timeout_s=0.7), 0.7)
            link.thaw()
            await publisher.publish(one.recorder.Note(), timeout_s=20)

    assert isinstance(error, BrokerUnavailable)


async def test_publishes_that_wait_for_less_than_a_handshake_takes_get_their_connection(
    bench: Callable[..., Bench], rabbit: Rabbit
) -> None:
    """An attempt that dies with the publish that began it is begun anew by the next one: such a service never publishes at all."""
    async with link_to(rabbit) as link:
        link.latency_s = 0.05  # five round trips to connect, three to declare
        one = bench(link.url)
        async with one.app.publisher() as publisher:
            for _ in range(20):
                try:
                    await publisher.publish(one.recorder.Note(), timeout_s=0.3)
                    break
                except PublishError as error:
                    if isinstance(error, PublishTimeout) and error.maybe_published:
                        break  # connected; the confirm takes a slow disk longer
            else:
                pytest.fail("20 publishes, and no connection")
            assert link.accepted == 1


async def test_a_black_hole_in_the_middle_of_a_publish_is_an_error_in_time_and_heals(
    bench: Callable[..., Bench], rabbit: Rabbit
) -> None:
    """Whether it arrived can't be known then; the caller must be told just that, and when."""
    async with link_to(rabbit) as link:
        one = bench(link.url)
        async with one.app.publisher() as publisher:
            await publisher.publish(one.recorder.Note(), timeout_s=20)
            link.freeze()
            errors = await asyncio.gather(
                *(refused(publisher.publish(one.recorder.Note(), timeout_s=0.7), 0.7) for _ in range(20))
            )
            link.thaw()
            await publisher.publish(one.recorder.Note(), timeout_s=20)

    assert all(isinstance(error, PublishTimeout) and error.maybe_published for error in errors)


async def test_a_reset_in_the_middle_of_a_publish_is_an_error_and_heals(
    bench: Callable[..., Bench], rabbit: Rabbit
) -> None:
    """A load balancer that restarts cuts every connection: no `CancelledError` of a client library's may come out of that."""
    async with link_to(rabbit) as link:
        one = bench(link.url)
        async with one.app.publisher() as publisher:
            await publisher.publish(one.recorder.Note(), timeout_s=20)
            link.freeze("down")
            publishing = [asyncio.create_task(publisher.publish(one.recorder.Note(), timeout_s=10)) for _ in range(20)]
            sent = link.passed["up"]
            await eventually(lambda: link.passed["up"] > sent)
            link.thaw()
            link.reset()
            results = await asyncio.gather(*publishing, return_exceptions=True)
            await publisher.publish(one.recorder.Note(), timeout_s=20)

    assert all(isinstance(result, (PublishTimeout, Receipt)) for result in results), (
        results
    )  # a confirm may overtake the reset


@pytest.mark.fault
@pytest.mark.timeout(120)
async def test_a_worker_waits_for_its_broker_says_so_and_works_once_it_is_there(
    bench: Callable[..., Bench], rabbit_node: StartNode
) -> None:
    """Containers start in any order; one that dies because another is late is started again and again, and pages somebody."""
    node = await rabbit_node()
    await node.kill9()
    one = bench(node.url)
    worker = one.start()
    await worker.says(rf"waiting to consume: RabbitMQ at 127.0.0.1:{node.port}: Connection refused; trying again")
    before_s = worker.cpu_s
    await asyncio.sleep(3)
    assert worker.cpu_s - before_s < 0.05 * 3, "it waits between its tries"
    assert worker.log.count("waiting to consume") == 1, "said once, not at each try"
    ids, _ = await asyncio.gather(one.publish(*(one.recorder.Note() for _ in range(100)), timeout_s=40), node.start())
    await one.until_ended(ids)
    await worker.says("ready: consuming fault-")
    await worker.drained()


@pytest.mark.fault
@pytest.mark.timeout(120)
async def test_a_worker_that_still_waits_for_its_broker_ends_at_a_sigterm(bench: Callable[..., Bench]) -> None:
    """A deploy is rolled back just when nothing works: then of all times must a worker be stoppable."""
    with_nobody = bench(f"amqp://guest:guest@127.0.0.1:{free_ports(1)[0]}/").start()
    await with_nobody.says("waiting to consume")
    with_nobody.term()
    assert await with_nobody.ended(5) == 0, with_nobody.log

    async with FaultProxy(free_ports(1)[0]) as link:
        link.freeze()
        silent = bench(link.url, connect_timeout_s=2).start()
        await eventually(lambda: link.accepted > 0)
        silent.term()
        assert await silent.ended(10) == 0, silent.log


def more(confirmed: list[str], than: int) -> bool:
    return len(confirmed) > than


async def publish_on(one: Bench, confirmed: list[str], failed: asyncio.Event, enough: asyncio.Event) -> None:
    """Publish until it is `enough`, each job again under its id until it is confirmed, as the error says."""
    async with one.app.publisher() as publisher:
        while not enough.is_set():
            job_id = new_job_id()
            while True:
                try:
                    await publisher.publish(one.recorder.Note(0.01), job_id=job_id, timeout_s=2)
                    break
                except (BrokerUnavailable, PublishTimeout):
                    failed.set()
            confirmed.append(job_id)
            await asyncio.sleep(0.01)


@pytest.mark.fault
@pytest.mark.timeout(120)
@pytest.mark.parametrize("type", ["quorum", "classic"])
@pytest.mark.versions
async def test_a_broker_that_is_killed_and_comes_back_loses_no_confirmed_job(
    bench: Callable[..., Bench], rabbit_node: StartNode, type: str
) -> None:
    """The broker's machine is rebooted under load: publishers and workers go on by themselves, and nobody need look for lost jobs."""
    node = await rabbit_node()
    one = bench(node.url, type, reconnect_cap_s=1.0)
    worker = await one.working()
    confirmed, failed, enough = list[str](), asyncio.Event(), asyncio.Event()
    publishing = [asyncio.create_task(publish_on(one, confirmed, failed, enough)) for _ in range(5)]
    try:
        for kill in (1, 2):
            await eventually(partial(more, confirmed, len(confirmed) + 100), lambda: one.logs)
            await node.flush()
            await node.kill9()
            failed.clear()
            await asyncio.wait_for(failed.wait(), 10)
            await node.start()
            await worker.says("(?s)" + ".*".join(["consuming again"] * kill), 10)
        await eventually(partial(more, confirmed, len(confirmed) + 100), lambda: one.logs)
        enough.set()
        await asyncio.wait_for(asyncio.gather(*publishing), 30)
    finally:
        for task in publishing:
            task.cancel()
    await one.until_ended(confirmed)
    await one.until_empty()
    await worker.drained()

    assert len(set(confirmed)) == len(confirmed) > 300
    assert set(one.recorder.ids("end")) == set(confirmed)


@pytest.mark.fault
@pytest.mark.timeout(120)
@pytest.mark.versions
@pytest.mark.parametrize("kind", ["quorum", "classic"])
async def test_every_delayed_job_comes_after_the_broker_was_killed(
    kind: str, bench: Callable[..., Bench], rabbit_node: StartNode
) -> None:
    """A power cut finds thousands of retries on their way from delay queue to delay queue: each comes, though some only when RabbitMQ moves it again."""
    # 180 s unless told: how long its dead-letter worker waits for a confirm that the kill has cost it
    node = await rabbit_node(advanced={"dead_letter_worker_publisher_confirm_timeout": 2_000})
    one = bench(node.url, kind, reconnect_cap_s=1.0)
    confirmed = list[str]()
    async with one.app.publisher() as publisher:
        # declares the queue, and the delay queues with their bindings
        confirmed.append((await publisher.publish(one.recorder.Note(), delay_s=2, timeout_s=30)).job_id)
        await node.flush()
        for _ in range(15):
            some = [Outgoing(one.recorder.Note(), delay_s=0.25 * (1 + number % 8)) for number in range(200)]
            confirmed.extend(receipt.job_id for receipt in await publisher.publish_many(some, timeout_s=30))
    while (await one.depth()).ready < 1_500:  # the others are on their way
        pass
    await node.kill9()
    await node.start()
    worker = await one.working()
    await one.until_ended(confirmed)
    await one.until_empty()
    await worker.drained()
    assert len(set(confirmed)) == 3_001


@pytest.mark.fault
@pytest.mark.timeout(120)
@pytest.mark.versions
async def test_a_broker_short_of_memory_blocks_publishers_by_name_and_no_consumer(
    bench: Callable[..., Bench], rabbit_node: StartNode
) -> None:
    """With acks behind blocked publishes the queue couldn't empty, and the alarm that it caused would never end."""
    node = await rabbit_node()
    one = bench(node.url)
    before = await one.publish(*(one.recorder.Note(0.2) for _ in range(200)))
    async with one.app.publisher() as publisher:
        await publisher.publish(one.recorder.Note(), job_id="first", timeout_s=20)
        await node.alarm(on=True)
        error = await refused(publisher.publish(one.recorder.Note(), job_id="blocked", timeout_s=2), 2)
        again = await refused(publisher.publish(one.recorder.Note(), job_id="blocked-too", timeout_s=1), 1)
        worker = await one.working("--concurrency", "20")
        await one.until_ended([*before, "first"])
        await node.alarm(on=False)
        await publisher.publish(one.recorder.Note(), job_id="after", timeout_s=20)
    await one.until_ended(["blocked", "after"])  # it was on its way: `maybe_published`
    await worker.drained()

    for one_error in (error, again):
        assert isinstance(one_error, PublishTimeout), one_error
        assert "block" in str(one_error), one_error
    assert isinstance(error, PublishTimeout)
    assert error.maybe_published


@pytest.mark.fault
@pytest.mark.timeout(120)
@pytest.mark.parametrize("ending", ["again", "set aside", "bury"])
async def test_a_settlement_that_a_broker_blocks_is_published_once_however_often_it_is_tried(
    ending: str, rabbit_node: StartNode
) -> None:
    """An alarm of five minutes would make twenty copies of each job that fails meanwhile, and each would run."""
    node = await rabbit_node()
    broker, queue = open_broker(node.url, Runtime(app="blocked")), Queue("blocked")
    admin = open_admin(node.url, Runtime(app="blocked"))
    _, sink = await consume(broker, queue)
    for number in range(20):
        await broker.publish(queue, timed(make_envelope(queue, b"%d" % number), soon()))
    deliveries = await sink.take(20)

    async def settled(delivery: Delivery, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        if ending == "again":
            await delivery.again(timed(delivery.envelope, deadline, delay_s=0.25))
        elif ending == "set aside":
            await delivery.again(timed(msgspec.structs.replace(delivery.envelope, crashes=2), deadline))
        else:
            await delivery.bury(timed(delivery.envelope, deadline))

    await settled(deliveries[0], 20)  # declares what it needs
    await node.alarm(on=True)
    for _ in range(3):
        errors = await asyncio.gather(*(settled(delivery, 0.5) for delivery in deliveries[1:]), return_exceptions=True)
        assert {type(error) for error in errors} == {PublishTimeout}
    await node.alarm(on=False)
    await asyncio.gather(*(settled(delivery, 20) for delivery in deliveries[1:]))
    if ending == "again":
        came = [delivery.envelope.body for delivery in await sink.take(20)]
        # behind any second copy: it waits as long, and was published later
        await broker.publish(queue, timed(make_envelope(queue, b"last"), soon(), delay_s=0.25))
        assert (await sink.next()).envelope.body == b"last"
    elif ending == "set aside":
        came = list[bytes]()
        for _ in range(20):
            suspect = await sink.next()
            came.append(suspect.envelope.body)
            suspect.done()
        assert (await admin.depths([queue]))[0].levels.get("suspects", 0) == 0
    else:
        async with admin.dead(queue) as letters:
            came = [letter.envelope.body async for letter in letters]
    await broker.close()

    assert sorted(came) == sorted(b"%d" % number for number in range(20))


@pytest.mark.fault
@pytest.mark.timeout(60)
async def test_a_broker_that_is_left_under_an_alarm_waits_for_no_publish_that_was_given_up(
    rabbit_node: StartNode,
) -> None:
    """A stop under an alarm took three seconds more than it had to: it waited for the confirm of a job that it had given back."""
    node = await rabbit_node()
    broker, queue = open_broker(node.url, Runtime(app="leaving")), Queue("left")
    consumption, sink = await consume(broker, queue)
    for number in range(2):
        await broker.publish(queue, timed(make_envelope(queue, b"%d" % number), soon()))
    first, second = await sink.take(2)
    await first.again(timed(first.envelope, soon()))
    await node.alarm(on=True)
    with pytest.raises(PublishTimeout):
        await second.again(timed(second.envelope, time.monotonic() + 0.5))
    await consumption.close()
    began = time.monotonic()
    await broker.close()

    assert time.monotonic() - began < 2


@pytest.mark.fault
@pytest.mark.timeout(60)
async def test_a_channel_that_is_lost_costs_no_other_queue_its_last_acks(rabbit: Rabbit) -> None:
    """Somebody deletes a queue that is no longer used; what its neighbours have just done must not be done again."""
    broker = open_broker(rabbit.url, Runtime(app="neighbours"))
    queue, other = Queue(f"acks-{new_job_id()}"), Queue(f"lost-{new_job_id()}")
    for number in range(400):
        await broker.publish(queue, timed(make_envelope(queue, b"%d" % number), soon()))
    await broker.publish(other, timed(make_envelope(other), soon()))
    _, sink = await consume(broker, queue, other, prefetch=500)
    deliveries = await sink.take(401)
    unsettled = [delivery for delivery in deliveries if delivery.queue is queue][::2]
    for delivery in deliveries:
        if delivery.queue is queue and delivery not in unsettled:
            delivery.done()
    [lost] = [delivery for delivery in deliveries if delivery.queue is other]
    assert isinstance(lost, RabbitDelivery)
    broken = partial(lost.taker._channel.ack, 1000, multiple=False)  # pyright: ignore[reportPrivateUsage]  # no such tag: it costs the channel
    asyncio.get_running_loop().call_soon(broken)  # just behind the acks, which leave at the end of this turn
    again = await sink.next()
    assert (again.queue, again.redelivered) == (other, True)
    assert all(delivery.live for delivery in unsettled), "the other queue's channel was left alone"
    for delivery in (again, *unsettled):
        delivery.done()
    await broker.close()

    second = open_broker(rabbit.url, Runtime(app="neighbours"))
    _, sink = await consume(second, queue, other)
    await second.publish(queue, timed(make_envelope(queue, b"marker"), soon()))
    assert (await sink.next()).envelope.body == b"marker"
    await second.close()


@pytest.mark.fault
@pytest.mark.timeout(120)
async def test_a_slot_of_a_schedule_that_a_broker_blocks_is_written_twice_at_most(
    rabbit_node: StartNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The nightly invoices, published again each few seconds of an alarm, would be sent some twenty times when it is over."""
    monkeypatch.setattr(scheduler, "PUBLISH_TIMEOUT_S", 0.5)
    caplog.set_level(logging.INFO)
    node = await rabbit_node()
    app: App[None] = App("blocked", broker=node.url)
    runtime = app.runtime()
    broker = open_broker(node.url, runtime)
    async with app.publisher() as publisher:
        await publisher.publish(Slot("before"), timeout_s=20)
        await node.alarm(on=True)
        app.cron(f"{datetime.now(timezone.utc) + timedelta(seconds=2):%S %M %H} * * *", Slot(), name="nightly")
        publishing = Scheduler(app.name, app.schedules, app.sender(broker, runtime), runtime)
        running = asyncio.create_task(publishing.run())
        await eventually(lambda: "isn't published yet" in caplog.text)
        for _ in range(5):
            await refused(
                publisher.publish(Slot("blocked"), timeout_s=1), 1
            )  # so long that another copy would have been written
        await node.alarm(on=False)
        await eventually(lambda: "schedule nightly published" in caplog.text)
        await publisher.publish(Slot("after"), timeout_s=20)  # behind any copy
    _, sink = await consume(broker, slots)
    came = [(await sink.next()).envelope]
    while b"after" not in came[-1].body:
        came.append((await sink.next()).envelope)
    publishing.stop()
    await running
    await broker.close()

    assert 1 <= sum("nightly@" in envelope.job_id for envelope in came) <= 2
    assert "blocks publishers" in caplog.text


@pytest.mark.fault
@pytest.mark.timeout(120)
@pytest.mark.versions
async def test_a_hung_broker_is_noticed_and_worked_with_again(
    bench: Callable[..., Bench], rabbit_node: StartNode
) -> None:
    """A host that swaps, or a paused virtual machine, keeps its sockets open and says nothing: only heartbeats find out."""
    node: Node = await rabbit_node()
    one = bench(f"{node.url}?heartbeat=2", connect_timeout_s=2.0, reconnect_cap_s=1.0)
    worker = await one.working()
    consumers = (await one.depth()).consumers
    ids = await one.publish(*(one.recorder.Note(0.5) for _ in range(300)))
    await eventually(lambda: len(one.recorder.ids("start")) > 50, lambda: one.logs)
    node.pause()
    try:
        await worker.says("nothing was heard from the broker", 15)
        await worker.says("waiting to consume: .*no answer in time", 15)
    finally:
        node.resume()
    await worker.says("consuming again", 10)
    ids += await one.publish(*(one.recorder.Note() for _ in range(100)))
    await one.until_ended(ids)
    await one.until_empty()
    assert (await one.depth()).consumers == consumers, "none of the connection that hung is left"
    await worker.drained()


async def test_the_first_delayed_job_of_a_slow_connection_is_not_late(
    rabbit: Rabbit, bench: Callable[..., Bench]
) -> None:
    """All that a delay needs is declared at the first one: counted from there, or asked for piece by piece, it comes seconds late."""
    served = bench(rabbit.url)
    worker = await served.working()
    delay_s = 3.0
    async with link_to(rabbit) as link:
        link.latency_s = 0.02
        publisher_app = App("slow", broker=link.url)
        async with publisher_app.publisher() as publisher:
            called = time.monotonic()
            await publisher.publish(served.recorder.Note(), delay_s=delay_s, timeout_s=20)
    await served.until_lines("start", 1)
    await worker.drained()

    late_s = float(served.recorder.lines("start")[0][4]) - called - delay_s
    assert -0.05 < late_s < 1.0, f"{late_s:.2f} s late"
