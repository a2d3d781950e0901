"""The levers that other tests pull do what they say."""

import asyncio

import aio_pika
import pytest
from pamqp.commands import Basic

from tests.conftest import StartNode
from tests.rabbit.node import Rabbit
from tests.rabbit.proxy import FaultProxy
from tests.rabbit.raw import Raw, connect

pytestmark = pytest.mark.rabbit


async def test_what_is_published_raw_comes_back_as_it_was(raw: Raw) -> None:
    """Wire tests compare bytes and properties; a helper that fills some in would hide what leveret sends."""
    queue = "tests.raw"
    await raw.delete(queue)
    assert await raw.count(queue) is None
    await raw.declare(queue, {"x-queue-type": "quorum"})

    await raw.publish(queue, b"\x00\xff", properties=Basic.Properties(headers={"a": 1}, message_type="t"))
    await raw.until_count(queue, 1)
    [seen], [taken] = await raw.look(queue), await raw.take_all(queue)

    assert (taken.body, taken.headers["a"], taken.properties.message_type) == (b"\x00\xff", 1, "t")
    assert (taken.properties.priority, taken.properties.content_type) == (None, None)
    assert (seen.redelivered, taken.redelivered) == (False, True)  # looking counts as a delivery
    await raw.delete(queue)


async def test_an_unroutable_raw_publish_raises(raw: Raw) -> None:
    """A test that publishes into nothing would pass for the wrong reason."""
    with pytest.raises(aio_pika.exceptions.DeliveryError):
        await raw.publish("tests.nowhere", b"")


@pytest.mark.fault
async def test_a_killed_node_keeps_what_it_confirmed(rabbit_node: StartNode) -> None:
    """Fault tests count what a broker owes after kill -9; that must not depend on how the node is restarted."""
    node = await rabbit_node()
    async with connect(node.url) as raw:
        await raw.declare("kept", {"x-queue-type": "quorum"})
        await raw.publish("kept", b"x", properties=Basic.Properties(delivery_mode=2))
        await node.flush()
        await node.kill9()
    assert node.pid is None

    await node.start()

    async with connect(node.url) as raw:
        await raw.until_count("kept", 1)
    assert "kept" in await node.ctl("list_queues", "name")


@pytest.mark.fault
async def test_a_paused_node_answers_nothing_until_resumed(rabbit_node: StartNode) -> None:
    """A hang is the fault that deadlines are for; a node that still answered would leave them untested."""
    node = await rabbit_node()
    async with connect(node.url) as raw:
        node.pause()
        waiting = asyncio.ensure_future(raw.count("any"))
        done, _ = await asyncio.wait([waiting], timeout=1)
        assert not done

        node.resume()

        assert await waiting is None


async def test_a_frozen_link_passes_nothing_and_a_reset_one_is_gone(rabbit: Rabbit) -> None:
    """Half-open links and cuts are tested through this proxy."""
    port = int(rabbit.url.rsplit(":", 1)[1].rstrip("/"))
    async with FaultProxy(port) as link, connect(link.url) as raw:
        link.freeze("down")
        waiting = asyncio.ensure_future(raw.count("any"))
        done, _ = await asyncio.wait([waiting], timeout=0.5)
        assert not done
        link.thaw()
        assert await waiting is None

        link.reset()

        with pytest.raises((aio_pika.exceptions.AMQPError, OSError, TimeoutError, asyncio.CancelledError)):
            await raw.count("any")
