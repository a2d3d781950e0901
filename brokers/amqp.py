"""A lean AMQP 0-9-1 connection on asyncio: no task and no future a message but the publisher's own.

    socket ─► Parser ─► Connection (heartbeat, blocked, close) ─► Channel (calls, confirms, consumers)

Everything written in one turn of the loop leaves in one write. Whatever ends a connection ends all that waits on it with
`Closed`, which says what was closed, by which code and why; nothing here raises `CancelledError` of its own.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable
from typing import Any, Literal

import msgspec
from pamqp import commands
from pamqp.base import Frame

from .address import Address
from .frames import (
    HEARTBEAT,
    PROPERTIES_OVERHEAD,
    PROTOCOL_HEADER,
    Parser,
    ProtocolError,
    ack_frame,
    content_frames,
    message_id_of,
    method_frame,
    nack_frame,
    publish_frame,
    reject_frame,
)

logger = logging.getLogger("leveret.rabbitmq")

WINDOW = 1000
"""Most unconfirmed publishes at once on a channel."""
WRITE_HIGH_BYTES = 1 << 20
"""Above so many unsent bytes publishers wait; acks and heartbeats don't."""
_SWEEP_S = 0.05
"""How late a publish's deadline may be noticed."""
CLOSE_TIMEOUT_S = 3.0
_TLS_ALERT = b"\x15\x03"
"""What a TLS server answers to AMQP's header: shorter than a frame's head, so the parser would wait for more."""


class Closed(Exception):
    """A channel, a connection or its socket was closed; `code` is AMQP's, 0 where none was said."""

    def __init__(self, scope: Literal["channel", "connection", "socket"], code: int, text: str) -> None:
        super().__init__(text)
        self.scope = scope
        self.code = code
        self.text = text


BROKERS_HEADERS_BYTES = 64 << 10
"""By how much a frame may be larger than was agreed on: RabbitMQ (measured on 3.10) adds headers of its own, x-death and
x-delivery-count, to properties that filled a frame, and sends what comes out."""


class Returned(Exception):
    """No queue took a mandatory publish."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Nacked(Exception):
    """The broker said that it doesn't keep a publish."""


class Late(Exception):
    """A publish's deadline passed before its confirm; it may be there."""


class Unconfirmed(msgspec.Struct, eq=False):
    """A publish on its way. Awaited, by one task, it ends with its confirm or raises `Returned`, `Nacked`, `Late` or `Closed`.

    Not a future: of many that are published at once, only few are ever waited for.
    """

    message_id: str
    key: str
    deadline: float
    """When it ends as `Late`, `time.monotonic()` seconds."""
    ended: bool = False
    failure: Exception | None = None
    """Once it has ended: `Returned`, `Nacked`, `Late`, `Closed`, or None."""
    _waiter: asyncio.Future[None] | None = None

    def end(self, failure: Exception | None = None) -> None:
        """Note how it ended, once."""
        if not self.ended:
            self.ended = True
            self.failure = failure
            if self._waiter is not None:
                _wake(self._waiter)

    async def wait(self) -> None:
        """Return once it has ended, however it did."""
        if not self.ended:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def __await__(self) -> Generator[Any, None, None]:
        yield from self.wait().__await__()
        if (error := self.error()) is not None:
            raise error.with_traceback(None)  # one failure may end many: each raise would add its frames to it

    def error(self) -> Exception | None:
        """Once it has ended: what awaiting it raises."""
        return self.failure


class Got(msgspec.Struct, frozen=True):
    """A message that was taken by `Channel.get`."""

    tag: int
    redelivered: bool
    properties: bytes
    body: bytes


Deliver = Callable[[int, bool, bytes, bytes], None]
"""Called with tag, redelivered, properties as they came, body."""


class Channel:
    """One channel: calls one after another, and either confirmed publishes or consumers."""

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection = connection
        self.number = number
        self.closed: Closed | None = None
        self.on_closed: Callable[[Closed], None] | None = None
        """Called once, when it is closed by anyone but `close`."""
        self.on_cancelled: Callable[[str], None] | None = None
        """Called when the broker cancels a consumer: its queue was deleted, or a delivery was held too long."""
        self._calls: deque[tuple[Collection[str], asyncio.Future[Any]]] = deque()
        self._leaving: asyncio.Future[Any] | None = None
        self.consumers: dict[bytes, Deliver] = {}
        """By tag: who is called with its deliveries."""
        self._next_tag = 1
        self._lowest = 1
        self._unconfirmed: dict[int, Unconfirmed] = {}
        """By delivery tag, the oldest first."""
        self._returned: dict[int, Returned] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._keys: dict[tuple[str, str], bytes] = {}
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._promised = 0
        """Places in the window that are kept for waiters that were woken and haven't published yet."""

    # ---- calls

    async def call(self, method: Frame, timeout_s: float) -> Frame:
        """Send `method` and return its answer; `Closed` if the broker closes instead, TimeoutError where it says nothing."""
        answer: asyncio.Future[Frame] = self._asked(method)
        async with asyncio.timeout(timeout_s):
            return await answer

    async def call_all(self, methods: Iterable[Frame], timeout_s: float) -> None:
        """Send `methods` at once and wait for their answers, `timeout_s` for each: a round trip in all, not one each."""
        for answer in [self._asked(method) for method in methods]:
            async with asyncio.timeout(timeout_s):
                await answer

    def _asked(self, method: Frame) -> asyncio.Future[Any]:
        _check_open(self.closed)
        answer: asyncio.Future[Any] = self.connection.loop.create_future()
        self._calls.append((method.valid_responses, answer))
        self.connection.write(method_frame(self.number, method))
        return answer

    async def open(self, timeout_s: float) -> None:
        """Open it."""
        await self.call(commands.Channel.Open(), timeout_s)

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Close it: what is unsettled goes back. For what was settled just before, see `session.settled`."""
        if self.closed is None:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self.leave())

    def leave(self) -> asyncio.Future[Any]:
        """Ask for its close; its number is free once the broker has answered, however late, all that it was asked on it."""
        self.on_closed = None
        if self._leaving is None:
            self._leaving = self._asked(commands.Channel.Close(reply_code=200, reply_text="", class_id=0, method_id=0))
            self._leaving.add_done_callback(lambda _: self.end(Closed("channel", 200, "it was closed")))
        return self._leaving

    def on_method(self, method: Frame) -> None:
        """Take in a method that isn't hot."""
        match method:
            case commands.Channel.Close():
                self.connection.write(method_frame(self.number, commands.Channel.CloseOk()))
                self.end(Closed("channel", method.reply_code or 0, str(method.reply_text)))
            case commands.Basic.Cancel():
                self.consumers.pop(str(method.consumer_tag).encode(), None)
                if self.on_cancelled is not None:
                    self.on_cancelled(str(method.consumer_tag))
            case commands.Channel.CloseOk() if not self._calls or method.name not in self._calls[0][0]:
                pass  # of a channel that had this number before and was closed by both sides at once
            case commands.Channel.Flow():
                self.connection.write(method_frame(self.number, commands.Channel.FlowOk(active=bool(method.active))))
            case _:
                if not self._calls:
                    raise ProtocolError(503, f"{method.name}, which nobody waits for")
                expected, answer = self._calls.popleft()
                if method.name not in expected:
                    raise ProtocolError(503, f"{method.name} in answer to a call that {' or '.join(expected)} answers")
                if not answer.done():
                    answer.set_result(None if isinstance(method, commands.Basic.GetEmpty) else method)

    def end(self, why: Closed) -> None:
        """Fail all that waits; nothing is written on it any more."""
        if self.closed is not None:
            return
        self.closed = why
        self.connection.forget(self)
        if self._sweeper is not None:
            self._sweeper.cancel()
        for _, answer in self._calls:
            _fail(answer, why)
        for publish in self._unconfirmed.values():
            publish.end(why)
        while self._waiters:
            self._promised += 1
            _wake(self._waiters.popleft())
        self._calls.clear()
        self._unconfirmed.clear()
        self.consumers.clear()
        if self.on_closed is not None:
            self.on_closed(why)

    # ---- publishing

    @property
    def full(self) -> bool:
        """Whether a publish should wait: for confirms, or for the socket."""
        return len(self._unconfirmed) + self._promised >= WINDOW or not self.connection.writable

    async def room(self) -> None:
        """Wait until it isn't `full`, first come first served, or until it is closed."""
        while self.closed is None and not self.connection.writable:
            await self.connection.drained()
        if self.closed is not None or not (self._waiters or self.full):
            return
        waiter: asyncio.Future[None] = self.connection.loop.create_future()
        self._waiters.append(waiter)
        try:
            await waiter
            while self.closed is None and not self.connection.writable:
                await self.connection.drained()
        except BaseException:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            else:
                self._promised -= 1  # it was woken, and can't use it: the next one in line can
                self._wake_waiters()
            raise
        self._promised -= 1

    def _wake_waiters(self) -> None:
        for _ in range(min(len(self._waiters), WINDOW - len(self._unconfirmed) - self._promised)):
            self._promised += 1
            _wake(self._waiters.popleft())

    def publish(self, exchange: str, properties: bytes, body: bytes, publish: Unconfirmed) -> None:
        """Write a mandatory publish, to `publish.key`; it ends as `Closed` at once on a channel that is closed already."""
        if self.closed is not None:
            publish.end(self.closed)
            return
        head = self._keys.get((exchange, publish.key))
        if head is None:
            if len(self._keys) > 1000:  # a delayed job's key differs by its delay
                self._keys.clear()
            head = self._keys[exchange, publish.key] = publish_frame(self.number, exchange, publish.key)
        self.connection.write_all(head, content_frames(self.number, properties, body, self.connection.frame_max))
        self._unconfirmed[self._next_tag] = publish
        self._next_tag += 1
        if self._sweeper is None:
            self._sweeper = self.connection.loop.call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """End what is late: one look at all each 50 ms costs less than a timer each."""
        self._sweeper = None
        if not self._unconfirmed:
            return
        now = time.monotonic()
        for publish in self._unconfirmed.values():
            if publish.deadline <= now and not publish.ended:
                publish.end(Late("no confirm in time"))
        self._sweeper = self.connection.loop.call_later(_SWEEP_S, self._sweep)

    def on_confirm(self, tag: int, multiple: bool, ack: bool) -> None:
        """Take in the broker's word on one publish, or on all up to `tag`."""
        if not 0 <= tag < self._next_tag:
            raise ProtocolError(503, f"a confirm of publish {tag}, of which there were {self._next_tag - 1}")
        unconfirmed = self._unconfirmed
        if multiple:
            lowest, top = self._lowest, tag or self._next_tag - 1
            if lowest not in unconfirmed:  # a broker that confirmed a million one by one: don't look at each again
                lowest = next(iter(unconfirmed), top + 1)
            for one in range(lowest, top + 1):
                if one in unconfirmed:
                    self._confirm(one, ack)
            self._lowest = max(lowest, top + 1)
        elif tag in unconfirmed:
            self._confirm(tag, ack)
        if self._waiters:
            self._wake_waiters()

    def _confirm(self, tag: int, ack: bool) -> None:
        publish = self._unconfirmed.pop(tag)
        returned = self._returned.pop(tag, None) if self._returned else None
        if returned is not None or ack:
            publish.end(returned)
        else:
            publish.end(Nacked("the broker refused to keep it (basic.nack)"))

    def on_return(self, code: int, text: str, key: bytes, properties: bytes) -> None:
        """Take in a publish that no queue took; its confirm comes after it.

        It names no tag, so the oldest with its id and key that isn't returned yet is the one: the broker returns in order.
        """
        message_id, routing = message_id_of(properties), key.decode("utf-8", "replace")
        for tag, publish in self._unconfirmed.items():
            if publish.message_id == message_id and publish.key == routing and tag not in self._returned:
                self._returned[tag] = Returned(code, text)
                return
        logger.warning("RabbitMQ returned a message that wasn't published here: %s", message_id)

    # ---- consuming

    async def consume(self, queue: str, tag: str, deliver: Deliver, timeout_s: float) -> None:
        """Register a consumer; `deliver` is called from the reader and must return at once."""
        self.consumers[tag.encode()] = deliver
        await self.call(commands.Basic.Consume(queue=queue, consumer_tag=tag), timeout_s)

    async def cancel(self, tag: str, timeout_s: float) -> None:
        """End a consumer; what it was delivered stays ackable."""
        await self.call(commands.Basic.Cancel(consumer_tag=tag), timeout_s)
        self.consumers.pop(tag.encode(), None)  # after the answer nothing more is delivered to it

    async def get(self, queue: str, timeout_s: float) -> Got | None:
        """Take one message out of `queue`, to be settled on this channel; None when it is empty."""
        answer: asyncio.Future[Got | None] = self._asked(commands.Basic.Get(queue=queue))
        async with asyncio.timeout(timeout_s):
            return await answer

    def on_got(self, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        """Take in what `get` asked for."""
        if not self._calls or "Basic.GetOk" not in self._calls[0][0]:
            raise ProtocolError(503, "basic.get-ok, which nobody asked for")
        _, answer = self._calls.popleft()
        if not answer.done():
            answer.set_result(Got(tag, redelivered, properties, body))

    def ack(self, tag: int, *, multiple: bool) -> None:
        """Ack one delivery, or all up to it."""
        if self.closed is None:
            self.connection.write(ack_frame(self.number, tag, multiple=multiple))

    def nack(self, tag: int) -> None:
        """Requeue one delivery."""
        if self.closed is None:
            self.connection.write(nack_frame(self.number, tag))

    def reject(self, tag: int) -> None:
        """Dead-letter one delivery."""
        if self.closed is None:
            self.connection.write(reject_frame(self.number, tag))


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
        self._unwritable: asyncio.Future[None] | None = None
        """Waited for by publishers while too much is unsent; None while it isn't."""
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

    # ---- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the protocol header."""
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)  # type: ignore[union-attr]
        self._transport.write(PROTOCOL_HEADER)  # type: ignore[union-attr]

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
            logger.critical("a bug of leveret's: the connection to RabbitMQ at %s is given up", self.address, exc_info=error)
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
        self._unwritable = self.loop.create_future()

    def resume_writing(self) -> None:
        """Let them go on."""
        if self._unwritable is not None:
            _wake(self._unwritable)
        self._unwritable = None

    # ---- writing

    @property
    def usable(self) -> bool:
        """Whether it is open."""
        return self.closed is None

    @property
    def writable(self) -> bool:
        """Whether the socket takes more; acks and heartbeats don't ask."""
        return self._unwritable is None

    async def drained(self) -> None:
        """Wait until the socket takes more, or is gone."""
        if self._unwritable is not None:
            await asyncio.shield(self._unwritable)

    def write(self, data: bytes) -> None:
        """Send `data` with all else of this turn of the loop."""
        self._out.append(data)
        if not self._flushing:
            self._flushing = True
            self.loop.call_soon(self.flush)

    def write_all(self, head: bytes, rest: list[bytes | memoryview]) -> None:
        """Send several pieces, in order."""
        self._out.append(head)
        self._out += rest
        if not self._flushing:
            self._flushing = True
            self.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Hand what was written to the socket."""
        self._flushing = False
        out, self._out = self._out, []
        if out and self._transport is not None and not self._transport.is_closing():
            self._sent = True
            self._transport.write(b"".join(out))

    # ---- the parser's side

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
        known.on_confirm(tag, multiple, ack)

    def on_deliver(self, channel: int, consumer: bytes, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
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

    def on_return(self, channel: int, code: int, text: str, exchange: bytes, key: bytes, properties: bytes) -> None:  # noqa: ARG002
        """Hand it to its channel."""
        known = self._channels.get(channel)
        if known is None:
            raise _not_open(channel)
        known.on_return(code, text, key, properties)

    # ---- life

    async def handshake(self) -> None:
        """Log in, agree on limits, open the vhost; the caller sets the deadline."""
        start = await self._expect(commands.Connection.Start)
        mechanism, response = self.address.login()
        offered = str(start.mechanisms).split()
        if mechanism not in offered:
            raise Closed("connection", 403, f"it offers no {mechanism} login, only {' '.join(offered)}")
        capabilities = dict.fromkeys(
            ("publisher_confirms", "basic.nack", "connection.blocked", "consumer_cancel_notify", "authentication_failure_close"), True
        )
        properties: dict[str, Any] = {"product": "leveret", "connection_name": self.name, "capabilities": capabilities}
        tune = await self._expect(
            commands.Connection.Tune, commands.Connection.StartOk(client_properties=properties, mechanism=mechanism, response=response)
        )
        self.frame_max = min(tune.frame_max or 131_072, 131_072)
        self._parser.frame_max = self.frame_max + BROKERS_HEADERS_BYTES
        self._channel_max = min(tune.channel_max or 2047, 2047)
        self._heartbeat_s = float(min(tune.heartbeat or self.address.heartbeat_s, self.address.heartbeat_s))
        self.write(
            method_frame(
                0, commands.Connection.TuneOk(channel_max=self._channel_max, frame_max=self.frame_max, heartbeat=round(self._heartbeat_s))
            )
        )
        await self._expect(commands.Connection.OpenOk, commands.Connection.Open(virtual_host=self.address.vhost))
        self._handshake = None
        _check_open(self.closed)  # it may have closed in the same breath as the open-ok
        self._beaten = self.loop.time()
        self._beat = self.loop.call_later(self._heartbeat_s / 2, self._on_beat)

    async def _expect(self, kind: type[Frame], method: Frame | None = None) -> Any:
        _check_open(self.closed)
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
        _check_open(self.closed)
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

    def forget(self, channel: Channel) -> None:
        """Free a channel's number."""
        if self._channels.get(channel.number) is channel:
            del self._channels[channel.number]
            self._parser.forget(channel.number)

    def _break(self, code: int, text: str) -> None:
        """Close because the peer broke the protocol."""
        text = text[:250]
        self.write(method_frame(0, commands.Connection.Close(reply_code=code, reply_text=text[:120], class_id=0, method_id=0)))
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
            _fail(self._handshake, why)
        self.resume_writing()
        for channel in list(self._channels.values()):
            channel.end(why)
        if self._transport is not None:
            if why.scope == "socket":
                self._transport.abort()
            else:
                self._transport.close()
                self._last_resort = self.loop.call_later(CLOSE_TIMEOUT_S, self._transport.abort)  # a peer that reads nothing would keep it open
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
        if self.closed is None:
            self._closing = self.loop.create_future()
            self.write(method_frame(0, commands.Connection.Close(reply_code=200, reply_text="bye", class_id=0, method_id=0)))
            await asyncio.wait([self._closing], timeout=timeout_s)
            self.end(Closed("connection", 200, "it was closed"))
        if self._transport is not None:
            self._transport.abort()


def _check_open(closed: Closed | None) -> None:
    if closed is not None:
        raise closed.with_traceback(None)  # or each raise would add its frames to it


def _not_open(channel: int) -> ProtocolError:
    return ProtocolError(504, f"a frame on channel {channel}, which isn't open")


def _fail(future: asyncio.Future[Any], why: Exception) -> None:
    if not future.done():
        future.set_exception(why)
        future.exception()  # looked at: a publisher that was cancelled meanwhile doesn't come for it


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


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
                lambda: connection, address.host, address.port, ssl=context, server_hostname=address.host if context is not None else None
            )
            await connection.handshake()
    except BaseException:
        connection.abort()
        raise
    return connection
