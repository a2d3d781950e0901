"""A lean AMQP 0-9-1 connection on asyncio.

    socket ─► Parser ─► Connection (heartbeat, blocked, close) ─► Channel (calls, consumers, acks) ─► ConfirmWindow (publishes)

All data of one loop turn is sent in one write. When a connection ends, everything that waits on it ends with `Closed`, which
has the scope, the code and the reason. Nothing here raises a `CancelledError` by itself.
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
"""By this much an incoming frame may exceed the negotiated size: RabbitMQ (measured on 3.10) adds its headers x-death and
x-delivery-count to properties that fill a frame, and sends the larger frame."""
_TLS_ALERT = b"\x15\x03"
"""The answer of a TLS server to AMQP's header: shorter than a frame's head, so the parser would wait for more."""


class Connection(asyncio.Protocol):
    """One connection, from its socket to its close; made by `connect`."""

    def __init__(self, address: Address, name: str) -> None:
        self.loop = asyncio.get_running_loop()
        self.address = address
        self.name = name
        self.frame_max = 131_072
        self.max_properties_bytes = self.frame_max - PROPERTIES_OVERHEAD
        """The room for properties in one frame; larger properties would cost the connection."""
        self.max_body_bytes = 1 << 62
        """The largest body that the broker takes, once a larger one was refused. Each refusal costs a channel."""
        self.closed: Closed | None = None
        self.blocked: str | None = None
        """Why the broker blocks publishers (an alarm); None while it doesn't."""
        self.on_blocked: Callable[[], None] | None = None
        """Called when `blocked` changes."""
        self.on_closed: Callable[[Closed], None] | None = None
        self._transport: asyncio.Transport | None = None
        self._parser = Parser(self)
        self._channels: dict[int, Channel] = {}
        self._highest = 0
        """The highest number that a channel had so far."""
        self._channel_max = 2047
        self._out: list[Any] = []
        self._flushing = False
        self.writable = True
        """Whether publishes may be written now; acks and heartbeats always are."""
        self.queued = 0
        """Bytes of publishes that are sent at the end of this loop turn."""
        self._paused = False
        """Whether the socket's buffer is full."""
        self._deaf = False
        """Whether reading is paused."""
        # made here: the broker's first method may arrive before `handshake` waits for it
        self._handshake: asyncio.Future[Frame] | None = self.loop.create_future()
        self._closing: asyncio.Future[None] | None = None
        self._greeted = False
        self._heartbeat_s = 0.0
        self._beat: asyncio.TimerHandle | None = None
        self._heard = self._beaten = time.monotonic()
        self._sent = False
        self._last_resort: asyncio.TimerHandle | None = None
        """Drops the socket if the peer doesn't answer the close."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the protocol header."""
        # uvloop's transport isn't a subclass of asyncio's, but has the same methods
        self._transport = opened = cast("asyncio.Transport", transport)
        opened.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        opened.write(PROTOCOL_HEADER)

    def data_received(self, data: bytes) -> None:
        """Parse the received bytes."""
        self._heard = self.loop.time()
        if not self._greeted:
            self._greeted = True
            if data.startswith(_TLS_ALERT):
                self.end(Closed("connection", 501, "the port speaks TLS; use amqps:// in the URL"))
                return
        try:
            self._parser.feed(data)
        except ProtocolError as error:
            self._break(error.code, str(error))
        except Exception as error:
            logger.critical("a bug in leveret: closing the connection to RabbitMQ at %s", self.address, exc_info=error)
            self._break(541, f"internal error: {error!r:.100}")

    def eof_received(self) -> bool:
        """Let asyncio close the socket: AMQP has no half-closed connections."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection and everything that waits on it."""
        if self._last_resort is not None:
            self._last_resort.cancel()  # otherwise the timer would keep the connection in memory
        why = Closed("socket", 0, _why(exc))
        why.__cause__ = exc
        self.end(why)
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(None)

    def pause_writing(self) -> None:
        """Hold publishers: the broker reads more slowly than they write."""
        self._paused, self.writable = True, False

    def resume_writing(self) -> None:
        """Let publishers go on."""
        self._paused = False
        self.writable = self.queued <= WRITE_HIGH_BYTES
        for channel in list(self._channels.values()):
            channel.window.wake_waiters()

    def progress(self) -> tuple[int, ...]:
        """Return what changes with every confirm and every delivery."""
        return tuple(channel.progress() for channel in self._channels.values())

    def pause_reading(self) -> None:
        """Leave what the broker sends in the socket, at most for some seconds: after 30 s RabbitMQ drops the connection."""
        if not self._deaf and self._transport is not None and not self._transport.is_closing():
            self._deaf = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """End `pause_reading`."""
        if self._deaf and self._transport is not None:
            self._deaf = False
            self._heard = self.loop.time()
            if not self._transport.is_closing():
                self._transport.resume_reading()

    @property
    def quiet_s(self) -> float:
        """The seconds since the broker was heard."""
        return self.loop.time() - self._heard

    @property
    def usable(self) -> bool:
        """Whether the connection is open."""
        return self.closed is None

    def write(self, data: bytes) -> None:
        """Send `data` at the end of this loop turn."""
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
        """Hand the collected data to the socket."""
        self._flushing = False
        out, self._out, self.queued = self._out, [], 0
        if out and self._transport is not None and not self._transport.is_closing():
            self._sent = True
            self._transport.write(b"".join(out))  # may call pause_writing
        if not self.writable and not self._paused:
            self.resume_writing()

    def on_method(self, channel: int, method: Frame) -> None:
        """Handle a method that isn't on a hot path."""
        if channel:
            known = self._channels.get(channel)
            if known is not None:
                known.on_method(method)
            elif not isinstance(method, (commands.Channel.CloseOk, commands.Channel.Close)):
                self._pass_over(channel)
            return
        match method:
            case commands.Connection.Close():
                self.write(method_frame(0, commands.Connection.CloseOk()))
                self.flush()
                self.end(Closed("connection", method.reply_code or 0, str(method.reply_text)))
            case commands.Connection.CloseOk():
                if self._closing is not None and not self._closing.done():
                    self._closing.set_result(None)
            case commands.Connection.Blocked() | commands.Connection.Unblocked():
                self.blocked = method.reason or "an alarm" if isinstance(method, commands.Connection.Blocked) else None
                if self.on_blocked is not None:
                    self.on_blocked()
            case _:
                if self._handshake is None or self._handshake.done():
                    raise ProtocolError(503, f"unexpected {method.name}: nothing waits for it")
                self._handshake.set_result(method)

    def on_confirm(self, channel: int, tag: int, multiple: bool, ack: bool) -> None:
        """Pass a confirm to its channel's window."""
        known = self._channels.get(channel)
        if known is None:
            self._pass_over(channel)
        else:
            known.window.on_confirm(tag, multiple, ack)

    def on_deliver(
        self, channel: int, consumer: bytes, tag: int, redelivered: bool, properties: bytes, body: bytes
    ) -> None:
        """Pass a delivery to its consumer."""
        known = self._channels.get(channel)
        if known is None:
            self._pass_over(channel)
            return
        deliver = known.consumers.get(consumer)
        if deliver is not None:
            deliver(tag, redelivered, properties, body)
        else:  # sent before the broker cancelled the consumer; unsettled, it returns to the queue when the channel closes
            logger.warning(
                "ignoring a delivery for consumer %s, which was cancelled", consumer.decode("utf-8", "replace")
            )

    def on_got(self, channel: int, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        """Pass the answer of a basic.get to its channel."""
        known = self._channels.get(channel)
        if known is None:
            self._pass_over(channel)
        else:
            known.on_got(tag, redelivered, properties, body)

    def on_return(self, channel: int, code: int, text: str, key: bytes, properties: bytes) -> None:
        """Pass a returned publish to its channel's window."""
        known = self._channels.get(channel)
        if known is None:
            self._pass_over(channel)
        else:
            known.window.on_return(code, text, key, properties)

    def _pass_over(self, channel: int) -> None:
        """Ignore a frame on a closed channel: RabbitMQ may send it after its close (a delivery). Raise if the number was never open."""
        if channel > self._highest:
            msg = f"a frame on channel {channel}, which was never open"
            raise ProtocolError(504, msg)

    async def handshake(self) -> None:
        """Log in, negotiate limits and open the vhost; the caller sets the deadline."""
        start = await self._expect(commands.Connection.Start)
        mechanism, response = self.address.login()
        offered = str(start.mechanisms).split()
        if mechanism not in offered:
            raise Closed("connection", 403, f"the broker offers no {mechanism} login, only {' '.join(offered)}")
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
        self.max_properties_bytes = self.frame_max - PROPERTIES_OVERHEAD
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
        check_open(self.closed)  # a close may have arrived together with the open-ok
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
            raise Closed("connection", 503, f"the broker sent {answer.name} instead of {kind.name}")
        return answer

    def _on_beat(self) -> None:
        """Send a heartbeat if nothing else was sent; close the connection if the peer was silent for two intervals."""
        now = self.loop.time()
        interval_s = self._heartbeat_s / 2
        # this loop stood still: the data that arrived meanwhile isn't read yet
        stalled = now - self._beaten > 2 * interval_s
        self._beaten = now
        if now - self._heard > 2 * self._heartbeat_s and not stalled and not self._deaf:
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
        self._highest = max(self._highest, number)
        try:
            await channel.open(timeout_s)
        except TimeoutError:
            channel.leave()
            raise
        return channel

    def forget(self, number: int) -> None:
        """Free the number of a closed channel."""
        del self._channels[number]
        self._parser.forget(number)

    def _break(self, code: int, text: str) -> None:
        """Close the connection because the peer broke the protocol."""
        text = text[:250]
        self.write(
            method_frame(0, commands.Connection.Close(reply_code=code, reply_text=text[:120], class_id=0, method_id=0))
        )
        self.flush()
        self.end(Closed("connection", code, f"the broker broke the protocol: {text}"))

    def end(self, why: Closed) -> None:
        """End everything that waits on the connection, and close the socket."""
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
                # a peer that reads nothing would keep the socket open
                self._last_resort = self.loop.call_later(CLOSE_TIMEOUT_S, self._transport.abort)
        if self.on_closed is not None:
            self.on_closed(why)

    def abort(self, why: str = "the connection was dropped") -> None:
        """Drop the socket without a close handshake."""
        self.end(Closed("socket", 0, why))
        if self._transport is not None:
            self._transport.abort()

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Close the connection, waiting at most `timeout_s` for the peer's answer."""
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
        finally:  # cancelled, too: nobody else closes it, and as long as its heartbeats go on, its deliveries stay with it
            self.end(Closed("connection", 200, "the connection was closed"))
            self.abort()


def _why(error: Exception | None) -> str:
    if error is None:
        return "the broker closed the socket"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


async def connect(address: Address, name: str, timeout_s: float) -> Connection:
    """Return an open connection: TCP, TLS and handshake take at most `timeout_s`.

    Raises `Closed`, OSError, ssl.SSLError or TimeoutError.
    """
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
