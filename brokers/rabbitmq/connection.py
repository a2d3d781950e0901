"""A lean AMQP 0-9-1 connection on asyncio.

    socket ─► Parser ─► Connection (heartbeat, blocked, close) ─► Channel (calls, consumers, acks) ─► ConfirmWindow (publishes)

Everything written in one turn of the loop leaves in one write. Whatever ends a connection ends all that waits on it with
`Closed`, which says what was closed, by which code and why; nothing here raises `CancelledError` of its own.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable
from typing import Any, cast

from pamqp import commands
from pamqp.base import Frame

from .address import Address
from .channel import Channel
from .frames import HEARTBEAT, PROPERTIES_OVERHEAD, PROTOCOL_HEADER, Parser, ProtocolError, method_frame
from .wire import CLOSE_TIMEOUT_S, WRITE_HIGH_BYTES, Closed, check_open, fail

logger = logging.getLogger("leveret.rabbitmq")

BROKERS_HEADERS_BYTES = 64 << 10
"""By how much a frame may be larger than was agreed on: RabbitMQ (measured on 3.10) adds headers of its own, x-death and
x-delivery-count, to properties that filled a frame, and sends what comes out."""
_TLS_ALERT = b"\x15\x03"
"""What a TLS server answers to AMQP's header: shorter than a frame's head, so the parser would wait for more."""


class Connection(asyncio.Protocol):
    """One connection, from its socket to its close; made by `connect`."""

    def __init__(self, address: Address, name: str) -> None:
        self.loop = asyncio.get_running_loop()
        self.address = address
        self.name = name
        self.frame_max = 131_072
        self.closed: Closed | None = None
        self.blocked: str | None = None
        """Why the broker takes no publishes for now (an alarm); None while it does."""
        self.on_closed: Callable[[Closed], None] | None = None
        self._transport: asyncio.Transport | None = None
        self._parser = Parser(self)
        self._channels: dict[int, Channel] = {}
        self._channel_max = 2047
        self._out: list[Any] = []
        self._flushing = False
        self.writable = True
        """Whether it takes more publishes; acks and heartbeats don't ask."""
        self.queued = 0
        """Bytes of publishes that leave at the end of this turn of the loop."""
        self._paused = False
        """Whether the socket takes no more for now."""
        # there from the beginning: the broker's first word may be read before anybody awaits it
        self._handshake: asyncio.Future[Frame] | None = self.loop.create_future()
        self._closing: asyncio.Future[None] | None = None
        self._greeted = False
        self._heartbeat_s = 0.0
        self._beat: asyncio.TimerHandle | None = None
        self._heard = self._beaten = time.monotonic()
        self._sent = False
        self._last_resort: asyncio.TimerHandle | None = None
        """Drops a socket whose close the peer doesn't answer."""

    @property
    def max_properties_bytes(self) -> int:
        """What is left of a frame for properties; a larger one costs the connection."""
        return self.frame_max - PROPERTIES_OVERHEAD

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the protocol header."""
        self._transport = opened = cast(
            "asyncio.Transport", transport
        )  # uvloop's isn't one of asyncio's, and does the same
        opened.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        opened.write(PROTOCOL_HEADER)

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        self._heard = self.loop.time()
        if not self._greeted:
            self._greeted = True
            if data.startswith(_TLS_ALERT):
                self.end(Closed("connection", 501, "that port speaks TLS: its URL begins with amqps://"))
                return
        try:
            self._parser.feed(data)
        except ProtocolError as error:
            self._break(error.code, str(error))
        except Exception as error:
            logger.critical(
                "a bug of leveret's: the connection to RabbitMQ at %s is given up", self.address, exc_info=error
            )
            self._break(541, f"internal error: {error!r:.100}")

    def eof_received(self) -> bool:
        """Close: there are no half-closed AMQP connections."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """End everything."""
        if self._last_resort is not None:
            self._last_resort.cancel()  # or it would hold all of this in memory until then
        why = Closed("socket", 0, _why(exc))
        why.__cause__ = exc
        self.end(why)
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(None)

    def pause_writing(self) -> None:
        """Hold publishers: the broker doesn't read as fast as they write."""
        self._paused, self.writable = True, False

    def resume_writing(self) -> None:
        """Let them go on."""
        self._paused = False
        self.writable = self.queued <= WRITE_HIGH_BYTES
        for channel in list(self._channels.values()):
            channel.window.wake_waiters()

    @property
    def usable(self) -> bool:
        """Whether it is open."""
        return self.closed is None

    def write(self, data: bytes) -> None:
        """Send `data` with all else of this turn of the loop."""
        self._out.append(data)
        if not self._flushing:
            self._flushing = True
            self.loop.call_soon(self.flush)

    def write_all(self, head: bytes, rest: list[bytes | memoryview], size: int) -> None:
        """Send a publish of `size` bytes in pieces, in order."""
        self._out.append(head)
        self._out += rest
        self.queued += size
        if self.queued > WRITE_HIGH_BYTES:
            self.writable = False
        if not self._flushing:
            self._flushing = True
            self.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Hand what was written to the socket."""
        self._flushing = False
        out, self._out, self.queued = self._out, [], 0
        if out and self._transport is not None and not self._transport.is_closing():
            self._sent = True
            self._transport.write(b"".join(out))  # and perhaps pauses
        if not self.writable and not self._paused:
            self.resume_writing()

    def on_method(self, channel: int, method: Frame) -> None:
        """Take in a method that isn't hot."""
        if channel:
            known = self._channels.get(channel)
            if known is not None:
                known.on_method(method)
            elif not isinstance(method, (commands.Channel.CloseOk, commands.Channel.Close)):
                raise _not_open(channel)
            return
        match method:
            case commands.Connection.Close():
                self.write(method_frame(0, commands.Connection.CloseOk()))
                self.flush()
                self.end(Closed("connection", method.reply_code or 0, str(method.reply_text)))
            case commands.Connection.CloseOk():
                if self._closing is not None and not self._closing.done():
                    self._closing.set_result(None)
            case commands.Connection.Blocked():
                self.blocked = method.reason or "an alarm"
            case commands.Connection.Unblocked():
                self.blocked = None
            case _:
                if self._handshake is None or self._handshake.done():
                    raise ProtocolError(503, f"{method.name}, which nobody waits for")
                self._handshake.set_result(method)

    def on_confirm(self, channel: int, tag: int, multiple: bool, ack: bool) -> None:
        """Hand it to its channel."""
        known = self._channels.get(channel)
        if known is None:
            raise _not_open(channel)
        known.window.on_confirm(tag, multiple, ack)

    def on_deliver(
        self, channel: int, consumer: bytes, tag: int, redelivered: bool, properties: bytes, body: bytes
    ) -> None:
        """Hand it to its consumer."""
        known = self._channels.get(channel)
        if known is None:
            raise _not_open(channel)
        deliver = known.consumers.get(consumer)
        if deliver is not None:
            deliver(tag, redelivered, properties, body)
        else:  # on its way while the broker cancelled the consumer: unsettled, it goes back with the channel
            logger.warning("a delivery for consumer %s, which was cancelled", consumer.decode("utf-8", "replace"))

    def on_got(self, channel: int, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        """Hand it to its channel."""
        known = self._channels.get(channel)
        if known is None:
            raise _not_open(channel)
        known.on_got(tag, redelivered, properties, body)

    def on_return(self, channel: int, code: int, text: str, key: bytes, properties: bytes) -> None:
        """Hand it to its channel."""
        known = self._channels.get(channel)
        if known is None:
            raise _not_open(channel)
        known.window.on_return(code, text, key, properties)

    async def handshake(self) -> None:
        """Log in, agree on limits, open the vhost; the caller sets the deadline."""
        start = await self._expect(commands.Connection.Start)
        mechanism, response = self.address.login()
        offered = str(start.mechanisms).split()
        if mechanism not in offered:
            raise Closed("connection", 403, f"it offers no {mechanism} login, only {' '.join(offered)}")
        capabilities = dict.fromkeys(
            (
                "publisher_confirms",
                "basic.nack",
                "connection.blocked",
                "consumer_cancel_notify",
                "authentication_failure_close",
            ),
            True,
        )
        properties: dict[str, Any] = {"product": "leveret", "connection_name": self.name, "capabilities": capabilities}
        tune = await self._expect(
            commands.Connection.Tune,
            commands.Connection.StartOk(client_properties=properties, mechanism=mechanism, response=response),
        )
        self.frame_max = min(tune.frame_max or 131_072, 131_072)
        self._parser.frame_max = self.frame_max + BROKERS_HEADERS_BYTES
        self._channel_max = min(tune.channel_max or 2047, 2047)
        self._heartbeat_s = float(min(tune.heartbeat or self.address.heartbeat_s, self.address.heartbeat_s))
        self.write(
            method_frame(
                0,
                commands.Connection.TuneOk(
                    channel_max=self._channel_max, frame_max=self.frame_max, heartbeat=round(self._heartbeat_s)
                ),
            )
        )
        await self._expect(commands.Connection.OpenOk, commands.Connection.Open(virtual_host=self.address.vhost))
        self._handshake = None
        check_open(self.closed)  # it may have closed in the same breath as the open-ok
        self._beaten = self.loop.time()
        self._beat = self.loop.call_later(self._heartbeat_s / 2, self._on_beat)

    async def _expect(self, kind: type[Frame], method: Frame | None = None) -> Any:
        check_open(self.closed)
        if method is not None:
            self.write(method_frame(0, method))
        assert self._handshake is not None
        answer = await self._handshake
        self._handshake = self.loop.create_future()
        if not isinstance(answer, kind):
            raise Closed("connection", 503, f"{answer.name} where {kind.name} was due")
        return answer

    def _on_beat(self) -> None:
        """Send a heartbeat unless something was sent; give up on a peer that said nothing for two of them."""
        now = self.loop.time()
        interval_s = self._heartbeat_s / 2
        stalled = now - self._beaten > 2 * interval_s  # this loop stood still: what came meanwhile isn't read yet
        self._beaten = now
        if now - self._heard > 2 * self._heartbeat_s and not stalled:
            self.end(Closed("socket", 0, f"nothing was heard from the broker for {now - self._heard:.0f} s"))
            return
        if not self._sent and self._transport is not None:
            self._transport.write(HEARTBEAT)
        self._sent = False
        self._beat = self.loop.call_later(interval_s, self._on_beat)

    async def channel(self, timeout_s: float) -> Channel:
        """Open a channel."""
        check_open(self.closed)
        number = next((number for number in range(1, self._channel_max + 1) if number not in self._channels), None)
        if number is None:
            raise Closed("connection", 530, f"all {self._channel_max} channels are in use")
        channel = self._channels[number] = Channel(self, number)
        try:
            await channel.open(timeout_s)
        except TimeoutError:
            channel.leave()
            raise
        return channel

    def forget(self, number: int) -> None:
        """Free the number of a channel that ended."""
        del self._channels[number]
        self._parser.forget(number)

    def _break(self, code: int, text: str) -> None:
        """Close because the peer broke the protocol."""
        text = text[:250]
        self.write(
            method_frame(0, commands.Connection.Close(reply_code=code, reply_text=text[:120], class_id=0, method_id=0))
        )
        self.flush()
        self.end(Closed("connection", code, f"the broker broke the protocol: {text}"))

    def end(self, why: Closed) -> None:
        """End all that waits, and drop the socket."""
        if self.closed is not None:
            return
        self.closed = why
        if self._beat is not None:
            self._beat.cancel()
        if self._handshake is not None:
            fail(self._handshake, why)
        self.resume_writing()
        for channel in list(self._channels.values()):
            channel.end(why)
        if self._transport is not None:
            if why.scope == "socket":
                self._transport.abort()
            else:
                self._transport.close()
                self._last_resort = self.loop.call_later(
                    CLOSE_TIMEOUT_S, self._transport.abort
                )  # a peer that reads nothing would keep it open
        if self.on_closed is not None:
            self.on_closed(why)

    def abort(self) -> None:
        """Drop the socket, whatever the peer does."""
        self.end(Closed("socket", 0, "it was dropped"))
        if self._transport is not None:
            self._transport.abort()

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Say good-bye, and wait for the answer as long as `timeout_s`; a dead peer costs no more."""
        self.on_closed = None
        try:
            if self.closed is None:
                self._closing = self.loop.create_future()
                self.write(
                    method_frame(
                        0, commands.Connection.Close(reply_code=200, reply_text="bye", class_id=0, method_id=0)
                    )
                )
                await asyncio.wait([self._closing], timeout=timeout_s)
        finally:  # cancelled, too: nobody else would close it, and while its heartbeats go on the broker leaves it what it holds
            self.end(Closed("connection", 200, "it was closed"))
            self.abort()


def _not_open(channel: int) -> ProtocolError:
    return ProtocolError(504, f"a frame on channel {channel}, which isn't open")


def _why(error: Exception | None) -> str:
    if error is None:
        return "the broker closed the socket"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


async def connect(address: Address, name: str, timeout_s: float) -> Connection:
    """Return an open connection, TCP, TLS and handshake within `timeout_s`; raises `Closed`, OSError, ssl.SSLError or TimeoutError."""
    loop = asyncio.get_running_loop()
    connection = Connection(address, name)
    context: ssl.SSLContext | None = address.tls()
    try:
        async with asyncio.timeout(timeout_s):
            await loop.create_connection(
                lambda: connection,
                address.host,
                address.port,
                ssl=context,
                server_hostname=address.host if context is not None else None,
            )
            await connection.handshake()
    except BaseException:
        connection.abort()
        raise
    return connection
