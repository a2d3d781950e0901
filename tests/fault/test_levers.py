"""The levers of the fault tests do what they say: a test whose fault never struck shows nothing."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Generator
from typing import Any

import aio_pika
import aiormq
import pytest

from tests.nodes import ours
from tests.rabbit.cluster import Cluster
from tests.rabbit.node import Installation, Node, Rabbit
from tests.rabbit.raw import Raw, connect

pytestmark = [pytest.mark.fault, pytest.mark.rabbit, pytest.mark.versions, pytest.mark.timeout(120)]

QUORUM: dict[str, Any] = {"x-queue-type": "quorum"}


@pytest.fixture(scope="module")
def node(rabbit_found: Rabbit | Installation) -> Generator[Node]:
    """A node of this module's own: its limits are changed."""
    own = Node(ours(rabbit_found))
    try:
        asyncio.run(own.start())
        yield own
    finally:
        asyncio.run(own.close())


@pytest.fixture
async def opened(node: Node) -> AsyncGenerator[Raw]:
    """A plain connection to it."""
    async with connect(node.url) as raw:
        yield raw


async def test_a_stopped_queue_has_no_leader_and_then_has_one_again(node: Node) -> None:
    """All tests of a sick queue rest on this: nothing answers for it, and what it holds is there afterwards."""
    async with connect(node.url) as raw:
        await raw.declare("sick", QUORUM)
        await raw.publish("sick", b"kept")
    await node.stop_queue("sick")
    with pytest.raises(aiormq.exceptions.AMQPError):  # the whole connection ends: 541
        async with connect(node.url) as raw:
            await raw.take_all("sick")
    await node.start_queue("sick")
    async with connect(node.url) as raw:
        assert [one.body for one in await raw.take_all("sick")] == [b"kept"]


async def test_all_connections_are_closed(node: Node) -> None:
    """A test of reconnecting would go on with the connection it had."""
    connection = await aio_pika.connect(node.url, timeout=20)
    closed = asyncio.Event()
    connection.close_callbacks.add(lambda *_: closed.set())
    await node.close_connections()
    async with asyncio.timeout(20):
        await closed.wait()


async def test_a_delivery_that_is_held_too_long_ends_its_channel(node: Node) -> None:
    """A test of long jobs would wait half an hour for RabbitMQ's own limit, or see nothing."""
    await node.limit_consumers(2)
    async with connect(node.url) as raw, raw.channel() as channel:
        await channel.queue_declare("slow", durable=True, arguments=QUORUM)
        ended = asyncio.Event()
        channel.closing.add_done_callback(lambda _: ended.set())
        channel.on_consumer_cancel_callbacks.add(lambda _: ended.set())  # what 4.3 does instead
        await channel.basic_consume("slow", lambda _: asyncio.sleep(0))
        await channel.basic_publish(b"", routing_key="slow")
        async with asyncio.timeout(15):
            await ended.wait()


async def test_a_message_above_the_limit_is_refused(node: Node, opened: Raw) -> None:
    """A test of too large jobs would have to send 128 MiB."""
    await opened.declare("small", QUORUM)
    await node.limit_messages(1000)
    with pytest.raises(aiormq.exceptions.ChannelPreconditionFailed):
        await opened.publish("small", b"x" * 1001)
    await opened.publish("small", b"x" * 1000)


async def test_an_alarm_blocks_publishers_until_it_is_over(node: Node, opened: Raw) -> None:
    """A test of a blocked broker would publish to one that takes all."""
    await opened.declare("full", QUORUM)
    await node.alarm(on=True)
    publishing = asyncio.create_task(opened.publish("full", b""))
    await asyncio.sleep(1)
    assert not publishing.done()
    await node.alarm(on=False)
    await asyncio.wait_for(publishing, 20)


async def test_a_policy_applies_until_it_is_cleared(node: Node, opened: Raw) -> None:
    """A test of a full dead-letter queue would find it empty and willing."""
    await opened.declare("bounded", QUORUM)

    async def refuses() -> bool:
        try:
            await asyncio.gather(*(opened.publish("bounded", b"") for _ in range(50)))
        except aiormq.exceptions.DeliveryError:
            return True
        return False

    async with asyncio.timeout(20):  # RabbitMQ tells the queue after the command has returned
        await node.set_policy("test", "^bounded$", {"max-length": 1, "overflow": "reject-publish"})
        while not await refuses():
            pass
        await node.clear_policy("test")
        while await refuses():
            pass


async def test_a_node_that_is_cut_from_its_peers_is_reached_and_confirms_nothing(cluster: Cluster) -> None:
    """A partition that isn't one makes each test of it pass."""
    queue = f"levers-{uuid.uuid4().hex[:12]}"
    async with connect(cluster.nodes[1].url) as raw:
        await raw.declare(queue, QUORUM)
        await cluster.lead(queue, cluster.nodes[0])
        cluster.isolate(cluster.nodes[0])
        async with connect(cluster.nodes[0].url) as cut:
            with pytest.raises((TimeoutError, aiormq.exceptions.AMQPError)):
                await asyncio.wait_for(cut.publish(queue, b"lost in the cut"), 5)
        await raw.publish(queue, b"confirmed by two of three")
        cluster.heal()
        await cluster.whole()
        assert b"confirmed by two of three" in [one.body for one in await raw.take_all(queue)]
        await raw.delete(queue)


async def test_a_node_that_is_cut_from_its_clients_is_silent_and_serves_its_peers(cluster: Cluster) -> None:
    """A half-open link is the fault that no socket reports; a refused one would be another test."""
    cluster.cut_off(cluster.nodes[0])
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(aio_pika.connect(cluster.nodes[0].url), 2)
    assert time.monotonic() - began >= 2, "refused, not silent"
    assert len(await cluster.members(cluster.nodes[1])) == 3
