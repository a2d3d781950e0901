"""A channel of an AMQP connection: its calls, consumers and acks; its `ConfirmWindow` handles its publishes.

A channel writes to its `Connection`, which sends everything at the end of the loop turn.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

import msgspec
from pamqp import commands
from pamqp.base import Frame

from .confirms import ConfirmWindow
from .frames import ProtocolError, ack_frame, method_frame, nack_frame, reject_frame
from .wire import CLOSE_TIMEOUT_S, Closed, Wire, check_open, fail


class Got(msgspec.Struct, frozen=True):
    """A message taken by `Channel.get`."""

    tag: int
    redelivered: bool
    properties: bytes
    body: bytes


Deliver = Callable[[int, bool, bytes, bytes], None]
"""Called with the delivery tag, redelivered, the encoded properties and the body."""


class Channel:
    """One channel: it makes calls in turn, and has either confirmed publishes or consumers."""

    def __init__(self, connection: Wire, number: int) -> None:
        self.connection = connection
        self.number = number
        self.closed: Closed | None = None
        self.on_closed: Callable[[Closed], None] | None = None
        """Called once, when the channel is closed by anything but `close`."""
        self.on_cancelled: Callable[[str], None] | None = None
        """Called when the broker cancels a consumer: its queue was deleted, or a delivery was held too long."""
        self._calls: deque[tuple[Collection[str], asyncio.Future[Any]]] = deque()
        self._leaving: asyncio.Future[Any] | None = None
        self.consumers: dict[bytes, Deliver] = {}
        """By consumer tag: the callback for its deliveries."""
        self.window = ConfirmWindow(connection, number)
        self.progress: Callable[[], int] = self.window.progress
        """Returns a number that grows with each confirm, or with each delivery once the channel has consumers."""

    async def call(self, method: Frame, timeout_s: float) -> Frame:
        """Send `method` and return its answer; `Closed` if the broker closes instead, TimeoutError without an answer."""
        answer: asyncio.Future[Frame] = self._asked(method)
        async with asyncio.timeout(timeout_s):
            return await answer

    async def call_all(self, methods: Iterable[Frame], timeout_s: float) -> None:
        """Send `methods` at once and wait at most `timeout_s` for each answer: one round trip instead of one per method."""
        for answer in [self._asked(method) for method in methods]:
            async with asyncio.timeout(timeout_s):
                await answer

    def _asked(self, method: Frame) -> asyncio.Future[Any]:
        check_open(self.closed)
        answer: asyncio.Future[Any] = self.connection.loop.create_future()
        self._calls.append((method.valid_responses, answer))
        self.connection.write(method_frame(self.number, method))
        return answer

    async def open(self, timeout_s: float) -> None:
        """Open the channel."""
        await self.call(commands.Channel.Open(), timeout_s)

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Close the channel: unsettled deliveries return to their queue. For settlements just before, see `session.settled`."""
        if self.closed is None:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self.leave())

    def leave(self) -> asyncio.Future[Any]:
        """Ask the broker to close the channel; its number is free once the broker has answered, however late."""
        self.on_closed = None
        if self._leaving is None:
            self._leaving = self._asked(commands.Channel.Close(reply_code=200, reply_text="", class_id=0, method_id=0))
            self._leaving.add_done_callback(lambda _: self.end(Closed("channel", 200, "the channel was closed")))
        return self._leaving

    def on_method(self, method: Frame) -> None:
        """Handle a method that isn't on a hot path."""
        match method:
            case commands.Channel.Close():
                self.connection.write(method_frame(self.number, commands.Channel.CloseOk()))
                self.end(Closed("channel", method.reply_code or 0, str(method.reply_text)))
            case commands.Basic.Cancel():
                self.consumers.pop(str(method.consumer_tag).encode(), None)
                if self.on_cancelled is not None:
                    self.on_cancelled(str(method.consumer_tag))
            case commands.Channel.CloseOk() if not self._calls or method.name not in self._calls[0][0]:
                pass  # for an earlier channel with this number, which both sides closed at once
            case commands.Channel.Flow():
                self.connection.write(method_frame(self.number, commands.Channel.FlowOk(active=bool(method.active))))
            case _:
                if not self._calls:
                    raise ProtocolError(503, f"unexpected {method.name}: nothing waits for it")
                expected, answer = self._calls.popleft()
                if method.name not in expected:
                    raise ProtocolError(503, f"{method.name} in answer to a call that {' or '.join(expected)} answers")
                if not answer.done():
                    answer.set_result(None if isinstance(method, commands.Basic.GetEmpty) else method)

    def end(self, why: Closed) -> None:
        """Fail everything that waits on the channel; nothing more is written to it."""
        if self.closed is not None:
            return
        self.closed = why
        self.connection.forget(self.number)
        for _, answer in self._calls:
            fail(answer, why)
        self._calls.clear()
        self.window.end(why)
        self.consumers.clear()
        if self.on_closed is not None:
            self.on_closed(why)

    async def consume(self, queue: str, tag: str, deliver: Deliver, timeout_s: float) -> None:
        """Register a consumer; `deliver` is called from the reader and must return at once."""
        self.consumers[tag.encode()] = deliver
        await self.call(commands.Basic.Consume(queue=queue, consumer_tag=tag), timeout_s)

    async def cancel(self, tag: str, timeout_s: float) -> None:
        """End a consumer; its deliveries can still be acked."""
        await self.call(commands.Basic.Cancel(consumer_tag=tag), timeout_s)
        self.consumers.pop(tag.encode(), None)  # after the answer the consumer gets no more deliveries

    def cancel_soon(self, tag: str) -> asyncio.Future[Any]:
        """Write the end of a consumer now, and return its answer; deliveries that are on their way still reach the consumer.

        Make no other call before the answer: RabbitMQ may answer that call first.
        """
        return self._asked(commands.Basic.Cancel(consumer_tag=tag))

    async def get(self, queue: str, timeout_s: float) -> Got | None:
        """Take one message out of `queue`, to be settled on this channel; None if the queue is empty."""
        answer: asyncio.Future[Got | None] = self._asked(commands.Basic.Get(queue=queue))
        async with asyncio.timeout(timeout_s):
            return await answer

    def on_got(self, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        """Handle the answer to `get`."""
        if not self._calls or "Basic.GetOk" not in self._calls[0][0]:
            raise ProtocolError(503, "unexpected basic.get-ok: nothing waits for it")
        _, answer = self._calls.popleft()
        if not answer.done():
            answer.set_result(Got(tag, redelivered, properties, body))

    def ack(self, tag: int, *, multiple: bool) -> None:
        """Ack one delivery, or all up to and including it."""
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
