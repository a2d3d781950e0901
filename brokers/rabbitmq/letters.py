"""Read the dead letters of a queue by consumers, replay and drop them, and put back in order what was only read.

    count ─► page: qos, consume ─► letters ─► cancel ─► next page … ─► acks ─► close: the channels return the rest, oldest first

Measured on RabbitMQ 3.10.8, 4.0.5 and 4.3.6: a quorum queue takes back the letters of a closed channel consumer by consumer, in the
order of their tags or ages, and each consumer's letters in their order. With more than 32 consumers the order of the consumers is
lost, and each `basic.get` counts as one. A nack reorders too: 3.10.8 keeps the order of only 32 nacks at once.
Returned letters are delivered first, marked as redelivered, and go behind other returned letters when they return again. A reader
that stops among such letters therefore reads on to their end.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, Protocol

import msgspec
from pamqp import commands

from leveret.admin import DeadLetter
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable, LeveretError, Unroutable
from leveret.job import Priority

from . import topology
from .channel import Channel
from .connection import Connection
from .properties import from_dead_queue, id_in, max_delivered_bytes
from .publishing import Publishing
from .route import Route
from .session import settled
from .wire import check_open

_STEP_S = 10.0
_QUIET_S = 0.5
"""After this silence a page counts its queue: another reader may hold the letters that are missing."""
_RETURN_S = 2.0
_FIRST_PAGE = 8
_MOST_PAGE = 1000
"""Pages begin small and double: the broker sends a whole page at once, before anything is known of its bodies."""
_MOST_CONSUMERS = 31
"""On one channel; the basic.get of `settled` is the 32nd."""
HELD_BYTES = 64 << 20
"""The limit for bodies that have arrived and weren't read yet, in bytes; above it the socket is paused until half is read."""


class LettersAdmin(Protocol):
    """The admin, as a reader of dead letters sees it."""

    @property
    def publishing(self) -> Publishing:
        """Publishes replays, on a separate connection."""
        ...

    @property
    def max_body_bytes(self) -> int:
        """The largest body of a job."""
        ...

    async def step(self, work: Awaitable[Any], /) -> Any:
        """Return the result of `work`; a connection's error is raised as one of leveret's errors."""
        ...

    async def count(self, name: str, /) -> tuple[int, int] | None:
        """Return the counts of ready messages and of consumers of a physical queue; None if the queue doesn't exist."""
        ...


class _Hand:
    """A channel of consumers, and the letters that they hold."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.consumers = 0
        self.open: set[int] = set()
        """The tags of letters that are neither replayed nor dropped."""
        self.acks: list[int] = []
        """The tags to ack once the page is complete: before that, an ack would make its consumer take one letter more."""
        self.acked = False


class RabbitDeadLetter:
    """One buried job, decoded when it is asked for; see `leveret.admin.DeadLetter`."""

    __slots__ = ("_decode", "_envelope", "body", "hand", "properties", "tag")

    def __init__(
        self, hand: _Hand, tag: int, properties: bytes, body: bytes, decode: Callable[[bytes, bytes], Envelope]
    ) -> None:
        self.hand = hand
        self.tag = tag
        self.properties = properties
        self.body = body
        self._decode = decode
        self._envelope: Envelope | None = None

    @property
    def job_id(self) -> str:
        """The job's id."""
        return id_in(self.properties) or self.envelope.job_id

    @property
    def envelope(self) -> Envelope:
        """The job as it was buried."""
        if self._envelope is None:
            self._envelope = self._decode(self.properties, self.body)
        return self._envelope


class RabbitDeadLetters:
    """The dead letters of one queue, as many as at opening: a replayed job that fails again at once isn't read twice.

    Nothing else may use `connection`: its socket is paused while many letters wait here to be read.
    """

    def __init__(self, admin: LettersAdmin, connection: Connection, name: str, count: int) -> None:
        self._admin = admin
        self._connection = connection
        self._name = name
        self._queue = topology.dead_queue(name)
        self._max_properties_bytes = max_delivered_bytes(connection.frame_max)
        self._left = count
        """Letters that no page has asked for."""
        self._coming = 0
        """Letters of the open page that haven't arrived."""
        self._cancelled: asyncio.Future[Any] | None = None
        """The answer to the cancel of the last page's consumer."""
        self._page = _FIRST_PAGE
        self._largest = 1
        """The largest letter of the last page, in bytes."""
        self._came = deque[RabbitDeadLetter]()
        self._came_bytes = 0
        self._arrived = asyncio.Event()
        self._repeated = False
        """Whether the last letter that arrived was returned by an earlier reader; then more such letters may follow."""
        self._closing = False
        self._hands: list[_Hand] = []
        self._siblings: dict[str, bool | None] = {}
        """By original queue: whether it has siblings, one per level; None if it doesn't exist."""
        self._looking = asyncio.Lock()

    async def __aiter__(self) -> AsyncIterator[DeadLetter]:
        while await self._next_came():
            letter = self._came.popleft()
            self._came_bytes -= len(letter.body)
            if self._came_bytes <= HELD_BYTES // 2:
                self._connection.resume_reading()
            yield letter

    async def _next_came(self) -> bool:
        """Wait for a letter, asking for a page if none is open; return False once there are no more."""
        self._check_open()
        while not self._came:
            if self._coming:
                await self._wait()
            elif self._left:
                await self._admin.step(self._ask())
            else:
                return False
            self._check_open()
        return True

    def _check_open(self) -> None:
        for hand in self._hands:
            if hand.channel.closed is not None:
                msg = f"the channel to the dead letters of {self._name} is closed: {hand.channel.closed}"
                raise BrokerUnavailable(msg)

    async def _ask(self) -> None:
        """Open a page: a consumer whose prefetch is the page's size."""
        await self._page_ended()
        if not self._hands or self._hands[-1].consumers == _MOST_CONSUMERS:
            channel = await self._connection.channel(_STEP_S)
            channel.on_closed = lambda _: self._arrived.set()
            self._hands.append(_Hand(channel))
        hand = self._hands[-1]
        size = min(self._page, self._left, max(1, HELD_BYTES // 2 // self._largest))
        self._page = min(2 * self._page, _MOST_PAGE)
        self._left -= size
        self._coming, self._largest = size, 1
        hand.consumers += 1
        tag = _tag(hand)
        hand.channel.consumers[tag.encode()] = partial(self._take, hand)
        calls = commands.Basic.Qos(prefetch_count=size), commands.Basic.Consume(queue=self._queue, consumer_tag=tag)
        await hand.channel.call_all(calls, _STEP_S)

    def _take(self, hand: _Hand, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        hand.open.add(tag)
        self._repeated = redelivered
        self._largest = max(self._largest, len(properties) + len(body))
        if not self._closing:
            self._came.append(RabbitDeadLetter(hand, tag, properties, body, self._decoded))
            self._came_bytes += len(body)
            if self._came_bytes > HELD_BYTES:
                self._connection.pause_reading()
        if self._coming:
            self._coming -= 1
            if not self._coming:
                self._end_page()
        self._arrived.set()

    async def _page_ended(self) -> None:
        """Wait until the broker has ended the last page's consumer; before that, no call may be made on its channel."""
        if self._cancelled is not None:
            async with asyncio.timeout(_STEP_S):
                await asyncio.shield(self._cancelled)

    def _decoded(self, properties: bytes, body: bytes) -> Envelope:
        envelope, _ = from_dead_queue(
            properties, body, self._name, self._max_properties_bytes, self._admin.max_body_bytes
        )
        return envelope

    def _end_page(self) -> None:
        """End the page's consumer, and write the acks that waited for that."""
        hand = self._hands[-1]
        if hand.channel.closed is None:
            self._cancelled = hand.channel.cancel_soon(_tag(hand))
        for tag in hand.acks:
            hand.channel.ack(tag, multiple=False)
        hand.acks.clear()

    async def _wait(self) -> None:
        """Wait for a letter of the open page; end the page if its queue is empty, since others hold the missing letters."""
        self._arrived.clear()
        ends = time.monotonic() + _STEP_S
        while not self._arrived.is_set():
            try:
                async with asyncio.timeout(_QUIET_S):
                    await self._arrived.wait()
            except TimeoutError:
                if self._connection.quiet_s < _QUIET_S:
                    ends = time.monotonic() + _STEP_S  # a large body comes in pieces
                    continue
                found = await self._admin.count(self._queue)
                if found is None or not found[0]:
                    self._left = self._coming = 0
                    self._end_page()
                    return
                if time.monotonic() > ends:
                    msg = f"RabbitMQ delivers no letter of {self._queue}, although {found[0]} are ready"
                    raise BrokerUnavailable(msg) from None

    async def replay(self, letter: DeadLetter, envelope: Envelope) -> None:
        """Publish `envelope` to the queue that it came from, confirmed; then ack the letter."""
        route = await self._route(envelope)
        again = msgspec.structs.replace(envelope, origin=None)
        publishing, deadline = self._admin.publishing, time.monotonic() + _STEP_S
        link = await publishing.linked(route, again, deadline)
        self._held(letter)  # right before the publish: a letter that can't be acked then would be replayed again
        await publishing.write(link, route, again, deadline)
        await self.drop(letter)

    async def _route(self, envelope: Envelope) -> Route:
        """Return the route to the envelope's queue and level; only a classic queue gets the priority property."""
        name, level = envelope.queue, envelope.priority
        async with self._looking:  # many replays may ask at once
            if name not in self._siblings:
                there = await self._admin.count(name) is not None
                high = await self._admin.count(topology.sibling(name, Priority.HIGH)) if there else None
                self._siblings[name] = high is not None if there else None
        siblings = self._siblings[name]
        if siblings is None:
            msg = f"{envelope.job or 'a job'}: queue {name} doesn't exist; start its worker first"
            raise Unroutable(msg, job_id=envelope.job_id, queue=name)
        priority = None if siblings else topology.PRIORITY_PROPERTY[level]
        return Route(topology.JOBS, topology.job_key(name, level), priority, None, None, ends_at=name)

    async def drop(self, letter: DeadLetter) -> None:
        """Ack the letter, which deletes it."""
        held = self._held(letter)
        hand = held.hand
        hand.open.remove(held.tag)
        hand.acked = True
        if self._coming and hand is self._hands[-1]:
            hand.acks.append(held.tag)
        else:
            hand.channel.ack(held.tag, multiple=False)

    def _held(self, letter: DeadLetter) -> RabbitDeadLetter:
        """Return the letter, or raise: it isn't one of RabbitMQ's, its channel is closed, or it was replayed or dropped."""
        if not isinstance(letter, RabbitDeadLetter):
            msg = f"replay() and drop() take a dead letter of RabbitMQ, not {letter!r}"
            raise TypeError(msg)
        if letter.hand.channel.closed is not None:
            msg = f"the channel to the dead letters of {self._name} is closed: {letter.hand.channel.closed}"
            raise BrokerUnavailable(msg)
        if letter.tag not in letter.hand.open:
            msg = f"the dead letter of job {letter.job_id} was replayed or dropped before"
            raise LeveretError(msg)
        return letter

    async def close(self) -> None:
        """Put back what was only read, in its order, once the broker has received the acks."""
        self._closing = True
        self._came.clear()
        self._connection.resume_reading()
        try:
            await self._read_on()
            await self._page_ended()
            for hand in self._hands:
                if hand.acked:
                    check_open(hand.channel.closed)  # the last acks may be lost: then their letters are back
                    await settled(hand.channel, self._queue, _STEP_S)
            for hand in self._hands:
                if hand.channel.closed is None:
                    await self._return(hand)
        finally:
            await self._connection.close()

    async def _read_on(self) -> None:
        """Wait for the rest of the page, and of the letters that earlier readers returned; their bodies aren't kept."""
        while all(hand.channel.closed is None for hand in self._hands):
            if self._coming:
                await self._wait()
            elif self._repeated and self._left and any(hand.open for hand in self._hands):
                await self._ask()
            else:
                return

    async def _return(self, hand: _Hand) -> None:
        """Close a channel, and wait until its queue has taken the letters back: the next channel's go behind them."""
        before = await self._admin.count(self._queue) if hand.open else None
        await hand.channel.close()
        ends = time.monotonic() + _RETURN_S
        while before is not None and time.monotonic() < ends:
            found = await self._admin.count(self._queue)
            if found is None or found[0] >= before[0] + len(hand.open):
                return
            await asyncio.sleep(0.01)


def _tag(hand: _Hand) -> str:
    """Return the tag of the newest consumer: sorted, since 3.10 returns by tag, and before the digits that are a basic.get's tag."""
    return f"#{hand.consumers:02d}"
