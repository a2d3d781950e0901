"""Links that are cut in the middle of a frame, that dribble, or that lead to something that doesn't answer."""

import asyncio
import gc
import logging
import random
import uuid
from collections.abc import Callable
from contextlib import suppress

import pytest

from leveret import LeveretError, PublishError, Settings
from leveret.broker import Subscription
from leveret.brokers.rabbitmq import RabbitSettings, open_broker
from leveret.job import Queue
from leveret.runtime import Runtime
from tests.contract.harness import Recorder, make_envelope, soon, timed
from tests.fault.bench import eventually, link_to
from tests.fault.shop import Shop, id_of, open_files
from tests.proxy import Way
from tests.rabbit.node import Rabbit
from tests.rabbit.proxy import FaultProxy
from tests.rabbit.raw import Raw

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

KILOBYTE = "x" * 1000


@pytest.mark.parametrize("resend", [False, True])
async def test_a_publish_that_is_cut_in_mid_frame_is_confirmed_or_an_error(
    rabbit: Rabbit, raw: Raw, resend: bool
) -> None:
    """R15: a job that is said to be sent, and is in no queue, is found by a customer."""
    sent: list[str] = []
    async with link_to(rabbit) as link:
        shop = Shop(link.url)
        async with shop.app.publisher() as publisher:
            await publisher.publish(shop.job().job, job_id="first", timeout_s=20)
            link.cut_after("up", 50_000)

            async def publish_one_after_the_other() -> None:
                for job in [shop.job(text=KILOBYTE, resend=resend) for _ in range(20)]:
                    with suppress(PublishError):
                        await publisher.publish(job.job, **job.options, timeout_s=20)
                        sent.append(id_of(job))

            await asyncio.gather(*(publish_one_after_the_other() for _ in range(10)))
    found = [message.properties.message_id for message in await raw.take_all(shop.queues[0].name)]

    assert set(sent) <= set(found)
    assert len(sent) == 200 if resend else 190 <= len(sent) < 200, "ten were on their way"
    assert len(found) - len(set(found)) <= (10 if resend else 0)


async def test_a_delivery_that_is_cut_in_mid_frame_reaches_no_handler(rabbit: Rabbit, raw: Raw) -> None:
    """R16: half a job that is run, or one that is acknowledged unseen."""
    async with link_to(rabbit) as link:
        shop = Shop(link.url)
        jobs = [shop.job(text=f"{number}:{KILOBYTE}") for number in range(1000)]
        async with shop.app.publisher() as publisher:
            await publisher.publish_many(jobs, timeout_s=20)
        link.cut_after("down", 333_333)
        async with shop.working() as (worker, _):
            await eventually(lambda: len(shop.ends) == 1000)
            assert link.accepted > 2, "it was cut"
            assert worker.state().name == "ready"
    left = await raw.take_all(shop.queues[0].name)

    assert {id_of(job): shop.texts[id_of(job)] for job in jobs} == shop.texts
    assert sum(shop.runs.values()) == 1000
    assert not left


async def test_a_link_that_dribbles_is_slow_and_not_lost(rabbit: Rabbit) -> None:
    """R17: a job that takes longer on its way than a heartbeat would end its connection, be delivered again, and again."""
    async with link_to(rabbit) as link:
        settings = Settings(brokers=[RabbitSettings(heartbeat_s=1)], connect_timeout_s=30)
        shop = Shop(link.url, settings=settings)
        async with shop.working() as (worker, publisher):
            await publisher.publish_many([shop.job()], timeout_s=20)
            accepted = link.accepted
            link.piece, link.gap_s = 7, 0.002
            jobs = [shop.job(text="y" * 8_000), *(shop.job(text=str(number)) for number in range(10))]
            await publisher.publish_many(jobs, timeout_s=40)
            await eventually(lambda: len(shop.ends) == 12)
            assert (worker.state().name, publisher.state().name) == ("ready", "ready")
            link.piece = None

    assert link.accepted == accepted, "nobody connected again"
    assert {id_of(job) for job in jobs} <= set(shop.texts)
    assert sum(shop.runs.values()) == 12


async def test_an_idle_worker_notices_a_half_open_link_and_takes_jobs_after_it(rabbit: Rabbit) -> None:
    """R13, pain 2: a firewall forgets a quiet connection, and the worker waits on it until somebody restarts it."""
    heartbeat_s = 2
    async with link_to(rabbit) as link:
        brokers = [RabbitSettings(heartbeat_s=heartbeat_s)]
        settings = Settings(brokers=brokers, connect_timeout_s=1.0, reconnect_cap_s=0.5)
        shop = Shop(link.url, settings=settings)
        async with shop.working() as (worker, publisher):
            link.freeze()
            await eventually(lambda: worker.state().name == "connecting", timeout_s=4 * heartbeat_s)
            accepted = link.accepted
            await eventually(lambda: link.accepted > accepted + 1)  # and none of these is answered
            link.thaw()
            await eventually(lambda: worker.state().name == "ready", timeout_s=10)
            await publisher.publish(shop.job().job, timeout_s=20)
            await eventually(lambda: len(shop.ends) == 1)


def mute(link: FaultProxy) -> None:
    link.mute = True


def half_a_handshake(link: FaultProxy) -> None:
    link.freeze_after("down", 300)


def a_byte_a_second(link: FaultProxy) -> None:
    link.piece, link.gap_s = 1, 1.0


@pytest.mark.parametrize("spoil", [mute, half_a_handshake, a_byte_a_second])
async def test_a_peer_that_accepts_and_gets_nowhere_is_given_up_and_tried_again(
    rabbit: Rabbit, caplog: pytest.LogCaptureFixture, spoil: Callable[[FaultProxy], None]
) -> None:
    """R30, pain 2: a connect without a deadline is the last thing that such a worker does."""
    caplog.set_level(logging.INFO, "leveret")
    async with link_to(rabbit) as link:
        shop = Shop(link.url, settings=Settings(connect_timeout_s=0.5, reconnect_cap_s=1.0))
        spoil(link)
        async with shop.app.worker() as worker, shop.app.publisher() as publisher:
            with pytest.raises(PublishError):
                await publisher.publish(shop.job().job, timeout_s=1)
            await eventually(lambda: link.accepted >= 4)
            assert worker.state().name == "connecting"
            assert caplog.text.count("waiting to consume") == 1, "said once, not at each try"
            link.mute, link.piece = False, None
            link.thaw()
            link.reset()
            await eventually(lambda: worker.state().name == "ready", timeout_s=10)
            await publisher.publish(shop.job().job, timeout_s=20)
            await eventually(lambda: len(shop.ends) == 1)


async def session(rabbit: Rabbit, way: Way, count: int) -> None:
    """Publish a job and consume it, over a link that is reset once `count` bytes went `way`."""
    async with link_to(rabbit) as link:
        link.cut_after(way, count)
        settings = Settings(reconnect_base_s=0.05, reconnect_cap_s=0.1)
        broker = open_broker(link.url, Runtime(app="cut", settings=settings, rng=random.Random(count)))
        queue, sink = Queue(f"cut-{way}-{count}-{uuid.uuid4().hex[:12]}", type="classic", priorities=False), Recorder()
        try:
            consumption = await broker.consume([Subscription(queue, 10)], sink)
            envelope = make_envelope(queue, resend=True)
            try:
                await broker.publish(queue, timed(envelope, soon(20)))
            except LeveretError:
                await broker.publish(queue, timed(envelope, soon(20)))
            delivery = await sink.next()
            delivery.done()
            await consumption.close()
        finally:
            await broker.close()
    assert delivery.envelope.job_id == envelope.job_id


async def test_a_session_that_is_reset_anywhere_goes_on_and_leaves_nothing(
    rabbit: Rabbit, caplog: pytest.LogCaptureFixture
) -> None:
    """R31: some place in the protocol at which a cut raises what nobody expects, or leaves a socket or a task."""
    strange: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: strange.append(str(context)))
    gc.collect()  # what earlier tests left isn't counted
    tasks, files = len(asyncio.all_tasks()), open_files()
    places: list[tuple[Way, int]] = [(way, count) for way in ("up", "down") for count in range(0, 2_000, 20)]
    for begin in range(0, len(places), 25):
        await asyncio.gather(*(session(rabbit, way, count) for way, count in places[begin : begin + 25]))
    gc.collect()
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks)
    await eventually(lambda: open_files() <= files)

    assert not strange
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
