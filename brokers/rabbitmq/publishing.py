"""The publishing side of RabbitMQ: one connection, made by whoever comes first; topology declared; a window; confirms.

publish ─► connection ─► topology declared ─► window ─► basic.publish ─► confirm, return, refusal, or nobody knows
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from functools import partial
from typing import NoReturn

import msgspec
from pamqp import commands

from leveret.backoff import full_jitter
from leveret.broker import Posted
from leveret.envelope import Envelope
from leveret.errors import (
    BrokerUnavailable,
    ConfigurationError,
    InvalidJob,
    MessageTooLarge,
    PublishError,
    PublishTimeout,
    Unroutable,
)
from leveret.failure import shortened
from leveret.job import Queue
from leveret.runtime import Runtime

from . import connection as amqp
from . import topology
from .address import Address
from .channel import MOST_STUCK, Channel, Closed, Late, Nacked, Returned, Unconfirmed
from .properties import encode
from .session import FAULTS, ConnectionLost, connect, declare, reason_of

logger = logging.getLogger("leveret.rabbitmq")


class Route(msgspec.Struct, frozen=True, eq=False):
    """Where a publish goes, and what must have been declared for it."""

    exchange: str
    key: str
    priority: int | None
    queue: Queue | None
    ladder: str | None
    dead: str | None = None
    """The dead-letter queue it is meant for, for errors."""
    kept: bool = False
    """Whether it is made once and used for every publish to its place."""

    @property
    def lane(self) -> str:
        """What stands for the queue that it comes to first, in which it may be stuck."""
        return self.key if self.ladder is None else self.exchange

    @property
    def target(self) -> str:
        """The queue, for people."""
        return self.dead or (self.queue.name if self.queue is not None else self.key)


def encoded(route: Route, envelope: Envelope, room: int = 131_072) -> bytes:
    """Return the properties of `envelope`; InvalidJob or MessageTooLarge for those that AMQP can't carry, `room` bytes in one frame.

    A first publish gets three eighths of the room: the broker adds headers of its own, and a retry its errors. Those are cut
    short above a half, and go before a job that failed can't be published any more (`_Taker` takes up to three quarters).
    """
    limit = room if envelope.cause is not None or envelope.passes else room * 3 // 8
    try:
        properties = encode(envelope, route.priority)
        if envelope.errors and len(properties) > room // 2:
            properties = encode(shortened(envelope), route.priority)
        if envelope.errors and len(properties) > limit:
            properties = encode(msgspec.structs.replace(envelope, errors=""), route.priority)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidJob(
            _says(route, envelope.job, f"AMQP can't carry its properties: {error}"), job_id=envelope.job_id
        ) from error
    if len(properties) > limit:
        msg = _says(route, envelope.job, f"its headers have {len(properties)} bytes, the limit is {limit}")
        raise MessageTooLarge(msg, job_id=envelope.job_id, size_bytes=len(properties), limit_bytes=limit)
    return properties


class Posting(Unconfirmed, eq=False, kw_only=True):
    """A publish that was written; see `leveret.broker.Posted`. It keeps no body: one that is late is known for as long as its channel."""

    publishing: Publishing
    link: Link
    route: Route
    job: str

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.message_id

    def error(self) -> PublishError | None:
        """What became of it."""
        return None if self.failure is None else self._error(self.failure)

    def late(self) -> PublishError:
        """What its caller is told who has no more time."""
        return self._error(Late("no confirm in time"))

    def _error(self, failure: Exception) -> PublishError:
        error = self.publishing.failure(self, failure)
        error.__cause__ = failure
        return error


_MOST_ASIDE = 4
"""Most connections that are left to queues that confirm nothing: where all stands still, more would help nobody."""


class Link:
    """An open publishing connection, its channel, and what was declared on it."""

    def __init__(self, connection: amqp.Connection, channel: Channel) -> None:
        self.connection = connection
        self.channel = channel
        self.declared: set[Queue | str | None] = {None}
        self.ready: set[Route] = set()
        """Routes that are kept and need nothing declared: a look at these is faster than at `declared`."""
        self.declaring: dict[Queue | str, asyncio.Task[None]] = {}

    @property
    def usable(self) -> bool:
        """Whether it can still be written to."""
        return self.channel.closed is None


class Publishing:
    """Confirmed publishes on one connection, which is made when needed, by whoever comes first, for all who wait."""

    def __init__(self, where: tuple[Address, ...], runtime: Runtime, name: str) -> None:
        self._where = where
        self._runtime = runtime
        self._name = name
        self._link: Link | None = None
        self._aside: dict[str, Link] = {}
        """By lane, links that are left to queues that confirm nothing; all else goes on `_link`."""
        self._leaving: set[Link] = set()
        """Links that aren't `_link` any more, and are closed once nobody waits for what was written to them."""
        self._relieving: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._opening: asyncio.Task[Link] | None = None
        self._waiting = 0
        self._trying = False
        """Whether an attempt to connect is under way, rather than the pause before one."""
        self._reason = f"RabbitMQ at {', '.join(map(str, where))} wasn't reached yet"
        self._refused: tuple[float, ConfigurationError] | None = None
        self._closed = False

    async def send(self, route: Route, envelope: Envelope, deadline: float) -> None:
        """Return once `envelope` is confirmed; raises a `PublishError` by `deadline`."""
        link = await self.linked(route, envelope, deadline)
        await self.write(link, route, envelope, deadline)

    def post(self, route: Route, envelope: Envelope, deadline: float) -> Posted | None:
        """Write `envelope` now if nothing but its confirm is to be waited for."""
        link = self.ready(route)
        return None if link is None else self.write(link, route, envelope, deadline)

    async def linked(self, route: Route, envelope: Envelope, deadline: float) -> Link:
        """Return a link on which `envelope` can be written now, or raise a `PublishError` by `deadline`: nothing was sent."""
        link = self.ready(route)
        if link is None:
            encoded(route, envelope)  # what AMQP can't carry is refused at once, broker or not
            link = await self.prepare(route, envelope, deadline)
        return link

    def _link_of(self, route: Route) -> Link | None:
        return self._aside.get(route.lane, self._link)

    def write(self, link: Link, route: Route, envelope: Envelope, deadline: float = float("inf")) -> Posting:
        """Write `envelope`; without a confirm it ends at `deadline`."""
        properties = encoded(route, envelope, link.connection.max_properties_bytes)
        posted = Posting(
            envelope.job_id, route.key, deadline, publishing=self, link=link, route=route, job=envelope.job
        )
        link.channel.publish(route.exchange, properties, envelope.body, posted)
        return posted

    def ready(self, route: Route) -> Link | None:
        """Return the link, nearly always, where all that `route` needs is there; None where a publish must wait first."""
        link = self._link_of(route) if self._aside else self._link
        if link is None or link.channel.closed is not None or link.channel.full:
            return None
        if route not in link.ready:
            if route.queue not in link.declared or route.ladder not in link.declared:
                return None
            if route.kept:
                link.ready.add(route)
        return link

    def failure(self, posted: Posting, error: BaseException) -> PublishError:
        """Return what a failed publish means to its caller."""
        link, route, job_id = posted.link, posted.route, posted.job_id
        match error:
            case Returned():
                link.declared -= {route.queue, route.ladder}  # it was deleted: the next publish declares it again
                link.declared.add(None)
                link.ready.clear()
                msg = _says(
                    route, posted.job, f"no queue takes it: exchange {route.exchange} has no binding for {route.key}"
                )
                return Unroutable(msg, job_id=job_id, queue=route.target)
            case Nacked():
                return BrokerUnavailable(_says(route, posted.job, str(error)), job_id=job_id)
            case Late():
                msg = f"no confirm in time{_blocked(link)}. It may be there; publish again under the same id"
            case _:
                msg = f"the connection was lost before its confirm: {reason_of(error)}. It may be there; publish again under the same id"
        return PublishTimeout(_says(route, posted.job, msg), job_id=job_id, maybe_published=True)

    async def prepare(self, route: Route, envelope: Envelope, deadline: float) -> Link:
        """Return a link on which `route` is declared and there is room, or raise a `PublishError` by `deadline`: nothing was sent."""
        declared, failed = False, ""
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    declared = False
                    try:
                        link = await self._connected(route)
                        for what in (route.queue, route.ladder):
                            if what is not None:
                                await self._declared(link, what)
                        declared = True
                        await link.channel.room(len(envelope.body))
                    except ConfigurationError as error:
                        raise BrokerUnavailable(
                            _says(route, envelope.job, str(error)), job_id=envelope.job_id
                        ) from error
                    except ConnectionLost as error:
                        failed = str(error)
                        if self._closed:
                            raise BrokerUnavailable(
                                _says(route, envelope.job, failed), job_id=envelope.job_id
                            ) from error
                        await self._pause(1)
                    else:
                        # it may have been left meanwhile, and all that waited for room were woken
                        if link.usable and link is self._link_of(route) and not link.channel.full:
                            return link
        except TimeoutError:
            self._nothing_sent(
                route, envelope, None if declared else failed or "RabbitMQ hasn't answered the declares of its queue"
            )

    def _nothing_sent(self, route: Route, envelope: Envelope, undeclared: str | None) -> NoReturn:
        link = self._link_of(route)
        if link is None or not link.usable:
            raise BrokerUnavailable(
                _says(route, envelope.job, f"no broker in time: {self._reason}"), job_id=envelope.job_id
            )
        msg = _says(
            route, envelope.job, f"nothing was sent in time: {undeclared or link.channel.why_full}{_blocked(link)}"
        )
        raise PublishTimeout(msg, job_id=envelope.job_id, maybe_published=False)

    async def _pause(self, attempt: int) -> None:
        settings = self._runtime.settings
        wait_s = full_jitter(
            attempt, base_s=settings.reconnect_base_s, cap_s=settings.reconnect_cap_s, rng=self._runtime.rng
        )
        await self._runtime.clock.sleep(wait_s)

    async def _connected(self, route: Route) -> Link:
        """Return the open link, or wait until there is one; ConfigurationError where waiting won't help."""
        link = self._link_of(route)
        if link is not None and link.usable:
            return link
        if self._closed:
            raise ConnectionLost("the broker is closed")
        if self._refused is not None and time.monotonic() - self._refused[0] < self._runtime.settings.reconnect_base_s:
            raise self._refused[1]
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
            self._opening.add_done_callback(self._opened)
        opening = self._opening
        self._waiting += 1
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            if self._closed and opening.cancelled():
                raise ConnectionLost("the broker is closed") from None
            raise
        finally:
            self._waiting -= 1
            if not self._waiting and not self._trying:
                opening.cancel()  # it pauses, for nobody now; no effect where it is done
                self._opening = None  # now, not at its end: who comes in this very turn makes a new one

    def _opened(self, task: asyncio.Task[Link]) -> None:
        if self._opening is task:
            self._opening = None
        if not task.cancelled() and isinstance(error := task.exception(), ConfigurationError):
            self._refused = (time.monotonic(), error)

    async def _open(self) -> Link:
        """Connect, again and again while somebody waits.

        What has begun goes on when its publish gives up, or publishes with less time than a handshake takes would never get a connection.
        """
        attempt = 0
        while True:
            self._trying = True
            try:
                connection, channel = await self._try()
                break
            except (ConnectionLost, *FAULTS) as error:
                self._reason = reason_of(error)
                if not self._waiting:
                    raise ConnectionLost(self._reason) from error
            finally:
                self._trying = False
            attempt += 1
            await self._pause(attempt)
        return self._use(connection, channel)

    def _use(self, connection: amqp.Connection, channel: Channel) -> Link:
        link = self._link = Link(connection, channel)
        channel.on_closed = partial(self._lost, link)
        channel.on_swept = partial(self._swept, link)
        return link

    async def _try(self) -> tuple[amqp.Connection, Channel]:
        timeout_s = self._runtime.settings.connect_timeout_s
        connection = await connect(self._where, self._name, timeout_s)
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
        if self._link is link:
            self._link = None
            self._reason = reason_of(why)
            if not self._closed:
                logger.warning(
                    "the connection %r to RabbitMQ at %s is lost: %s", self._name, link.connection.address, self._reason
                )
        if link.connection.usable:  # the channel is all that closed
            self._end(link)

    def _swept(self, link: Link) -> None:
        """See that no queue holds up the others; close a link that was left once it has nothing to wait for."""
        channel = link.channel
        if link.connection.blocked is not None:
            channel.start_anew()
        if link is self._link:
            if self._relieving is None and self._held_up_by(link):
                self._relieving = asyncio.get_running_loop().create_task(self._relieve(link))
                self._relieving.add_done_callback(self._relieved)
        elif link in self._leaving:
            if channel.confirms:
                self._forget(link)
            if channel.idle:
                self._end(link)

    def _held_up_by(self, link: Link) -> set[str]:
        """Return the lanes that are stuck on `link`, where others are held up by them, or will be soon."""
        stuck = link.channel.stuck()
        lanes = _lanes(stuck)
        if not lanes or len({*self._aside.values()}) >= _MOST_ASIDE:
            return set()
        others = (
            link.channel.waiting
            or link.declaring
            or len(stuck) >= MOST_STUCK
            or _lanes(link.channel.waited_for) - lanes
        )
        return lanes if others else set()

    async def _relieve(self, link: Link) -> None:
        """Open another link, and leave `link` to what is stuck on it then; without another it stays as it is."""
        try:
            connection, channel = await self._try()
        except (ConnectionLost, ConfigurationError, *FAULTS):
            await self._pause(4)
            return
        lanes = self._held_up_by(link) if link is self._link else set[str]()
        if not lanes:
            await connection.close()
            return
        logger.warning(
            "RabbitMQ at %s confirms no publish to %s: they keep this connection, all others go on on a new one",
            connection.address,
            ", ".join(sorted(lanes)),
        )
        self._use(connection, channel)
        self._leaving.add(link)
        self._aside.update(dict.fromkeys(lanes, link))
        link.channel.let_go()

    def _relieved(self, task: asyncio.Task[None]) -> None:
        self._relieving = None
        if not task.cancelled() and (bug := task.exception()) is not None:
            logger.critical("a bug of leveret's: no other connection was made", exc_info=bug)

    def _forget(self, link: Link) -> None:
        """Let what was left to `link` go where all goes."""
        if self._aside:
            self._aside = {lane: aside for lane, aside in self._aside.items() if aside is not link}

    def _end(self, link: Link) -> None:
        self._forget(link)
        self._leaving.discard(link)
        task = asyncio.get_running_loop().create_task(link.connection.close())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _declared(self, link: Link, what: Queue | str) -> None:
        """Declare `what` (a queue's topology, or a ladder by its kind) once a link; many may wait for it."""
        if what in link.declared:
            return
        task = link.declaring.get(what)
        if task is None:
            task = link.declaring[what] = asyncio.create_task(self._declare(link, what))
            task.add_done_callback(
                lambda ended: (link.declaring.pop(what, None), ended.cancelled() or ended.exception())
            )
        await asyncio.shield(task)

    async def _declare(self, link: Link, what: Queue | str) -> None:
        if isinstance(what, Queue):
            name, records = what.name, topology.SHARED + topology.of_queue(what)
        else:
            name, records = "lv.delay.*", topology.of_ladder(what)
        await declare(link.connection, records, name, self._runtime.settings.connect_timeout_s)
        link.declared.add(what)

    async def close(self) -> None:
        """Close the connection; publishes that wait for it fail."""
        self._closed = True
        for task in (self._opening, self._relieving):
            if task is not None:
                task.cancel()
        if self._link is not None:
            self._end(self._link)
        for link in [*self._leaving]:
            self._end(link)
        self._link = None
        try:
            if self._ending:
                await asyncio.wait(self._ending)
        finally:  # cancelled, too: a close that is cut off drops its socket
            for task in self._ending:
                task.cancel()


def _blocked(link: Link) -> str:
    blocked = link.connection.blocked
    return "" if blocked is None else f"; the broker blocks publishers (connection.blocked: {blocked})"


def _lanes(publishes: Iterable[Unconfirmed]) -> set[str]:
    return {publish.route.lane for publish in publishes if isinstance(publish, Posting)}


def _says(route: Route, job: str, text: str) -> str:
    return f"{job or 'a job'} to queue {route.target}: {text}"
