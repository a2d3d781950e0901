"""The confirm window of a channel: the publishes on their way, who waits for room, and how each publish ends.

No task and no future a message but the publisher's own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

import msgspec

from .frames import ProtocolError, content_frames, message_id_of, publish_frame
from .wire import WRITE_HIGH_BYTES, Closed, Wire, wake

logger = logging.getLogger("leveret.rabbitmq")

WINDOW = 1000
"""Most publishes on their way at once on a channel."""
_MOST_LATE = 9 * WINDOW
"""Most that ended as `Late` and are still known, for the broker's word on them: one queue that confirms nothing mustn't fill the memory."""
_SWEEP_S = 0.05
"""How late a publish's deadline may be noticed."""
MOST_STUCK = 16
"""With 32 unconfirmed in one quorum queue (its `quorum_commands_soft_limit`) RabbitMQ 3.10.8 takes at most 400 more publishes of that
connection, to whatever queue (its `credit_flow_default_credit`), and confirms none after them."""
_STUCK_SWEEPS = 20
"""A second of them."""


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
                wake(self._waiter)

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


class ConfirmWindow:
    """The publishes of one channel that the broker hasn't confirmed, and those who wait until there is room for theirs."""

    def __init__(self, wire: Wire, number: int) -> None:
        self._wire = wire
        self._number = number
        self.closed: Closed | None = None
        """Why nothing more can be published here."""
        self.on_swept: Callable[[], None] | None = None
        """Called after each look for publishes that are late, until none is on its way."""
        self._next_tag = 1
        self._lowest = 1
        self._unconfirmed: dict[int, Unconfirmed] = {}
        """By delivery tag, the oldest first; those that ended as `Late` too."""
        self._late = 0
        """How many of them ended as `Late`: they take no place in the window, or one queue that confirms nothing would end all publishing."""
        self._confirmed = 0
        """The highest tag that the broker has confirmed."""
        self._known: set[str] = set()
        """Keys of which any was confirmed."""
        self._marks: deque[tuple[int, int]] = deque(maxlen=_STUCK_SWEEPS)
        """The next tag, and the highest confirmed one, at each look for late ones."""
        self._returned: dict[int, Returned] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._keys: dict[tuple[str, str], bytes] = {}
        self._waiters: deque[tuple[asyncio.Future[None], int]] = deque()
        """Who waits for room, and for how many bytes."""
        self._promised = self._promised_bytes = 0
        """Places in the window, and bytes, that are kept for waiters that were woken and haven't published yet."""

    def end(self, why: Closed) -> None:
        """End all publishes, and wake all that wait for room."""
        self.closed = why
        if self._sweeper is not None:
            self._sweeper.cancel()
        for publish in self._unconfirmed.values():
            publish.end(why)
        self.let_go()
        self._unconfirmed.clear()

    @property
    def full(self) -> bool:
        """Whether a publish should wait: for confirms, or for the socket."""
        return len(self._unconfirmed) - self._late + self._promised >= WINDOW or not self._wire.writable

    @property
    def _second_ago(self) -> tuple[int, int]:
        """The next tag and the highest confirmed one of then; as if nothing had been written by then, where it isn't known."""
        return self._marks[0] if len(self._marks) == _STUCK_SWEEPS else (0, self._confirmed)

    @property
    def idle(self) -> bool:
        """Whether nobody waits for its publishes: all are confirmed, or all have ended, and none was written for a second."""
        if self._waiters or self._promised or len(self._unconfirmed) > self._late:
            return False
        return not self._unconfirmed or self._second_ago[0] == self._next_tag

    def stuck(self) -> list[Unconfirmed]:
        """Return the publishes whose queue seems to confirm nothing, and will hold up all others, or does already; the oldest first.

        A second after they were written they aren't confirmed: `MOST_STUCK` or more though later ones are, or where nothing was confirmed in
        that second the first to a queue that never confirmed any here. RabbitMQ handles the publishes of a channel in turn, and the first
        one to such a queue may take it minutes.
        """
        found: list[Unconfirmed] = []
        written, confirmed = self._second_ago
        for tag, publish in self._unconfirmed.items():
            if tag >= written or tag > self._confirmed:
                break
            found.append(publish)
        if len(found) >= MOST_STUCK:
            return found
        if confirmed < self._confirmed:
            return []
        old = [publish for tag, publish in self._unconfirmed.items() if tag < written]
        return next(([publish] for publish in old if publish.key not in self._known), old[:1])

    @property
    def confirms(self) -> bool:
        """Whether any was confirmed in the last second, and none is stuck."""
        return self._second_ago[1] < self._confirmed and not self.stuck()

    def start_anew(self) -> None:
        """Forget how long publishes have waited: they had to, for an alarm."""
        self._marks.clear()

    @property
    def waiting(self) -> bool:
        """Whether anybody waits for room."""
        return bool(self._waiters)

    @property
    def waited_for(self) -> Iterator[Unconfirmed]:
        """The publishes that haven't ended."""
        return (publish for publish in self._unconfirmed.values() if not publish.ended)

    @property
    def why_full(self) -> str:
        """What a publish waits for that finds no room, for people."""
        on_their_way = len(self._unconfirmed) - self._late
        if on_their_way + self._promised >= WINDOW:
            return f"{on_their_way} publishes are unconfirmed"
        if not self._wire.writable:
            return "RabbitMQ doesn't read what was written before it"
        return "others waited before it"

    async def room(self, size: int = 0) -> None:
        """Wait until it isn't `full`, for a body of `size` bytes, first come first served; or until it is closed."""
        if self.closed is not None or not (self._waiters or self.full):
            return
        place = self._wire.loop.create_future(), size
        self._waiters.append(place)
        try:
            await place[0]
        except BaseException:
            if place in self._waiters:
                self._waiters.remove(place)
            else:
                self._kept(size)  # it was woken, and can't use it: the next one in line can
            raise
        self._kept(size)

    def _kept(self, size: int) -> None:
        """End a promise; the last one looks who else may go on, since no other event may come where nothing was written."""
        self._promised -= 1
        self._promised_bytes -= size
        if self._waiters and not self._promised:
            self._wire.loop.call_soon(self.wake_waiters)

    def wake_waiters(self) -> None:
        """Let in as many as there is room for, in the window and in the bytes of one write: all at once would fill the memory."""
        while self._waiters and not self.full and self._wire.queued + self._promised_bytes < WRITE_HIGH_BYTES:
            self._wake_first()  # which takes a place

    def let_go(self) -> None:
        """Wake all that wait for room, whether or not there is any: there may be another channel for them."""
        while self._waiters:
            self._wake_first()

    def _wake_first(self) -> None:
        waiter, size = self._waiters.popleft()
        self._promised += 1
        self._promised_bytes += size
        wake(waiter)

    def publish(self, exchange: str, properties: bytes, body: bytes, publish: Unconfirmed) -> None:
        """Write a mandatory publish, to `publish.key`; it ends as `Closed` at once on a channel that is closed already."""
        if self.closed is not None:
            publish.end(self.closed)
            return
        head = self._keys.get((exchange, publish.key))
        if head is None:
            if len(self._keys) > 1000:  # a delayed job's key differs by its delay
                self._keys.clear()
            head = self._keys[exchange, publish.key] = publish_frame(self._number, exchange, publish.key)
        self._wire.write_all(
            head, content_frames(self._number, properties, body, self._wire.frame_max), len(properties) + len(body)
        )
        self._unconfirmed[self._next_tag] = publish
        self._next_tag += 1
        if self._sweeper is None:
            self._sweeper = self._wire.loop.call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """End what is late: one look at all each 50 ms costs less than a timer each."""
        self._sweeper = None
        if len(self._known) > 1000:  # a delayed job's key differs by its delay
            self._known.clear()
        self._marks.append((self._next_tag, self._confirmed))
        if self._unconfirmed or self._waiters or self._promised:
            self._end_late()
            self._sweeper = self._wire.loop.call_later(_SWEEP_S, self._sweep)
        if self.on_swept is not None:
            self.on_swept()

    def _end_late(self) -> None:
        now = time.monotonic()
        for publish in self._unconfirmed.values():
            if publish.deadline <= now and not publish.ended:
                publish.end(Late("no confirm in time"))
                self._late += 1
        if self._late > _MOST_LATE:
            self._forget_late()
        if self._waiters:
            self.wake_waiters()

    def _forget_late(self) -> None:
        late = [tag for tag, publish in self._unconfirmed.items() if publish.ended]
        for tag in late[:-_MOST_LATE]:
            del self._unconfirmed[tag]
            self._returned.pop(tag, None)
        self._late = _MOST_LATE

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
            self._confirmed = max(self._confirmed, top)
        elif tag in unconfirmed:
            self._confirm(tag, ack)
            self._confirmed = max(self._confirmed, tag)
        if self._waiters:
            self.wake_waiters()

    def _confirm(self, tag: int, ack: bool) -> None:
        publish = self._unconfirmed.pop(tag)
        if publish.ended:
            self._late -= 1
        returned = self._returned.pop(tag, None) if self._returned else None
        if returned is not None or ack:
            self._known.add(publish.key)
            publish.end(returned)
        else:
            publish.end(Nacked("the broker refused to keep it (basic.nack)"))

    def on_return(self, code: int, text: str, key: bytes, properties: bytes) -> None:
        """Take in a publish that no queue took; its confirm comes after it.

        It names no tag, so the oldest with its id and key that isn't returned yet is the one: the broker returns in order. Where it
        comes without an id its key has to do, or the ack after it would be taken for a confirm.
        """
        message_id, routing = message_id_of(properties), key.decode("utf-8", "replace")
        for tag, publish in self._unconfirmed.items():
            if (
                publish.key == routing
                and (not message_id or publish.message_id == message_id)
                and tag not in self._returned
            ):
                self._returned[tag] = Returned(code, text)
                return
        logger.warning("RabbitMQ returned a message that wasn't published here: %s", message_id)
