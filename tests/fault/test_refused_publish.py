"""A publish that RabbitMQ refuses by closing its channel: it is named as such, and costs nobody else anything."""

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass

import pytest

from leveret import (
    App,
    Handle,
    Job,
    MessageTooLarge,
    Outgoing,
    Publisher,
    PublishManyError,
    PublishTimeout,
    Queue,
    Receipt,
    Unroutable,
)
from leveret.brokers.rabbitmq import publishing
from leveret.brokers.rabbitmq.address import addresses
from leveret.brokers.rabbitmq.nodes import Nodes
from leveret.brokers.rabbitmq.publishing import Posting, Publishing
from leveret.brokers.rabbitmq.routing import Routing
from leveret.brokers.rabbitmq.settling import Settling
from leveret.clock import SystemClock
from leveret.envelope import Envelope
from leveret.runtime import Runtime
from leveret.settings import Settings
from tests.rabbit.node import Rabbit
from tests.rabbit.raw import Raw


@dataclass
class Held:
    """A delivery to be replaced."""

    queue: Queue
    acked: int = 0
    instead: Posting | None = None
    live: bool = True

    def done(self) -> None:
        self.acked += 1


def waiting_for(queue: Queue) -> Envelope:
    """Return a retry that waits for a quarter of a second."""
    due_ms = int((time.time() + 0.25) * 1000)
    return Envelope(
        job_id=uuid.uuid4().hex,
        job="note",
        queue=queue.name,
        due_ms=due_ms,
        cause="retry",
        deadline=time.monotonic() + 5,
    )


pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]


class Shop:
    """An app with one queue."""

    def __init__(self, url: str) -> None:
        self.app = App("shop", broker=url)
        self.queue = Queue(f"shop-{uuid.uuid4().hex[:12]}")

        class Note(Job, name="note", queue=self.queue):
            text: str = ""

        self.Note = Note

    async def tried(self, publisher: Publisher, *sizes: int, timeout_s: float = 5) -> list[Receipt | BaseException]:
        """Publish a job of each size at once, and return how each of them ended."""
        jobs = (self.Note("x" * size) for size in sizes)
        return await asyncio.gather(
            *(publisher.publish(job, timeout_s=timeout_s) for job in jobs), return_exceptions=True
        )


async def test_a_job_too_large_for_the_broker_is_refused_and_costs_no_other_job_anything(
    rabbit: Rabbit, raw: Raw, caplog: pytest.LogCaptureFixture
) -> None:
    """R21, pain 13: as `maybe_published` it is sent again and again, and each time it ends every publish of the process."""
    caplog.set_level(logging.WARNING, "leveret")
    shop = Shop(rabbit.url)
    await rabbit.limit_messages(1_000_000)
    try:
        async with shop.app.publisher() as publisher:
            await publisher.publish(shop.Note())
            refused, *others = await shop.tried(publisher, 2_000_000, *[10] * 500)
            assert isinstance(refused, MessageTooLarge)
            assert (refused.size_bytes > 2_000_000, refused.limit_bytes) == (True, 1_000_000)
            assert [type(other) for other in others] == [Handle] * 500
            assert await raw.count(shop.queue.name) == 501, "a copy, or a loss"
            began = time.monotonic()
            [again] = await shop.tried(publisher, 2_000_000)
            assert isinstance(again, MessageTooLarge), "refused before a byte is sent"
            await publisher.publish(shop.Note())
            assert time.monotonic() - began < 1
    finally:
        await rabbit.limit_messages(134_217_728)
    assert "is lost" not in caplog.text, "the connection goes on"
    assert caplog.text.count("closed the channel") == 1


async def test_a_batch_goes_on_behind_a_job_that_is_too_large(rabbit: Rabbit, raw: Raw) -> None:
    """One large job among a thousand would end all that were on their way."""
    shop = Shop(rabbit.url)
    await rabbit.limit_messages(500_000)
    try:
        async with shop.app.publisher() as publisher:
            await publisher.publish(shop.Note())
            with pytest.raises(PublishManyError) as caught:
                await publisher.publish_many([shop.Note("x" * size) for size in (700_000, *[10] * 500)])
            refused, *others = caught.value.results
            assert isinstance(refused, MessageTooLarge)
            assert [type(other) for other in others] == [Receipt] * 500
            assert await raw.count(shop.queue.name) == 501, "a copy, or a loss"
    finally:
        await rabbit.limit_messages(134_217_728)


async def test_what_was_read_before_the_refused_job_is_said_to_be_maybe_published(rabbit: Rabbit, raw: Raw) -> None:
    """RabbitMQ confirms nothing on a channel that it closes: sent again unasked, such a job would run twice."""
    shop = Shop(rabbit.url)
    await rabbit.limit_messages(1_000_000)
    try:
        async with shop.app.publisher() as publisher:
            await publisher.publish(shop.Note())
            *before, refused, after = await shop.tried(publisher, *[10] * 200, 2_000_000, 10)
            assert isinstance(refused, MessageTooLarge)
            assert isinstance(after, Receipt)
            assert all(
                isinstance(end, Receipt) or (isinstance(end, PublishTimeout) and end.maybe_published) for end in before
            )
        # not all that were read need be there: RabbitMQ's channel forgets what it hadn't handed to a quorum queue yet
        there = [found.properties.message_id for found in await raw.take_all(shop.queue.name)]
        assert {end.job_id for end in (*before, after) if isinstance(end, Receipt)} <= set(there), "a loss"
        assert len(there) == len(set(there)), "a copy that nobody asked for"
    finally:
        await rabbit.limit_messages(134_217_728)


@pytest.mark.parametrize("exchange", ["lv.jobs", "lv.delay.digit.0"])
async def test_a_deleted_exchange_is_named_and_the_next_publish_declares_it(
    rabbit: Rabbit, raw: Raw, exchange: str, caplog: pytest.LogCaptureFixture
) -> None:
    """R22: a program that publishes for weeks must not need a restart because somebody deleted an exchange."""
    caplog.set_level(logging.WARNING, "leveret")
    shop = Shop(rabbit.url)
    delay_s = 0.25 if "delay" in exchange else 0.0
    async with shop.app.publisher() as publisher:
        await publisher.publish_many([shop.Note(), shop.Note()])
        await publisher.publish(shop.Note(), delay_s=delay_s)
        await raw.delete_exchange(exchange)
        with pytest.raises(Unroutable, match=exchange):
            await publisher.publish(shop.Note(), delay_s=delay_s)
        await publisher.publish(shop.Note(), delay_s=delay_s)
    assert "is lost" not in caplog.text, "the connection goes on"
    await raw.until_count(shop.queue.name, 4)


async def test_a_delayed_job_to_a_deleted_queue_is_unroutable(
    rabbit: Rabbit, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pain 14: the broker confirms such a job at the first hop, and it ends in `lv.lost`, where nobody looks."""
    monkeypatch.setattr(publishing, "SEEN_S", 0.1)
    shop = Shop(rabbit.url)
    async with shop.app.publisher() as publisher:
        await publisher.publish(shop.Note(), delay_s=0.25)
        await raw.until_count(shop.queue.name, 1)
        await raw.delete(shop.queue.name)
        await asyncio.sleep(0.2)
        refused = await asyncio.gather(
            *(publisher.publish(shop.Note(), delay_s=0.25) for _ in range(20)), return_exceptions=True
        )
        assert {type(end) for end in refused} == {Unroutable}
        assert f"queue {shop.queue.name} was deleted" in str(refused[0])
        await publisher.publish(shop.Note(), delay_s=0.25)
    await raw.until_count(shop.queue.name, 1)


@pytest.mark.parametrize(("exchange", "delay_s"), [("lv.delay.due", 0.25), ("lv.delay.digit.0", 2.25)])
async def test_delayed_jobs_come_on_time_after_an_exchange_on_their_way_was_deleted(
    rabbit: Rabbit,
    raw: Raw,
    exchange: str,
    delay_s: float,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Thirty confirmed jobs were counted nowhere and came three minutes late."""
    caplog.set_level(logging.WARNING, "leveret")
    monkeypatch.setattr(publishing, "SEEN_S", 0.1)
    shop = Shop(rabbit.url)
    async with shop.app.publisher() as publisher:
        await publisher.publish(shop.Note(), delay_s=delay_s)
        await raw.until_count(shop.queue.name, 1)
        await raw.delete_exchange(exchange)
        await asyncio.sleep(0.2)
        began = time.monotonic()
        await asyncio.gather(*(publisher.publish(shop.Note(), delay_s=delay_s) for _ in range(30)))
        await raw.until_count(shop.queue.name, 31)
        assert time.monotonic() - began < delay_s + 2.75
    assert caplog.text.count(f"exchange {exchange} was deleted; declaring it again") == 1


@pytest.mark.versions
async def test_jobs_that_fall_due_without_an_exchange_are_kept_and_come_with_the_command_of_operations_md(
    rabbit: Rabbit, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pain 26: dead-lettered at most once they would be gone without a word; as it is, RabbitMQ looks again after three minutes."""
    monkeypatch.setattr(publishing, "SEEN_S", 60)  # so that the publisher doesn't find out
    shop = Shop(rabbit.url)
    async with shop.app.publisher() as publisher:
        first = await publisher.publish(shop.Note(), delay_s=0.25, timeout_s=20)  # declares all that a delay needs
        await raw.until_count(shop.queue.name, 1)
        await raw.delete_exchange("lv.delay.due")
        delayed = [Outgoing(shop.Note(), delay_s=0.25) for _ in range(100)]
        due = await publisher.publish_many(delayed, timeout_s=20)
        await raw.until_count("lv.delay.250ms", 0)
    async with shop.app.publisher() as another:  # which declares the exchange again
        last = await another.publish(shop.Note(), timeout_s=20)
    policy = "look-again", r"^lv\.delay\.", '{"queue-leader-locator":"client-local"}'
    await rabbit.ctl("set_policy", "--apply-to", "queues", *policy)
    try:
        await raw.until_count(shop.queue.name, 102)
    finally:
        await rabbit.clear_policy("look-again")

    ids = {receipt.job_id for receipt in (first, *due, last)}
    assert {found.properties.message_id for found in await raw.take_all(shop.queue.name)} == ids


async def test_a_retry_that_waits_for_a_deleted_queue_declares_it_again(
    rabbit: Rabbit, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry is the only copy of its job: it must neither end in `lv.lost` nor be given up."""
    monkeypatch.setattr(publishing, "SEEN_S", 0.1)
    nodes = Nodes(addresses(rabbit.url))
    queue = Queue(f"shop-{uuid.uuid4().hex[:12]}")
    link = Publishing(nodes, Runtime(app="shop", settings=Settings()), "settle")
    settling = Settling(link, link, Routing(SystemClock()))
    delivery = Held(queue)
    try:
        await settling.again(delivery, waiting_for(queue))
        await raw.until_count(queue.name, 1)
        await raw.delete(queue.name)
        await asyncio.sleep(0.2)
        with pytest.raises(Unroutable):
            await settling.again(delivery, waiting_for(queue))
        assert delivery.acked == 1, "an ack without a copy is a lost job"
        await settling.again(delivery, waiting_for(queue))
        await raw.until_count(queue.name, 1)
    finally:
        await settling.close()
