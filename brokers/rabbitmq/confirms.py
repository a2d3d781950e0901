"""The confirm window of a channel: its unconfirmed publishes, the publishers that wait for room, and how each publish ends.

The window makes no task and no future per message; only a publisher that waits has a future.
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
"""At most this many publishes of a channel are unconfirmed at once."""
_MOST_LATE = 9 * WINDOW
"""At most this many `Late` publishes are kept for a later confirm: a queue that confirms nothing must not fill the memory."""
_SWEEP_S = 0.05
"""The interval at which deadlines are checked, seconds."""
MOST_STUCK = 16
"""With 32 unconfirmed publishes in one quorum queue (its `quorum_commands_soft_limit`), RabbitMQ 3.10.8 accepts at most 400 more
publishes on that connection, to any queue (its `credit_flow_default_credit`), and confirms none after them."""
_STUCK_SWEEPS = 20
"""The sweeps of one second."""


class Returned(Exception):
    """No queue took a mandatory publish."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Nacked(Exception):
    """The broker refused to keep a publish."""


class Late(Exception):
    """A publish's deadline passed before its confirm; the job may be in the queue."""


class Refused(Exception):
    """The broker closed the channel because of this publish; the cause is the `Closed`."""

    def __init__(self, why: Closed) -> None:
        super().__init__(why.text)
        self.why = why


class Unread(Exception):
    """The broker closed the channel at an earlier publish, and ignored this one."""


class Unconfirmed(msgspec.Struct, eq=False):
    """A written publish. One task may await it: it returns at the confirm, or raises its `failure`.

    Not a future: of many publishes at once, only a few are ever waited for.
    """

    message_id: str
    key: str
    deadline: float
    """When the publish ends as `Late`, `time.monotonic()` seconds."""
    ended: bool = False
    failure: Exception | None = None
    """Once ended: `Returned`, `Nacked`, `Late`, `Refused`, `Unread` or `Closed`; None if confirmed."""
    _waiter: asyncio.Future[None] | None = None

    @property
    def given_up(self) -> bool:
        """Whether the task that waited for it has stopped waiting."""
        return self._waiter is not None and self._waiter.cancelled()

    def end(self, failure: Exception | None = None) -> None:
        """End the publish; only the first call counts."""
        if not self.ended:
            self.ended = True
            self.failure = failure
            if self._waiter is not None:
                wake(self._waiter)

    async def wait(self) -> None:
        """Return once the publish has ended, confirmed or not."""
        if not self.ended:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def __await__(self) -> Generator[Any, None, None]:
        yield from self.wait().__await__()
        if (error := self.error()) is not None:
            # one exception may end many publishes: each raise would add its frames to the traceback
            raise error.with_traceback(None)

    def error(self) -> Exception | None:
        """Return the exception that awaiting the ended publish raises; None if confirmed."""
        return self.failure

    def blamed(self, why: Closed) -> bool:
        """Return whether this publish may be the reason why the broker closed its channel."""
        del why
        return False


class ConfirmWindow:
    """The unconfirmed publishes of one channel, and the publishers that wait for room."""

    def __init__(self, wire: Wire, number: int) -> None:
        self._wire = wire
        self._number = number
        self.closed: Closed | None = None
        """Why the channel was closed; None while it is open."""
        self.on_swept: Callable[[], None] | None = None
        """Called after each sweep, until no publish is unconfirmed."""
        self._next_tag = 1
        self._lowest = 1
        self._unconfirmed: dict[int, Unconfirmed] = {}
        """By delivery tag, the oldest first; includes those that ended as `Late`."""
        self._late = 0
        """How many of them ended as `Late`. These take no place in the window: otherwise a queue that confirms nothing would stop all publishing."""
        self._confirmed = 0
        """The highest tag that the broker has confirmed."""
        self.refused = False
        """Whether the broker has refused to keep a publish of this channel."""
        self._known: set[str] = set()
        """Routing keys with at least one confirmed publish."""
        self._marks: deque[tuple[int, int]] = deque(maxlen=_STUCK_SWEEPS)
        """The next tag and the highest confirmed tag, at each sweep."""
        self._returned: dict[int, Returned] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._keys: dict[tuple[str, str], bytes] = {}
        self._waiters: deque[tuple[asyncio.Future[None], int]] = deque()
        """The publishers that wait for room, each with the bytes of its body."""
        self._promised = self._promised_bytes = 0
        """Places in the window, and bytes, that are reserved for woken waiters which haven't published yet."""

    def end(self, why: Closed) -> None:
        """End all publishes, and wake everybody who waits for room.

        If the broker closed only the channel, one publish is to blame. The broker ignores all publishes after that one. It has read
        those before, and may have kept them, but doesn't confirm them any more.
        """
        self.closed = why
        if self._sweeper is not None:
            self._sweeper.cancel()
        publishes = list(self._unconfirmed.values())
        blamed = {at for at, publish in enumerate(publishes) if why.scope == "channel" and publish.blamed(why)}
        last = max(blamed, default=len(publishes))
        for at, publish in enumerate(publishes):
            publish.end(Refused(why) if at in blamed else Unread(why.text) if at > last else why)
        self.let_go()
        self._unconfirmed.clear()

    @property
    def full(self) -> bool:
        """Whether a publish must wait: for confirms, or for the socket."""
        return len(self._unconfirmed) - self._late + self._promised >= WINDOW or not self._wire.writable

    @property
    def _second_ago(self) -> tuple[int, int]:
        """The next tag and the highest confirmed tag a second ago; until a second has passed, as if nothing had been written."""
        return self._marks[0] if len(self._marks) == _STUCK_SWEEPS else (0, self._confirmed)

    @property
    def idle(self) -> bool:
        """Whether nobody waits here: all publishes are confirmed, or all have ended and none was written for a second."""
        if self._waiters or self._promised or len(self._unconfirmed) > self._late:
            return False
        return not self._unconfirmed or self._second_ago[0] == self._next_tag

    def stuck(self) -> list[Unconfirmed]:
        """Return the publishes to a queue that seems to confirm nothing and holds up all others, or soon will; the oldest first.

        A stuck publish is unconfirmed a second after it was written. Either `MOST_STUCK` or more are, while later publishes were
        confirmed. Or nothing was confirmed in that second: then the stuck one is the first publish to a queue that has never
        confirmed any here. RabbitMQ handles the publishes of a channel in turn, and the first to such a queue may take minutes.
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
        """Whether any publish was confirmed in the last second, and none is stuck."""
        return self._second_ago[1] < self._confirmed and not self.stuck()

    def restart_clock(self) -> None:
        """Forget how long publishes have waited: an alarm of the broker made them wait."""
        self._marks.clear()

    def progress(self) -> int:
        """Return the highest tag that the broker has confirmed."""
        return self._confirmed

    @property
    def waiting(self) -> bool:
        """Whether any publisher waits for room."""
        return bool(self._waiters)

    @property
    def waited_for(self) -> Iterator[Unconfirmed]:
        """The publishes that haven't ended."""
        return (publish for publish in self._unconfirmed.values() if not publish.ended)

    @property
    def why_full(self) -> str:
        """Why a publish finds no room, for messages."""
        on_their_way = len(self._unconfirmed) - self._late
        if on_their_way + self._promised >= WINDOW:
            return f"{on_their_way} publishes are unconfirmed"
        if not self._wire.writable:
            return "RabbitMQ doesn't read from the connection"
        return "earlier publishes wait for room"

    async def room(self, size: int = 0) -> None:
        """Wait for room for a body of `size` bytes, first come, first served; return at once if the channel is closed."""
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
                self._kept(size)  # woken, but cancelled: the next waiter can have the room
            raise
        self._kept(size)

    def _kept(self, size: int) -> None:
        """End a reservation; the last one wakes further waiters, since no other event comes if nothing was written."""
        self._promised -= 1
        self._promised_bytes -= size
        if self._waiters and not self._promised:
            self._wire.loop.call_soon(self.wake_waiters)

    def wake_waiters(self) -> None:
        """Wake as many waiters as fit into the window and into the bytes of one write: all at once would fill the memory."""
        while self._waiters and not self.full and self._wire.queued + self._promised_bytes < WRITE_HIGH_BYTES:
            self._wake_first()  # which takes a place

    def let_go(self) -> None:
        """Wake every waiter, with or without room: another channel may take its publish."""
        while self._waiters:
            self._wake_first()

    def _wake_first(self) -> None:
        waiter, size = self._waiters.popleft()
        self._promised += 1
        self._promised_bytes += size
        wake(waiter)

    def publish(self, exchange: str, properties: bytes, body: bytes, publish: Unconfirmed) -> None:
        """Write a mandatory publish to `publish.key`; on a closed channel it ends as `Closed` at once."""
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
        """End late publishes: one look at all of them every 50 ms costs less than a timer per publish."""
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
        """Handle a confirm (ack or nack) of one publish, or of all up to `tag`."""
        if not 0 <= tag < self._next_tag:
            raise ProtocolError(503, f"a confirm of publish {tag}; only {self._next_tag - 1} were written")
        unconfirmed = self._unconfirmed
        if multiple:
            lowest, top = self._lowest, tag or self._next_tag - 1
            if lowest not in unconfirmed:  # after a million single confirms, don't look at each tag again
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
            self.refused = True
            publish.end(Nacked("the broker refused to keep it (basic.nack)"))

    def on_return(self, code: int, text: str, key: bytes, properties: bytes) -> None:
        """Handle a basic.return: no queue took the publish; its confirm comes next.

        A return names no tag. It belongs to the oldest publish with its id and key that isn't returned yet, since the broker
        returns in order. A return without an id is matched by its key alone: otherwise the ack that follows would count as a confirm.
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
        logger.warning("RabbitMQ returned message %s, which wasn't published on this channel", message_id)
