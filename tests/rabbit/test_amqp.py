"""The connection against a real broker: logins, cuts, closes, alarms, sizes, and a link that is slow or silent."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from pamqp import commands

from leveret.brokers.rabbitmq import RabbitSettings
from leveret.brokers.rabbitmq import connection as amqp
from leveret.brokers.rabbitmq.address import addresses
from leveret.brokers.rabbitmq.channel import Channel
from leveret.brokers.rabbitmq.confirms import Nacked, Returned, Unconfirmed
from leveret.brokers.rabbitmq.connection import Connection
from leveret.brokers.rabbitmq.frames import OVERHEAD
from leveret.brokers.rabbitmq.nodes import Nodes
from leveret.brokers.rabbitmq.wire import WRITE_HIGH_BYTES, Closed
from leveret.errors import ConfigurationError
from tests.conftest import StartNode
from tests.rabbit.node import Rabbit
from tests.rabbit.proxy import FaultProxy

pytestmark = pytest.mark.rabbit

RAW_PROPERTIES = commands.Basic.Properties(message_id="id-1", delivery_mode=2).marshal()


async def connect(url: str, timeout_s: float = 10) -> Connection:
    """Open a connection to `url`."""
    [address] = addresses(url, RabbitSettings(heartbeat_s=60))
    return await amqp.connect(address, "test", timeout_s)


@asynccontextmanager
async def connected(url: str) -> AsyncGenerator[Connection]:
    """Open a connection for the block; the block may close it."""
    connection = await connect(url)
    try:
        yield connection
    finally:
        await connection.close()


@pytest_asyncio.fixture
async def connection(rabbit: Rabbit) -> AsyncGenerator[Connection]:
    """An open connection to the session's broker."""
    async with connected(rabbit.url) as opened:
        yield opened


async def declare(channel: Channel, queue: str, arguments: dict[str, Any] | None = None) -> None:
    """Declare a queue that is deleted with its connection."""
    await channel.call(commands.Queue.Declare(queue=queue, exclusive=True, arguments=arguments or {}), 10)


async def confirming(connection: Connection) -> Channel:
    """Open a channel with confirms."""
    channel = await connection.channel(10)
    await channel.call(commands.Confirm.Select(), 10)
    return channel


def publish(channel: Channel, queue: str, body: bytes = b"x", timeout_s: float = 30, exchange: str = "") -> Unconfirmed:
    """Publish to a queue."""
    sent = Unconfirmed("id-1", queue, time.monotonic() + timeout_s)
    channel.window.publish(exchange, RAW_PROPERTIES, body, sent)
    return sent


async def ends_with_closed(waited: Awaitable[Any], code: int) -> Closed:
    """Wait at most 10 s for `waited` to raise `Closed` with `code`, and return the exception."""
    with pytest.raises(Closed) as closed:
        async with asyncio.timeout(10):
            await waited
    assert closed.value.code == code
    return closed.value


async def until_closed(connection: Connection, timeout_s: float = 10) -> Closed:
    """Wait until `connection` is closed, and return why."""
    ended: asyncio.Future[Closed] = connection.loop.create_future()
    if connection.closed is None:
        connection.on_closed = ended.set_result
        async with asyncio.timeout(timeout_s):
            await ended
    assert connection.closed is not None
    return connection.closed


async def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    """Wait until `condition` returns True."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)  # what the broker does to a connection has no event of ours


def ignore(tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
    """Take a delivery and do nothing."""


def port_of(rabbit: Rabbit) -> int:
    """Return the port in the URL of `rabbit`."""
    return int(rabbit.url.rsplit(":", 1)[1].rstrip("/"))


@pytest.mark.parametrize(
    ("login", "vhost", "code", "says"),
    [
        ("guest:wr0ng", "", 403, "is the password right"),
        ("nobody:wr0ng", "", 403, "user 'nobody'"),
        ("guest:guest", "nowhere", 530, "no vhost 'nowhere'"),
    ],
)
async def test_a_refused_login_is_one_error_that_names_the_cause(
    rabbit: Rabbit, login: str, vhost: str, code: int, says: str
) -> None:
    """A worker that tries a wrong password again and again looks like an outage of the broker; a password in a log is a leak."""
    url = f"amqp://{login}@127.0.0.1:{port_of(rabbit)}/{vhost}"
    with pytest.raises(Closed) as closed:
        await connect(url)
    assert closed.value.code == code
    with pytest.raises(ConfigurationError, match=says) as refused:
        await Nodes(addresses(url, RabbitSettings(heartbeat_s=60))).connect("test", 10)
    assert "wr0ng" not in str(refused.value)


async def test_a_mechanism_that_the_broker_doesnt_offer_is_named(rabbit: Rabbit) -> None:
    """A broker without the plugin: the operator has to read what it does offer."""
    url = f"amqp://127.0.0.1:{port_of(rabbit)}/?auth_mechanism=external"
    with pytest.raises(ConfigurationError, match=r"offers no EXTERNAL login, only .*PLAIN"):
        await Nodes(addresses(url, RabbitSettings(heartbeat_s=60))).connect("test", 10)


@pytest.mark.fault
@pytest.mark.timeout(300)
async def test_a_handshake_cut_after_any_number_of_octets_ends_with_an_error_of_the_family(rabbit: Rabbit) -> None:
    """A link that drops in the handshake would kill the worker by another error, or leave a task or a socket behind."""
    tasks = asyncio.all_tasks()
    async with FaultProxy(port_of(rabbit)) as link:
        through = 0
        while through < 2000:
            link.cut_after("down", through)
            try:
                connection = await connect(link.url, 5)
            except (Closed, OSError, TimeoutError):
                through += 1
            else:
                connection.abort()
                break
    await asyncio.sleep(0)
    gc.collect()  # an unclosed socket is a ResourceWarning, which is an error here
    assert 400 < through < 2000, "RabbitMQ's part of a handshake is some 500 octets"
    assert {task for task in asyncio.all_tasks() - tasks if not task.done()} == set()


async def test_a_handshake_through_a_dribbling_link_succeeds(rabbit: Rabbit) -> None:
    """Frames arrive in pieces on a bad link, the first ones too."""
    async with FaultProxy(port_of(rabbit)) as link:
        link.piece = 5
        async with connected(link.url) as connection:
            assert connection.usable


async def test_a_channel_that_the_broker_closes_leaves_the_others_alone(connection: Connection) -> None:
    """A missing queue (404) or one with other arguments (406) would stop all queues of a worker."""
    queue = "tests.amqp.closes"
    good = await confirming(connection)
    await declare(good, queue)
    missing = await confirming(connection)
    lost = publish(missing, "q", exchange="tests.nowhere")
    assert "no exchange" in (await ends_with_closed(lost, 404)).text
    differing = await connection.channel(10)
    declaring = differing.call(commands.Queue.Declare(queue=queue, exclusive=True, arguments={"x-max-length": 3}), 10)
    assert "inequivalent arg" in (await ends_with_closed(declaring, 406)).text
    await publish(good, queue)
    again = await confirming(connection)
    assert again.number == missing.number
    await publish(again, queue)


async def test_an_unknown_delivery_tag_closes_its_channel_alone(connection: Connection) -> None:
    """A double ack is a bug of ours: it costs a channel and says so, not the connection."""
    good, bad = await confirming(connection), await connection.channel(10)
    bad.ack(99, multiple=False)
    ended: asyncio.Future[Closed] = connection.loop.create_future()
    bad.on_closed = ended.set_result
    async with asyncio.timeout(10):
        assert (await ended).code == 406
    await declare(good, "tests.amqp.tags")
    await publish(good, "tests.amqp.tags")


@pytest.mark.fault
async def test_an_administrators_close_ends_all_that_waits_with_its_reason(rabbit_node: StartNode) -> None:
    """`rabbitmqctl close_all_connections` is how operators move load: publishes must end, and say why."""
    node = await rabbit_node()
    async with connected(node.url) as connection:
        channel = await confirming(connection)
        await declare(channel, "q")
        await channel.consume("q", "c1", ignore, 10)
        await node.close_connections("tests say so")
        closed = await until_closed(connection)
        assert (closed.scope, closed.code) == ("connection", 320)
        assert "tests say so" in closed.text
        await ends_with_closed(publish(channel, "q"), 320)


async def test_a_reset_link_ends_all_that_waits(rabbit: Rabbit) -> None:
    """What is unconfirmed must end as unknown at once, not at its deadline."""
    async with FaultProxy(port_of(rabbit)) as link, connected(link.url) as connection:
        channel = await confirming(connection)
        link.freeze("up")
        waiting: list[Awaitable[Any]] = [
            publish(channel, "q"),
            asyncio.ensure_future(channel.call(commands.Queue.Declare(queue="q"), 10)),
        ]
        await asyncio.sleep(0)
        link.reset()
        for one in waiting:
            assert (await ends_with_closed(one, 0)).scope == "socket"


async def test_a_close_that_is_cancelled_closes_all_the_same(rabbit: Rabbit) -> None:
    """A service ends its shutdown after some seconds: a connection that is left open keeps what it was delivered, as long as the program lives."""
    async with FaultProxy(port_of(rabbit)) as link:
        opened = await connect(link.url)
        link.freeze()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await opened.close()
        assert opened.closed is not None


@pytest.mark.fault
async def test_a_frozen_link_is_given_up_and_an_idle_one_is_kept(rabbit: Rabbit) -> None:
    """A half-open link would hang until the kernel gives up; a worker without jobs must not be dropped by the broker."""
    async with FaultProxy(port_of(rabbit)) as link, connected(f"{link.url}?heartbeat=1") as connection:
        await asyncio.sleep(3.2)  # idle time itself is what is tested
        channel = await confirming(connection)
        await declare(channel, "tests.amqp.idle")
        await publish(channel, "tests.amqp.idle")
        link.freeze()
        frozen = time.monotonic()
        closed = await until_closed(connection)
        assert closed.scope == "socket"
        assert "nothing was heard" in closed.text
        assert 1.5 < time.monotonic() - frozen < 6  # once more an interval after each time that this loop stood still


@pytest.mark.fault
async def test_an_alarm_blocks_and_its_end_unblocks(rabbit_node: StartNode) -> None:
    """A node short of memory takes no publishes: they wait, and whoever waits has to be told why."""
    node = await rabbit_node()
    async with connected(node.url) as connection:
        channel = await confirming(connection)
        await declare(channel, "q")
        await node.alarm(on=True)
        waiting = publish(channel, "q", timeout_s=60)  # RabbitMQ tells those who publish
        await until(lambda: connection.blocked is not None)
        assert connection.blocked == "low on memory"
        assert not waiting.ended
        await node.alarm(on=False)
        await waiting
        await until(lambda: connection.blocked is None)


async def test_of_two_with_one_id_only_the_one_that_no_queue_took_is_returned(connection: Connection) -> None:
    """A job's repeat has its id: the wrong caller would hear that its publish failed."""
    channel = await confirming(connection)
    await declare(channel, "tests.amqp.there")
    gone, there, gone_again = (
        publish(channel, queue) for queue in ("tests.amqp.gone", "tests.amqp.there", "tests.amqp.gone")
    )
    await there
    for one in (gone, gone_again):
        with pytest.raises(Returned, match="NO_ROUTE"):
            await one


async def test_a_full_queues_refusal_is_a_nack(connection: Connection) -> None:
    """x-overflow=reject-publish: a refusal taken for a confirm is a lost job."""
    channel = await confirming(connection)
    await declare(channel, "tests.amqp.full", {"x-max-length": 1, "x-overflow": "reject-publish"})
    await publish(channel, "tests.amqp.full")
    with pytest.raises(Nacked):
        await publish(channel, "tests.amqp.full")


async def test_many_publishes_are_each_confirmed(connection: Connection) -> None:
    """Confirms come single, multiple and out of order; each must end its own publish."""
    channel = await confirming(connection)
    await declare(channel, "tests.amqp.many")
    publishes: list[Unconfirmed] = []
    for number in range(5000):
        if channel.window.full:
            await channel.window.room()
        publishes.append(publish(channel, "tests.amqp.many", b"%d" % number))
    await asyncio.gather(*publishes)
    answer = await channel.call(commands.Queue.Declare(queue="tests.amqp.many", exclusive=True), 10)
    assert isinstance(answer, commands.Queue.DeclareOk)
    assert answer.message_count == 5000


FRAME_MAX = 131_072
SIZES = [0, 1, FRAME_MAX - OVERHEAD - 1, FRAME_MAX - OVERHEAD, FRAME_MAX - OVERHEAD + 1, 1 << 20, 15 << 20]


async def test_bodies_of_every_size_arrive_byte_for_byte(connection: Connection) -> None:
    """An off-by-one in splitting or joining mixes one job's body with another's."""
    channel = await confirming(connection)
    await declare(channel, "tests.amqp.sizes")
    bodies: list[bytes] = []
    for size in SIZES:
        bodies += [random.Random(size).randbytes(size), b"small %d" % size]
    await asyncio.gather(*(publish(channel, "tests.amqp.sizes", body, 60) for body in bodies))
    got: list[tuple[int, bytes]] = []
    all_there: asyncio.Future[None] = connection.loop.create_future()

    def deliver(tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        assert properties == RAW_PROPERTIES
        got.append((tag, body))
        if len(got) == len(bodies):
            all_there.set_result(None)

    await channel.consume("tests.amqp.sizes", "c1", deliver, 10)
    async with asyncio.timeout(60):
        await all_there
    assert [tag for tag, _ in got] == list(range(1, len(bodies) + 1))
    assert all(one == body for (_, one), body in zip(got, bodies, strict=True))
    channel.ack(len(bodies), multiple=True)
    await channel.cancel("c1", 10)
    assert await channel.get("tests.amqp.sizes", 10) is None


async def test_a_body_is_taken_by_get_as_it_was_published(connection: Connection) -> None:
    """Admin reads dead letters by it: what it shows must be what lies there."""
    channel = await confirming(connection)
    await declare(channel, "tests.amqp.get")
    assert await channel.get("tests.amqp.get", 10) is None
    await publish(channel, "tests.amqp.get", b"\x00\xce\xff")
    got = await channel.get("tests.amqp.get", 10)
    assert got is not None
    assert (got.body, got.properties, got.redelivered) == (b"\x00\xce\xff", RAW_PROPERTIES, False)
    channel.nack(got.tag)
    again = await channel.get("tests.amqp.get", 10)
    assert again is not None
    assert again.redelivered
    channel.reject(again.tag)
    assert await channel.get("tests.amqp.get", 10) is None


async def test_a_deleted_queue_cancels_its_consumer(connection: Connection) -> None:
    """Without the broker's word a worker waits for jobs of a queue that isn't there."""
    channel = await connection.channel(10)
    await declare(channel, "tests.amqp.deleted")
    cancelled: asyncio.Future[str] = connection.loop.create_future()
    channel.on_cancelled = cancelled.set_result
    await channel.consume("tests.amqp.deleted", "c1", ignore, 10)
    other = await connection.channel(10)
    await other.call(commands.Queue.Delete(queue="tests.amqp.deleted"), 10)
    async with asyncio.timeout(10):
        assert await cancelled == "c1"
    assert channel.closed is None


async def test_closing_a_channel_gives_back_what_is_unsettled_and_keeps_what_was_acked(connection: Connection) -> None:
    """The end of every worker: an ack that was written and lost is a job that runs twice."""
    channel = await confirming(connection)
    await declare(channel, "tests.amqp.unsettled")
    await asyncio.gather(*(publish(channel, "tests.amqp.unsettled", b"%d" % number) for number in range(3)))
    consuming = await connection.channel(10)
    got: list[int] = []

    def deliver(tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        got.append(tag)

    await consuming.consume("tests.amqp.unsettled", "c1", deliver, 10)
    await until(lambda: len(got) == 3)
    consuming.ack(2, multiple=True)
    await consuming.close()
    back = await channel.get("tests.amqp.unsettled", 10)
    assert back is not None
    assert (back.body, back.redelivered) == (b"2", True)
    assert await channel.get("tests.amqp.unsettled", 10) is None


@pytest.mark.fault
async def test_a_slow_link_holds_publishers_while_heartbeats_keep_it_open(rabbit: Rabbit) -> None:
    """Unsent bytes would fill the memory; a link that is only slow must not be taken for a dead one."""
    async with FaultProxy(port_of(rabbit)) as link, connected(f"{link.url}?heartbeat=1") as connection:
        channel = await confirming(connection)
        await declare(channel, "tests.amqp.slow")
        link.rate = 6_000_000
        waited, sent = 0, 0
        publishes: list[Unconfirmed] = []
        most = 0
        body = bytes(1 << 18)
        while sent < 25 << 20:
            if channel.window.full:
                waited += 1
                await channel.window.room()
            publishes.append(publish(channel, "tests.amqp.slow", body, 60))
            sent += len(body)
            await asyncio.sleep(0)
            most = max(most, vars(connection)["_transport"].get_write_buffer_size())
        assert waited > 3
        assert most < 3 * WRITE_HIGH_BYTES
        await asyncio.gather(*publishes)
        assert connection.usable
