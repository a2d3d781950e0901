"""A connection against a peer that says what the test tells it: limits, endings and faults that a real broker seldom shows."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable
from typing import Any

import pytest
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.heartbeat import Heartbeat

from leveret import App, Job, Queue, Settings
from leveret.brokers.rabbitmq import connection as amqp
from leveret.brokers.rabbitmq.connection import BROKERS_HEADERS_BYTES
from leveret.brokers.rabbitmq.wire import CLOSE_TIMEOUT_S, Closed

from .peer import (
    ACK_OF_NOTHING,
    DELIVER,
    START,
    TUNE,
    Peer,
    content,
    ends_with_closed,
    listening,
    octets,
    opened,
    publish,
    talking,
    until_closed,
)


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
