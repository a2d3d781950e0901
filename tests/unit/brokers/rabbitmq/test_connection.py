"""A connection against a peer that says what the test tells it: limits, endings and faults that a real broker seldom shows."""

from __future__ import annotations

import asyncio
import gc
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pamqp.frame
import pytest
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from leveret import App, Job, PublishTimeout, Queue, Settings
from leveret.brokers.rabbitmq import RabbitSettings
from leveret.brokers.rabbitmq import connection as amqp
from leveret.brokers.rabbitmq.address import Address, addresses
from leveret.brokers.rabbitmq.channel import Channel
from leveret.brokers.rabbitmq.confirms import WINDOW, Late, Nacked, Returned, Unconfirmed
from leveret.brokers.rabbitmq.connection import BROKERS_HEADERS_BYTES, Connection
from leveret.brokers.rabbitmq.wire import CLOSE_TIMEOUT_S, WRITE_HIGH_BYTES, Closed

_T = TypeVar("_T")
START = commands.Connection.Start(server_properties={"product": "a test"}, mechanisms="PLAIN AMQPLAIN", locales="en_US")
TUNE = commands.Connection.Tune(channel_max=2047, frame_max=131_072, heartbeat=60)
PROPERTIES = commands.Basic.Properties(message_id="id-1")
RAW_PROPERTIES = PROPERTIES.marshal()
DELIVER = commands.Basic.Deliver(consumer_tag="c1", delivery_tag=1, redelivered=False, exchange="", routing_key="q")


def octets(frame: Any, channel: int = 1) -> bytes:
    """Return a frame as pamqp builds it."""
    return pamqp.frame.marshal(frame, channel)


def content(method: Any, body: bytes, channel: int = 1, properties: commands.Basic.Properties = PROPERTIES) -> bytes:
    """Return a whole content."""
    frames = [octets(method, channel), octets(ContentHeader(body_size=len(body), properties=properties), channel)]
    return b"".join([*frames, octets(ContentBody(body), channel)] if body else frames)


class Peer:
    """The broker's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    def say(self, *frames: Any, channel: int = 1) -> None:
        """Send frames, or octets as they are, in one write."""
        self.writer.write(b"".join(one if isinstance(one, bytes) else octets(one, channel) for one in frames))

    async def hear(self, kind: type[_T]) -> tuple[int, _T]:
        """Return the next frame of that kind, with its channel; others before it are passed over."""
        async with asyncio.timeout(5):
            while True:
                head = await self._reader.readexactly(7)
                rest = await self._reader.readexactly(int.from_bytes(head[3:7], "big") + 1)
                _, channel, frame = pamqp.frame.unmarshal(head + rest)
                if isinstance(frame, kind):
                    return channel, frame

    async def hear_header(self) -> None:
        """Read the protocol header."""
        assert await self._reader.readexactly(8) == b"AMQP\x00\x00\x09\x01"

    async def greet(self, tune: commands.Connection.Tune = TUNE, *, after: bytes = b"") -> None:
        """Go through the handshake; `after` follows its last frame in the same write."""
        await self.hear_header()
        self.say(START, channel=0)
        await self.hear(commands.Connection.StartOk)
        self.say(tune, channel=0)
        await self.hear(commands.Connection.Open)
        self.say(octets(commands.Connection.OpenOk(), 0) + after)

    async def open(self) -> int:
        """Answer a channel.open."""
        number, _ = await self.hear(commands.Channel.Open)
        self.say(commands.Channel.OpenOk(), channel=number)
        return number


@asynccontextmanager
async def listening(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> AsyncGenerator[Address]:
    """Run a server of the test's own; whatever it still holds at the end is dropped."""
    writers: list[asyncio.StreamWriter] = []

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await serve(reader, writer)

    server = await asyncio.start_server(served, "127.0.0.1", 0)
    try:
        [address] = addresses(
            f"amqp://u:p@127.0.0.1:{server.sockets[0].getsockname()[1]}/", RabbitSettings(heartbeat_s=60)
        )
        yield address
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await server.wait_closed()


@asynccontextmanager
async def talking(tune: commands.Connection.Tune = TUNE) -> AsyncGenerator[tuple[Connection, Peer]]:
    """Open a connection and hand over both ends."""
    peers: asyncio.Queue[Peer] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        await peer.greet(tune)
        await peers.put(peer)

    async with listening(serve) as address:
        connection = await amqp.connect(address, "test", 5)
        try:
            yield connection, await peers.get()
        finally:
            connection.abort()


async def opened(connection: Connection, peer: Peer) -> Channel:
    """Open a channel."""
    channel, _ = await asyncio.gather(connection.channel(5), peer.open())
    return channel


def publish(
    channel: Channel, key: str = "q", message_id: str = "id-1", timeout_s: float = 60.0, body: bytes = b"x"
) -> Unconfirmed:
    """Publish a small body."""
    sent = Unconfirmed(message_id, key, time.monotonic() + timeout_s)
    channel.window.publish("", RAW_PROPERTIES, body, sent)
    return sent


async def ends_with_closed(waited: Any, code: int) -> Closed:
    """Wait for it, 5 s at most; it must end with that code."""
    with pytest.raises(Closed) as closed:
        async with asyncio.timeout(5):
            await waited
    assert closed.value.code == code
    return closed.value


async def until_closed(connection: Connection) -> Closed:
    """Wait until it says that it was closed."""
    ended: asyncio.Future[Closed] = connection.loop.create_future()
    if connection.closed is None:
        connection.on_closed = ended.set_result
        async with asyncio.timeout(5):
            await ended
    assert connection.closed is not None
    return connection.closed


async def test_the_peers_first_word_may_come_before_anybody_waits_for_it() -> None:
    """A broker that is quick would be taken for one that broke the protocol: start-up fails now and then."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        peer.say(START, channel=0)
        await peer.hear_header()
        await peer.hear(commands.Connection.StartOk)
        peer.say(TUNE, channel=0)
        await peer.hear(commands.Connection.Open)
        peer.say(commands.Connection.OpenOk(), channel=0)

    async with listening(serve) as address:
        connection = await amqp.connect(address, "test", 5)
        connection.abort()


async def test_a_handshake_cut_after_any_octet_ends_with_an_error_of_the_family() -> None:
    """A load balancer that drops links would kill the worker with an IndexError, or leave it waiting."""
    stages = [octets(START, 0), octets(TUNE, 0), octets(commands.Connection.OpenOk(), 0)]
    whole = sum(map(len, stages))
    before = asyncio.all_tasks()
    left = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        allowed = left
        peer = Peer(reader, writer)
        await peer.hear_header()
        for stage, answer in zip(stages, (commands.Connection.StartOk, commands.Connection.Open, None), strict=True):
            writer.write(stage[:allowed])
            allowed -= len(stage)
            if allowed < 0:
                break
            if answer is not None:
                await peer.hear(answer)
        writer.close()

    async with listening(serve) as address:
        for left in range(whole):  # noqa: B007 - the server reads it
            with pytest.raises((Closed, OSError)):
                await amqp.connect(address, "test", 5)
        left = whole
        connection = await amqp.connect(address, "test", 5)
        assert (await until_closed(connection)).scope == "socket"
    await asyncio.sleep(0)
    gc.collect()  # an unclosed socket is a ResourceWarning, which is an error here
    assert {task for task in asyncio.all_tasks() - before if not task.done()} == set()


async def test_a_peer_that_says_nothing_costs_the_deadline_and_no_more() -> None:
    """A half-open link would hang a web service's start."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with listening(serve) as address:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            await amqp.connect(address, "test", 0.2)
        assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("said", "code", "says"),
    [
        (octets(commands.Connection.OpenOk(), 0), 503, "sent Connection.OpenOk instead of Connection.Start"),
        (octets(START, 0) * 2, 503, "nothing waits for it"),
        (b"AMQP\x00\x00\x08\x00", 501, "another version"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", 501, "is this an AMQP port"),
        (b"\x15\x03\x03\x00\x02\x02\x46", 501, "speaks TLS"),
        (octets(commands.Connection.Close(403, "ACCESS_REFUSED", 0, 0), 0), 403, "ACCESS_REFUSED"),
        (octets(commands.Connection.Start(mechanisms="GSSAPI SCRAM"), 0), 403, "no PLAIN login, only GSSAPI SCRAM"),
    ],
    ids=["open-ok", "two-starts", "amqp-0-8", "http", "tls-alert", "close", "no-plain"],
)
async def test_an_answer_that_is_no_handshake_is_named(said: bytes, code: int, says: str) -> None:
    """A wrong port or a wrong login is the commonest fault at start-up: the words find it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await reader.read()

    async with listening(serve) as address:
        closed = await ends_with_closed(amqp.connect(address, "test", 5), code)
    assert says in closed.text


async def test_a_close_that_comes_with_the_open_ok_isnt_taken_for_an_open_connection() -> None:
    """A broker that shuts down as we connect: the caller would hold a dead connection whose timer writes on."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await Peer(reader, writer).greet(after=octets(commands.Connection.Close(320, "CONNECTION_FORCED", 0, 0), 0))
        await reader.read()

    async with listening(serve) as address:
        await ends_with_closed(amqp.connect(address, "test", 5), 320)


async def test_the_smaller_limits_are_agreed_on() -> None:
    """A broker set to smaller frames or fewer channels closes the connection of whoever passes them."""
    async with talking(commands.Connection.Tune(channel_max=1, frame_max=4096, heartbeat=7)) as (connection, peer):
        channel = await opened(connection, peer)
        with pytest.raises(Closed, match="all 1 channels are in use"):
            await connection.channel(5)
        publish(channel, body=bytes(4089))
        _, first = await peer.hear(ContentBody)
        _, second = await peer.hear(ContentBody)
        assert (connection.frame_max, len(first.value), len(second.value)) == (4096, 4088, 1)


ACK_OF_NOTHING = commands.Basic.Ack(delivery_tag=5, multiple=False)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"\x01\x00\x01\x7f\xff\xff\xff\x00", 501),
        (octets(ContentBody(bytes(131_072 + BROKERS_HEADERS_BYTES + 1 - 8))), 501),
        (b"\x01\x00\x01\x00\x00\x00\x04\x00\x99\x00\x99\xce", 502),
        (octets(commands.Queue.DeclareOk("q", 0, 0), 9), 504),
        (content(DELIVER, b"x", 9), 504),
        (content(commands.Basic.Return(312, "NO_ROUTE", "", "q"), b"x", 9), 504),
        (octets(ACK_OF_NOTHING, 9), 504),
        (octets(ACK_OF_NOTHING), 503),
        (octets(commands.Queue.DeclareOk("q", 0, 0)), 503),
        (content(commands.Basic.GetOk(1, False, "", "q", 0), b"x"), 503),
        (octets(commands.Connection.OpenOk(), 0), 503),
        (octets(DELIVER) + octets(commands.Basic.Cancel("c1")), 505),
        (octets(Heartbeat(), 0)[:-1] + b"\x00", 501),
    ],
    ids=[
        "huge-frame",
        "frame-above-max",
        "unknown-class",
        "method-elsewhere",
        "deliver-elsewhere",
        "return-elsewhere",
        "confirm-elsewhere",
        "confirm-of-nothing",
        "answer-to-nothing",
        "got-unasked",
        "open-ok-again",
        "method-in-content",
        "no-frame-end",
    ],
)
async def test_a_broken_protocol_closes_the_connection_with_its_code(said: bytes, code: int) -> None:
    """Going on after a frame that can't be understood acks the wrong jobs; the code in both logs finds who erred."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        waiting = publish(channel)
        peer.say(said)
        _, close = await peer.hear(commands.Connection.Close)
        assert close.reply_code == code
        assert (await ends_with_closed(waiting, code)).scope == "connection"
        assert channel.closed is connection.closed


async def test_a_protocol_error_to_a_peer_that_reads_nothing_still_frees_the_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last word can't be sent: each such ending would leave a socket and its megabyte behind."""
    monkeypatch.setattr(amqp, "CLOSE_TIMEOUT_S", 0.1)
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        while connection.writable:
            publish(channel, body=bytes(1 << 20))
            await asyncio.sleep(0)
        lost = connection.loop.create_future()
        was_lost = connection.connection_lost

        def connection_lost(error: Exception | None) -> None:
            was_lost(error)
            lost.set_result(None)

        monkeypatch.setattr(connection, "connection_lost", connection_lost)
        peer.say(b"HTTP/1.1 ")
        async with asyncio.timeout(5):
            await lost
        assert connection.closed is not None
        assert connection.closed.code == 501


async def test_a_silent_peer_is_given_up_after_two_heartbeats() -> None:
    """A pulled cable sends no RST: publishers would wait for the kernel's quarter of an hour."""
    async with talking(commands.Connection.Tune(channel_max=0, frame_max=0, heartbeat=1)) as (connection, _):
        started = time.monotonic()
        closed = await until_closed(connection)
        assert closed.scope == "socket"
        assert "nothing was heard" in closed.text
        assert 1.9 < time.monotonic() - started < 5  # once more an interval after each time that this loop stood still


async def test_an_idle_connection_beats() -> None:
    """The broker would close it after two intervals without a word."""
    async with talking(commands.Connection.Tune(channel_max=0, frame_max=0, heartbeat=1)) as (_, peer):
        started = time.monotonic()
        await peer.hear(Heartbeat)
        await peer.hear(Heartbeat)
        assert time.monotonic() - started < 2


async def test_each_publish_ends_with_the_brokers_word_on_it() -> None:
    """A confirm that is read as another's loses a job without a trace."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        one, two, three, four, five = (publish(channel) for _ in range(5))
        peer.say(commands.Basic.Ack(2, False), commands.Basic.Nack(1, False), commands.Basic.Ack(4, True))
        await asyncio.gather(two, three, four)
        with pytest.raises(Nacked):
            await one
        assert not five.ended
        peer.say(commands.Basic.Nack(0, True))
        with pytest.raises(Nacked):
            await five


async def test_only_the_publish_that_no_queue_took_is_returned() -> None:
    """A job and its repeat share an id: telling the wrong caller that it failed publishes one thrice and the other never."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        there, gone, gone_again = publish(channel, "there"), publish(channel, "gone"), publish(channel, "gone")
        back = content(commands.Basic.Return(312, "NO_ROUTE", "", "gone"), b"x")
        peer.say(back, back, commands.Basic.Ack(3, True))
        await there
        for one in (gone, gone_again):
            with pytest.raises(Returned) as returned:
                await one
            assert returned.value.code == 312


async def test_a_return_without_an_id_is_that_of_the_oldest_with_its_key() -> None:
    """A proxy or a broker that leaves the properties out: the ack behind it would be a receipt for a job that is nowhere."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        there, gone, later = (
            publish(channel, "there", "a"),
            publish(channel, "gone", "b"),
            publish(channel, "gone", "c"),
        )
        back = content(commands.Basic.Return(312, "NO_ROUTE", "", "gone"), b"", properties=commands.Basic.Properties())
        peer.say(back, commands.Basic.Ack(2, True))
        await there
        with pytest.raises(Returned):
            await gone
        assert not later.ended
        peer.say(commands.Basic.Ack(3, False))
        await later


async def test_a_publish_ends_at_its_deadline_and_a_return_after_it_is_forgotten() -> None:
    """A broker that stays silent must cost a web request its timeout, not more; what comes late must not pile up."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        started = time.monotonic()
        late, in_time = publish(channel, "gone", timeout_s=0.1), publish(channel)
        with pytest.raises(Late):
            await late
        assert 0.1 <= time.monotonic() - started < 5
        peer.say(content(commands.Basic.Return(312, "NO_ROUTE", "", "gone"), b"x"), commands.Basic.Ack(2, True))
        await in_time
        assert (channel.window._returned, channel.window._unconfirmed) == ({}, {})


async def test_single_confirms_and_then_one_of_many_leave_nothing_unconfirmed() -> None:
    """RabbitMQ mixes them; a publish that is skipped waits for its deadline though it is safe."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        futures = [publish(channel) for _ in range(30)]
        peer.say(*(commands.Basic.Ack(tag, False) for tag in range(1, 20) if tag != 5), commands.Basic.Ack(30, True))
        async with asyncio.timeout(5):
            await asyncio.gather(*futures)
        assert not channel.window._unconfirmed


async def filled(connection: Connection, peer: Peer) -> Channel:
    """Return a channel whose window is full."""
    channel = await opened(connection, peer)
    for _ in range(WINDOW):
        assert not channel.window.full
        publish(channel)
    assert channel.window.full
    return channel


async def in_line(channel: Channel, names: str) -> tuple[list[str], dict[str, asyncio.Task[None]]]:
    """Let publishers wait for room, one after another; each writes down its name as it publishes."""
    went: list[str] = []

    async def wait(name: str) -> None:
        await channel.window.room()
        went.append(name)
        publish(channel)

    tasks: dict[str, asyncio.Task[None]] = {}
    for name in names:
        tasks[name] = asyncio.create_task(wait(name))
        await asyncio.sleep(0)
    return went, tasks


async def test_a_full_window_lets_publishers_in_first_come_first_served() -> None:
    """A publisher overtaken for ever times out under load, though the broker keeps up."""
    async with talking() as (connection, peer):
        channel = await filled(connection, peer)
        went, tasks = await in_line(channel, "abcdefgh")
        peer.say(
            *(commands.Basic.Ack(tag, False) for tag in (1, 2, 3))
        )  # three in one read: no more than three may wake
        await asyncio.gather(*(tasks[name] for name in "abc"))
        assert went == ["a", "b", "c"]
        assert channel.window.full
        peer.say(commands.Basic.Ack(10, True))
        await asyncio.gather(*tasks.values())
        assert "".join(went) == "abcdefgh"


async def test_a_queue_that_confirms_nothing_leaves_room_for_the_others() -> None:
    """One queue without its majority would end all publishing of a process, other queues' retries and burials among it."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        stuck = [publish(channel, "stuck", timeout_s=0.1) for _ in range(WINDOW)]
        _, tasks = await in_line(channel, "ab")  # nothing else wakes them
        async with asyncio.timeout(5):
            await asyncio.gather(*tasks.values())
        await stuck[-1].wait()
        assert all(isinstance(one.failure, Late) for one in stuck)
        well = publish(channel, "well")
        peer.say(commands.Basic.Ack(WINDOW + 3, False))
        await well
        await publish_confirmed(channel, peer)
        assert (channel.window._unconfirmed, channel.window._late) == ({}, 0)


async def test_what_ended_without_a_confirm_is_not_kept_for_ever() -> None:
    """Publishes to a queue that is stuck for a day would fill the memory."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        for _ in range(12):
            for _ in range(WINDOW):
                last = publish(channel, "stuck", timeout_s=0)
            await last.wait()
        assert len(channel.window._unconfirmed) == channel.window._late == 9 * WINDOW
        assert not channel.window.full
        peer.say(commands.Basic.Ack(1, False), commands.Basic.Ack(12 * WINDOW, True))  # one that is forgotten, and all
        await publish_confirmed(channel, peer)
        assert (channel.window._unconfirmed, channel.window._late) == ({}, 0)


async def publish_confirmed(channel: Channel, peer: Peer) -> None:
    """Publish, and confirm all; what the peer said before is taken in by then."""
    sent = publish(channel)
    peer.say(commands.Basic.Ack(0, True))
    async with asyncio.timeout(5):
        await sent


async def test_what_a_publish_waits_for_is_said_as_it_is() -> None:
    """Who reads of a thousand unconfirmed publishes looks for them, in a process that has sent none."""
    async with talking() as (connection, peer):
        channel = await filled(connection, peer)
        assert channel.window.why_full == "1000 publishes are unconfirmed"
        await publish_confirmed(channel, peer)
        connection.pause_writing()
        assert channel.window.why_full == "RabbitMQ doesn't read from the connection"


async def test_a_queue_whose_declare_isnt_answered_is_said_to_be_just_that() -> None:
    """The declare of a quorum queue without its majority hangs: that is to be looked at, not the confirms of others."""
    notes = Queue("notes")

    class Note(Job, name="note", queue=notes):
        """A job."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        await peer.greet()
        number = await peer.open()
        await peer.hear(commands.Confirm.Select)
        peer.say(commands.Confirm.SelectOk(), channel=number)
        await peer.open()
        await reader.read()

    async with (
        listening(serve) as address,
        App("test", broker=f"amqp://u:p@127.0.0.1:{address.port}/").publisher() as publisher,
    ):
        with pytest.raises(
            PublishTimeout, match=r"nothing was sent in time: RabbitMQ hasn't answered the declaration of the queue$"
        ):
            await publisher.publish(Note(), timeout_s=0.5)


async def test_nobody_overtakes_those_who_wait() -> None:
    """Whoever asks at the right moment would take the place of one who has waited for seconds."""
    async with talking() as (connection, peer):
        channel = await filled(connection, peer)
        went, tasks = await in_line(channel, "a")
        channel.window.on_confirm(1, False, True)  # as the reader would, before `a` had its turn
        assert channel.window.full
        late, more = await in_line(channel, "z")
        await tasks["a"]
        assert (went, late) == (["a"], [])
        channel.window.on_confirm(2, False, True)
        await more["z"]


async def test_a_cancelled_waiter_loses_nobodys_wake_up() -> None:
    """A request that timed out as it was woken would leave the next one waiting for ever."""
    async with talking() as (connection, peer):
        channel = await filled(connection, peer)
        went, tasks = await in_line(channel, "abc")
        tasks["b"].cancel()  # while it waits
        channel.window.on_confirm(1, False, True)
        tasks["a"].cancel()  # after it was woken
        async with asyncio.timeout(5):
            await tasks["c"]
        assert went == ["c"]
        assert channel.window.full
        channel.window.on_confirm(2, False, True)
        assert not channel.window.full


async def test_a_closed_channel_wakes_all_who_wait_for_room() -> None:
    """They would wait for confirms that never come."""
    async with talking() as (connection, peer):
        channel = await filled(connection, peer)
        _, tasks = await in_line(channel, "abc")
        peer.say(commands.Channel.Close(406, "PRECONDITION_FAILED", 0, 0))
        async with asyncio.timeout(5):
            await asyncio.gather(*tasks.values())
        await ends_with_closed(publish(channel), 406)


async def test_a_peer_that_reads_slowly_makes_publishers_wait_and_not_acks() -> None:
    """Unbounded buffers fill the memory; acks that wait behind them bring redeliveries."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        sent = 0
        while not channel.window.full:
            publish(channel, body=bytes(1 << 19))
            sent += 1
            await asyncio.sleep(0)
        assert not connection.writable
        assert sent < 100
        waiting = asyncio.create_task(channel.window.room())
        channel.ack(77, multiple=True)
        await asyncio.sleep(0)
        assert not waiting.done()
        _, ack = await peer.hear(commands.Basic.Ack)  # reads all that was before it
        assert ack.delivery_tag == 77
        async with asyncio.timeout(5):
            await waiting
        assert connection.writable


async def test_large_bodies_of_one_turn_of_the_loop_wait_for_the_next() -> None:
    """A window of 1 MB bodies, written at once, takes a gigabyte and holds up the loop for seconds."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        reading = asyncio.create_task(peer.hear(commands.Basic.Ack))  # and all before it
        large, most, order = bytes(WRITE_HIGH_BYTES // 4), 0, list[int]()

        async def send(n: int) -> None:
            nonlocal most
            await channel.window.room(len(large))
            publish(channel, body=large)
            most = max(most, connection.queued)
            order.append(n)

        async with asyncio.timeout(10):
            await asyncio.gather(*(send(n) for n in range(100)))
        channel.ack(77, multiple=True)
        await reading
        assert most <= 1.5 * WRITE_HIGH_BYTES
        assert order == list(range(100))
        assert (channel.window._promised, channel.window._promised_bytes, connection.queued) == (0, 0, 0)


async def test_who_is_woken_for_large_bodies_and_cant_publish_makes_room_for_the_next() -> None:
    """A request that timed out as it was woken would leave the next one waiting for ever: nothing was written that would wake it."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        connection.pause_writing()  # as the socket would
        woken, last = (
            asyncio.create_task(channel.window.room(WRITE_HIGH_BYTES)),
            asyncio.create_task(channel.window.room(WRITE_HIGH_BYTES)),
        )
        await asyncio.sleep(0)
        connection.resume_writing()
        woken.cancel()
        async with asyncio.timeout(5):
            await last
        assert woken.cancelled()


async def test_a_channel_that_the_broker_closes_ends_what_waits_on_it_and_nothing_else() -> None:
    """One missing queue would stop every consumer of the process, or leave a publish waiting for its deadline."""
    async with talking() as (connection, peer):
        first, second = await opened(connection, peer), await opened(connection, peer)
        told: list[Closed] = []
        first.on_closed = told.append
        call = asyncio.create_task(first.call(commands.Queue.Declare(queue="q", passive=True), 5))
        lost, kept = publish(first), publish(second)
        await peer.hear(commands.Queue.Declare)
        peer.say(commands.Channel.Close(404, "NOT_FOUND", 50, 10))
        await peer.hear(commands.Channel.CloseOk)
        for waited in (call, lost):
            assert (await ends_with_closed(waited, 404)).scope == "channel"
        peer.say(commands.Basic.Ack(1, False), channel=2)
        await kept
        assert [one.code for one in told] == [404]
        assert connection.usable
        await ends_with_closed(first.call(commands.Queue.Declare(queue="q"), 5), 404)


async def test_what_was_on_its_way_when_the_broker_closed_a_channel_costs_no_other_channel() -> None:
    """RabbitMQ may send a delivery after the close: one queue's consumer timeout would cost all queues of the worker their connection."""
    async with talking() as (connection, peer):
        first, second = await opened(connection, peer), await opened(connection, peer)
        kept = publish(second)
        peer.say(
            commands.Channel.Close(406, "PRECONDITION_FAILED", 0, 0),
            content(DELIVER, b"x"),
            ACK_OF_NOTHING,
            content(commands.Basic.Return(312, "NO_ROUTE", "", "q"), b"x"),
            content(commands.Basic.GetOk(1, False, "", "q", 0), b"x"),
            commands.Queue.DeclareOk("q", 0, 0),
        )
        peer.say(commands.Basic.Ack(1, False), channel=2)
        await kept
        assert first.closed is not None
        assert (first.closed.code, connection.usable) == (406, True)


async def test_a_closed_channels_number_is_used_again() -> None:
    """A worker that opens a channel a reconnect would run out of numbers; an old delivery must not reach the new one."""
    async with talking() as (connection, peer):
        first = await opened(connection, peer)
        got: list[int] = []
        consuming = asyncio.create_task(first.consume("q", "c1", lambda tag, *_: got.append(tag), 5))
        await peer.hear(commands.Basic.Consume)
        peer.say(commands.Basic.ConsumeOk("c1"))
        await consuming
        closing = asyncio.create_task(first.close())
        await peer.hear(commands.Channel.Close)
        peer.say(content(DELIVER, b"x"), commands.Channel.CloseOk())  # on its way when we closed
        await closing
        second = await opened(connection, peer)
        assert (second.number, got) == (1, [1])
        peer.say(content(DELIVER, b"x"), commands.Basic.Cancel("c9"))
        cancelled: asyncio.Future[str] = connection.loop.create_future()
        second.on_cancelled = cancelled.set_result
        assert await cancelled == "c9"
        assert got == [1]


async def test_a_channel_that_was_left_is_free_once_its_late_answers_have_come() -> None:
    """A broker that is slow to declare would cost a number a try: after 2047 tries nothing could be declared on that connection any more."""
    async with talking() as (connection, peer):
        first = await opened(connection, peer)
        calling = asyncio.create_task(
            first.call_all([commands.Queue.Declare(queue="a"), commands.Queue.Declare(queue="b")], 0.05)
        )
        for _ in range(2):
            await peer.hear(commands.Queue.Declare)
        with pytest.raises(TimeoutError):
            await calling

        left = first.leave()
        assert left is first.leave()  # it asks once
        await peer.hear(commands.Channel.Close)
        second = await opened(connection, peer)  # the number is taken until then
        peer.say(
            *(commands.Queue.DeclareOk(queue=name, message_count=0, consumer_count=0) for name in ("a", "b")),
            commands.Channel.CloseOk(),
        )
        await asyncio.wait_for(left, 5)
        third = await opened(connection, peer)

        assert (first.number, second.number, third.number, connection.usable) == (1, 2, 1, True)


async def test_a_channel_that_both_sides_close_at_once_disturbs_nobody_who_gets_its_number() -> None:
    """The answer to our close comes late, on a number that is another channel by then."""
    async with talking() as (connection, peer):
        first = await opened(connection, peer)
        closing = asyncio.create_task(first.close())
        await peer.hear(commands.Channel.Close)
        peer.say(commands.Channel.Close(406, "PRECONDITION_FAILED", 0, 0))
        await ends_with_closed(closing, 406)
        opening = asyncio.create_task(connection.channel(5))
        await peer.hear(commands.Channel.Open)
        peer.say(commands.Channel.CloseOk(), commands.Channel.OpenOk())
        assert (await opening).number == 1
        assert connection.usable


async def test_a_call_that_isnt_answered_ends_at_its_deadline_and_its_answer_disturbs_no_later_one() -> None:
    """Answers name no call: one that comes late would be taken for the next call's."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        with pytest.raises(TimeoutError):
            await channel.call(commands.Queue.Declare(queue="one"), 0.05)
        second = asyncio.create_task(channel.call(commands.Queue.Declare(queue="two"), 5))
        await peer.hear(commands.Queue.Declare)
        await peer.hear(commands.Queue.Declare)
        peer.say(commands.Queue.DeclareOk("one", 0, 0), commands.Queue.DeclareOk("two", 0, 0))
        answer = await second
        assert isinstance(answer, commands.Queue.DeclareOk)
        assert answer.queue == "two"


async def test_a_consumer_that_the_broker_cancels_is_told_and_gets_nothing_more() -> None:
    """A deleted queue would leave a worker that looks healthy and takes no job."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        got: list[int] = []
        cancelled: asyncio.Future[str] = connection.loop.create_future()
        channel.on_cancelled = cancelled.set_result
        consuming = asyncio.create_task(channel.consume("q", "c1", lambda tag, *_: got.append(tag), 5))
        await peer.hear(commands.Basic.Consume)
        peer.say(
            commands.Basic.ConsumeOk("c1"), content(DELIVER, b"x"), commands.Basic.Cancel("c1"), content(DELIVER, b"y")
        )
        await consuming
        assert await cancelled == "c1"
        assert got == [1]


async def test_a_cancelled_consumer_is_forgotten() -> None:
    """Flow control cancels and consumes again for as long as a worker lives."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        consuming = asyncio.create_task(channel.consume("q", "c1", lambda *_: None, 5))
        await peer.hear(commands.Basic.Consume)
        peer.say(commands.Basic.ConsumeOk("c1"))
        await consuming
        cancelling = asyncio.create_task(channel.cancel("c1", 5))
        await peer.hear(commands.Basic.Cancel)
        peer.say(commands.Basic.CancelOk("c1"))
        await cancelling
        assert not channel.consumers


async def test_blocked_and_unblocked_are_seen() -> None:
    """A publish that waits for a full disk must say so: `no confirm in time` alone sends people to the network."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        peer.say(octets(commands.Connection.Blocked("low on disk"), 0), commands.Channel.Flow(True))
        await peer.hear(commands.Channel.FlowOk)
        assert connection.blocked == "low on disk"
        peer.say(octets(commands.Connection.Unblocked(), 0), commands.Channel.Flow(False))
        await peer.hear(commands.Channel.FlowOk)
        assert connection.blocked is None
        assert channel.closed is None


async def test_a_connection_that_the_broker_closes_ends_all_and_is_answered() -> None:
    """An administrator's close would leave publishers waiting, and the broker waiting for our answer."""
    async with talking() as (connection, peer):
        first, second = await opened(connection, peer), await opened(connection, peer)
        ends: list[Awaitable[Any]] = [
            publish(first),
            publish(second),
            asyncio.create_task(second.call(commands.Queue.Declare(queue="q"), 5)),
        ]
        await peer.hear(commands.Queue.Declare)
        peer.say(commands.Connection.Close(320, "CONNECTION_FORCED - by an administrator", 0, 0), channel=0)
        await peer.hear(commands.Connection.CloseOk)
        for waited in ends:
            closed = await ends_with_closed(waited, 320)
            assert (closed.scope, closed.text) == ("connection", "CONNECTION_FORCED - by an administrator")
        await ends_with_closed(connection.channel(5), 320)


async def test_closing_waits_for_the_answer_and_a_dead_peer_costs_no_more_than_its_timeout() -> None:
    """Acks that were written must arrive before the process ends; a worker must still end beside a dead broker."""
    async with talking() as (connection, peer):
        closing = asyncio.create_task(connection.close(5))
        await peer.hear(commands.Connection.Close)
        assert not closing.done()
        peer.say(commands.Connection.CloseOk(), channel=0)
        await closing
    async with talking() as (connection, _):
        started = time.monotonic()
        await connection.close(0.2)
        assert 0.15 < time.monotonic() - started < 1


async def test_asking_a_closed_channel_again_and_again_keeps_nothing() -> None:
    """One error raised ten thousand times over would hold the frames of every raise."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        connection.abort()
        closed = connection.closed
        for _ in range(5):
            for call in (channel.call(commands.Queue.Declare(queue="q"), 5), connection.channel(5)):
                with pytest.raises(Closed):
                    await call
        assert closed is not None
        assert len(list(traceback.walk_tb(closed.__traceback__))) < 5


async def test_a_worker_gives_up_a_broker_that_is_silent_after_the_handshake_at_its_time_limit() -> None:
    """It would wait as long again for the answer to its close, before it tries another node."""

    class Note(Job, name="note", queue=Queue("notes")):
        """A job to consume."""

    async def run(job: Note) -> None: ...

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await Peer(reader, writer).greet()

    async with listening(serve) as address:
        url = f"amqp://u:p@127.0.0.1:{address.port}/"
        app = App("silent", broker=url, settings=Settings(connect_timeout_s=0.1))
        app.handler(job=Note)(run)
        began = time.monotonic()
        async with app.worker() as worker:
            assert time.monotonic() - began < CLOSE_TIMEOUT_S
            assert worker.state().name == "connecting"
