"""The broker's end of a connection: it says what the test tells it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pamqp.frame
import pytest
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from leveret.brokers.rabbitmq import RabbitSettings
from leveret.brokers.rabbitmq import connection as amqp
from leveret.brokers.rabbitmq.address import Address, addresses
from leveret.brokers.rabbitmq.channel import Channel
from leveret.brokers.rabbitmq.confirms import Unconfirmed
from leveret.brokers.rabbitmq.connection import Connection
from leveret.brokers.rabbitmq.wire import Closed

_T = TypeVar("_T")
START = commands.Connection.Start(server_properties={"product": "a test"}, mechanisms="PLAIN AMQPLAIN", locales="en_US")
TUNE = commands.Connection.Tune(channel_max=2047, frame_max=131_072, heartbeat=60)
PROPERTIES = commands.Basic.Properties(message_id="id-1")
RAW_PROPERTIES = PROPERTIES.marshal()
DELIVER = commands.Basic.Deliver(consumer_tag="c1", delivery_tag=1, redelivered=False, exchange="", routing_key="q")
ACK_OF_NOTHING = commands.Basic.Ack(delivery_tag=5, multiple=False)


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
