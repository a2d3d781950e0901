"""The publishing connections: opened by the first publish, and replaced when a queue confirms nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from functools import partial

from pamqp import commands

from leveret.backoff import full_jitter
from leveret.broker import PublisherState, PublisherStateName
from leveret.errors import ConfigurationError
from leveret.job import Queue
from leveret.runtime import Runtime

from .channel import Channel
from .confirms import MOST_STUCK, Unconfirmed
from .connection import Connection
from .nodes import Nodes
from .route import Route
from .session import FAULTS, ConnectionLost, reason_of, size_limit
from .topology import Ladder
from .wire import CLOSE_TIMEOUT_S, Closed

logger = logging.getLogger("leveret.rabbitmq")

_IDLE_CLOSE_S = 0.4
"""How long the answer to a close is waited for where nobody waits for a confirm. A queue that confirms nothing delays it for good."""
_MOST_ASIDE = 4
"""At most this many connections are left to queues that confirm nothing: if no queue confirms, more connections don't help."""
_RENEW_S = 1.0
"""How long a channel in which RabbitMQ refused a publish is used on, seconds: a full queue may refuse a thousand a second."""


class Link:
    """An open publishing connection, the window of its channel, and the topology that was declared on it."""

    def __init__(self, connection: Connection, channel: Channel) -> None:
        self.connection = connection
        self.channel = channel
        self.since = time.monotonic()
        self.window = channel.window
        self.declared: set[Queue | Ladder | None] = {None}
        self.ready: set[Route] = set()
        """Kept routes whose topology is declared: a look-up here is faster than two in `declared`."""
        self.declaring: dict[object, asyncio.Task[None]] = {}
        self.seen: dict[tuple[Ladder | None, str | None], float] = {}
        """By delay ladder and physical queue: when a job's way through both was last found to exist, monotonic seconds."""

    @property
    def usable(self) -> bool:
        """Whether the link can still be written to."""
        return self.window.closed is None

    def forget(self) -> None:
        """Declare everything again, each thing before the next publish that needs it: something was deleted."""
        self.declared = {None}
        self.ready.clear()
        self.seen.clear()


class Carried(Unconfirmed, eq=False, kw_only=True):
    """A publish that was written to a link."""

    link: Link
    route: Route


class Links:
    """The publishing connections: one for all queues, and further ones for queues that confirm nothing and would hold up the rest."""

    def __init__(self, nodes: Nodes, runtime: Runtime, name: str) -> None:
        self._nodes = nodes
        self._runtime = runtime
        self._name = name
        self.current: Link | None = None
        self.aside: dict[str, Link] = {}
        """By lane, the links that are left to queues that confirm nothing; all other lanes use `current`."""
        self._leaving: set[Link] = set()
        """Links that aren't `current` any more; each is closed once nobody waits for its publishes."""
        self._relieving: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._opening: asyncio.Task[Link] | None = None
        self._waiting = 0
        self._trying = False
        """Whether an attempt to connect is under way; False during the pause before one."""
        self._returning = False
        """Whether the connection was lost, and is opened again even if nobody waits for it."""
        self._brief = 0
        """How many connections in a row were lost sooner than the base of the back-off: they count as failed attempts."""
        self.state = PublisherState.at(runtime.clock.now(), "connecting", f"RabbitMQ at {nodes} wasn't reached yet")
        self._refused: tuple[float, ConfigurationError] | None = None
        self.closed = False

    def of(self, lane: str) -> Link | None:
        """Return the link for `lane`; None if none is open."""
        return self.aside.get(lane, self.current)

    def _is(self, name: PublisherStateName, why: str = "") -> None:
        self.state = self.state.then(self._runtime.clock.now(), name, why)

    async def pause(self, attempt: int) -> None:
        """Wait for the back-off after `attempt` failures."""
        settings = self._runtime.settings
        wait_s = full_jitter(
            attempt, base_s=settings.reconnect_base_s, cap_s=settings.reconnect_cap_s, rng=self._runtime.rng
        )
        await self._runtime.clock.sleep(wait_s)

    async def connected(self, lane: str) -> Link:
        """Return the open link, or wait until one is open; ConfigurationError if waiting won't help."""
        link = self.of(lane)
        if link is not None and link.usable:
            return link
        if self.closed:
            raise ConnectionLost("the broker is closed")
        if self._refused is not None and time.monotonic() - self._refused[0] < self._runtime.settings.reconnect_base_s:
            raise self._refused[1]
        opening = self._opening or self._begin()
        self._waiting += 1
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            if self.closed and opening.cancelled():
                raise ConnectionLost("the broker is closed") from None
            raise
        finally:
            self._waiting -= 1
            if not self._waiting and not self._trying and not self._returning:
                opening.cancel()  # it pauses, and nobody waits for it any more; no effect on a finished task
                self._opening = None  # now, not in its callback: a publish in this very turn must start a new task

    def _begin(self, connection: Connection | None = None) -> asyncio.Task[Link]:
        task = self._opening = asyncio.get_running_loop().create_task(self._open(connection))
        task.add_done_callback(self._opened)
        return task

    def _opened(self, task: asyncio.Task[Link]) -> None:
        if self._opening is task:
            self._opening = None
        if not task.cancelled() and isinstance(error := task.exception(), ConfigurationError):
            self._refused = (time.monotonic(), error)
            self._is("connecting", str(error))

    async def _open(self, connection: Connection | None = None) -> Link:
        """Open a channel on `connection`, or else try to connect until it succeeds; before the first success, until nobody waits.

        An attempt goes on after its publish gave up: otherwise publishes whose timeout is shorter than a handshake would never
        get a connection.
        """
        attempt = self._brief
        if attempt and connection is None:
            await self.pause(attempt)
        while True:
            self._trying = True
            try:
                connection, channel = await self._try(connection)
                break
            except (ConnectionLost, *FAULTS) as error:
                connection = None
                self._is("connecting", reason_of(error))
                if not self._waiting and not self._returning:
                    raise ConnectionLost(self.state.why) from error
            finally:
                self._trying = False
            attempt += 1
            await self.pause(attempt)
        return self._use(connection, channel)

    def _use(self, connection: Connection, channel: Channel) -> Link:
        link = self.current = Link(connection, channel)
        channel.on_closed = partial(self._lost, link)
        channel.window.on_swept = partial(self._swept, link)
        connection.on_blocked = partial(self._blocked, link)
        self._returning = False
        self._take_over(link)
        return link

    def _take_over(self, link: Link) -> None:
        """Let the state be that of `link`."""
        blocked = link.connection.blocked
        self._is("ready" if blocked is None else "blocked", blocked or "")

    def _blocked(self, link: Link) -> None:
        """Take over that the broker blocks publishers, or doesn't any more; say so once for all connections of the process."""
        connection = link.connection
        if link is self.current:
            self._take_over(link)
        if any(other.blocked is not None and other.usable for other in self._nodes.open if other is not connection):
            return
        if connection.blocked is not None:
            logger.warning("RabbitMQ at %s blocks publishers: %s", connection.address, connection.blocked)
        else:
            logger.info("RabbitMQ at %s takes publishes again", connection.address)

    async def _try(self, connection: Connection | None = None) -> tuple[Connection, Channel]:
        timeout_s = self._runtime.settings.connect_timeout_s
        connection = connection or await self._nodes.connect(self._name, timeout_s)
        try:
            channel = await connection.channel(timeout_s)
            await channel.call(commands.Confirm.Select(), timeout_s)
        except BaseException:
            connection.abort()
            raise
        return connection, channel

    def _lost(self, link: Link, why: Closed) -> None:
        self._forget(link)
        self._leaving.discard(link)
        connection = link.connection
        if self.current is not link or self.closed:
            if connection.usable:
                self._end(link)
            return
        self.current = None
        self._returning = True
        self._is("connecting", reason_of(why))
        if connection.usable:  # a publish cost its channel: whatever was declared may be gone, and is declared again
            connection.max_body_bytes = size_limit(why) or connection.max_body_bytes
            logger.warning(
                "RabbitMQ at %s closed the channel of %r, which opens another: %s",
                connection.address,
                self._name,
                self.state.why,
            )
        else:
            self._nodes.leave(connection.address)
            brief = time.monotonic() - link.since < self._runtime.settings.reconnect_base_s
            self._brief = self._brief + 1 if brief else 0
            logger.warning(
                "the connection %r to RabbitMQ at %s is lost: %s", self._name, connection.address, self.state.why
            )
        self._begin(connection if connection.usable else None)

    def _swept(self, link: Link) -> None:
        """Start a new link when a queue holds up the others; close a link that was left and is idle."""
        window = link.window
        if link.connection.blocked is not None:
            window.restart_clock()
        if link is self.current:
            if self._relieving is None and (window.refused or self._held_up_by(link)):
                work = self._renew(link) if window.refused else self._relieve(link)
                self._relieving = asyncio.get_running_loop().create_task(work)
                self._relieving.add_done_callback(self._relieved)
        elif link in self._leaving:
            if window.confirms:
                self._forget(link)
            if window.idle:
                self._end(link)

    def _held_up_by(self, link: Link) -> set[str]:
        """Return the lanes that are stuck on `link`; none unless they hold up other lanes, or soon will."""
        stuck = link.window.stuck()
        lanes = _lanes(stuck)
        if not lanes or len({*self.aside.values()}) >= _MOST_ASIDE:
            return set()
        others = (
            link.window.waiting or link.declaring or len(stuck) >= MOST_STUCK or _lanes(link.window.waited_for) - lanes
        )
        return lanes if others else set()

    async def _relieve(self, link: Link) -> None:
        """Open a new link, and leave `link` to the lanes that are stuck on it; if none can be opened, keep `link`."""
        try:
            connection, channel = await self._try()
        except (ConnectionLost, ConfigurationError, *FAULTS):
            await self.pause(4)
            return
        lanes = self._held_up_by(link) if link is self.current else set[str]()
        if not lanes:
            await connection.close()
            return
        logger.warning(
            "RabbitMQ at %s confirms no publish to %s: these publishes keep the old connection, all others move to a new one",
            connection.address,
            ", ".join(sorted(lanes)),
        )
        self._use(connection, channel)
        self._leaving.add(link)
        self.aside.update(dict.fromkeys(lanes, link))
        link.window.let_go()

    async def _renew(self, link: Link) -> None:
        """Go on in another channel of the connection of `link`.

        RabbitMQ 3.10 goes on refusing in a channel that it told that a queue is full, also once the queue has room again.
        """
        timeout_s = self._runtime.settings.connect_timeout_s
        await self._runtime.clock.sleep(_RENEW_S)
        if not link.usable or link.connection.blocked is not None:
            return
        try:
            channel = await link.connection.channel(timeout_s)
            await channel.call(commands.Confirm.Select(), timeout_s)
        except FAULTS:
            return
        if link is not self.current or not link.usable:
            channel.leave()
            return
        new = self._use(link.connection, channel)
        new.declared, new.ready, new.seen, new.declaring = link.declared, link.ready, link.seen, link.declaring
        self._leaving.add(link)
        link.window.let_go()
        if link.window.idle:
            self._end(link)

    def _relieved(self, task: asyncio.Task[None]) -> None:
        self._relieving = None
        if not task.cancelled() and (bug := task.exception()) is not None:
            logger.critical("a bug in leveret: the second publishing connection or channel wasn't opened", exc_info=bug)

    def _forget(self, link: Link) -> None:
        """Let the lanes that were left to `link` use the current link again."""
        if self.aside:
            self.aside = {lane: aside for lane, aside in self.aside.items() if aside is not link}

    def _end(self, link: Link) -> None:
        self._forget(link)
        self._leaving.discard(link)
        others = [other for other in (self.current, *self._leaving) if other is not None and other is not link]
        if any(other.connection is link.connection for other in others):
            if link.usable:
                link.channel.leave()
            return
        waited_for = not all(publish.given_up for publish in link.window.waited_for)
        close = link.connection.close(CLOSE_TIMEOUT_S if waited_for else _IDLE_CLOSE_S)
        task = asyncio.get_running_loop().create_task(close)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        """Close all connections; publishes that wait for one fail."""
        self.closed = True
        self._is("closed")
        for task in (self._opening, self._relieving):
            if task is not None:
                task.cancel()
        if self.current is not None:
            self._end(self.current)
        for link in [*self._leaving]:
            self._end(link)
        self.current = None
        try:
            if self._ending:
                await asyncio.wait(self._ending)
        finally:  # cancelled, too: a close that is cut off still drops its socket
            for task in self._ending:
                task.cancel()


def _lanes(publishes: Iterable[Unconfirmed]) -> set[str]:
    return {publish.route.lane for publish in publishes if isinstance(publish, Carried)}
