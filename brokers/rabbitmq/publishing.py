"""The publishing side of RabbitMQ: the first publish connects; each queue's topology is declared before its first publish.

publish ─► connection ─► topology declared ─► window ─► basic.publish ─► confirm, return, nack, or an unknown outcome
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections.abc import Callable, Coroutine
from functools import partial
from math import inf
from typing import Any, NoReturn

import msgspec

from leveret.broker import Posted, PublisherState
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

from . import topology
from .confirms import Late, Nacked, Refused, Returned, Unread
from .links import Carried, Link, Links
from .nodes import Nodes
from .properties import encode
from .route import Route
from .session import FAULTS, ConnectionLost, declare, missing, reason_of, size_limit
from .topology import Ladder
from .wire import Closed

logger = logging.getLogger("leveret.rabbitmq")

SEEN_S = 5.0
"""How long the way of a delayed job, once it was found to exist, is taken to exist."""


class _Gone(Exception):
    """The queue of a delayed job was deleted."""


def encoded(route: Route, envelope: Envelope, room: int = 131_072) -> bytes:
    """Return the properties of `envelope`, which must fit into a frame with `room` bytes; otherwise raise InvalidJob or MessageTooLarge.

    A first publish may use three eighths of the room, since the broker adds headers and each retry adds its error. Errors are
    shortened above a half, and dropped before a failed job can't be published any more (`Taker` accepts up to three quarters).
    """
    limit = room if envelope.cause is not None or envelope.passes else room * 3 // 8
    try:
        properties = encode(envelope, route.priority)
        if envelope.errors and len(properties) > room // 2:
            properties = encode(shortened(envelope), route.priority)
        if envelope.errors and len(properties) > limit:
            properties = encode(msgspec.structs.replace(envelope, errors=""), route.priority)
    except (TypeError, ValueError, OverflowError, RecursionError, struct.error) as error:
        raise InvalidJob(
            _says(route, envelope.job, f"AMQP can't carry its properties: {error}"), job_id=envelope.job_id
        ) from error
    if len(properties) > limit:
        msg = _says(route, envelope.job, f"its headers have {len(properties)} bytes; the limit is {limit}")
        raise MessageTooLarge(msg, job_id=envelope.job_id, size_bytes=len(properties), limit_bytes=limit)
    return properties


class Posting(Carried, eq=False, kw_only=True):
    """A written publish; see `leveret.broker.Posted`. It doesn't keep the body: a late publish may be kept as long as its channel."""

    job: str
    size: int
    """The bytes of its body."""

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.message_id

    def error(self) -> PublishError | None:
        """Return the error of the ended publish; None if confirmed."""
        return None if self.failure is None else self._error(self.failure)

    def late(self) -> PublishError:
        """Return the error for a caller whose deadline passed."""
        return self._error(Late("no confirm in time"))

    def blamed(self, why: Closed) -> bool:
        """Return whether the broker may have closed the channel at this publish: its texts name the exchange, or the largest size."""
        match why.code:
            case 403 | 404:
                return f"exchange '{self.route.exchange}'" in why.text
            case _:
                limit = size_limit(why)
                return limit is not None and self.size > limit

    def _error(self, failure: Exception) -> PublishError:
        error = _failure(self, failure)
        error.__cause__ = failure
        return error


class Publishing:
    """Confirmed publishes. The first publish opens the connection, and concurrent publishes wait for the same attempt."""

    def __init__(self, nodes: Nodes, runtime: Runtime, name: str) -> None:
        self._links = Links(nodes, runtime, name)
        self._runtime = runtime

    @property
    def state(self) -> PublisherState:
        """As `Broker.publishing`."""
        return self._links.state

    async def send(self, route: Route, envelope: Envelope, deadline: float) -> None:
        """Return once `envelope` is confirmed; raise a `PublishError` by `deadline` otherwise."""
        link = await self.linked(route, envelope, deadline)
        await self.write(link, route, envelope, deadline)

    def post(self, route: Route, envelope: Envelope, deadline: float) -> Posted | None:
        """Write `envelope` now; return None if the publish would have to wait first."""
        link = self.ready(route)
        return None if link is None else self.write(link, route, envelope, deadline)

    async def linked(self, route: Route, envelope: Envelope, deadline: float) -> Link:
        """Return a link on which `envelope` can be written now, or raise a `PublishError` by `deadline`, with nothing sent."""
        link = self.ready(route)
        if link is None:
            # an envelope that AMQP can't carry is refused at once, with or without a connection
            encoded(route, envelope)
            link = await self.prepare(route, envelope, deadline)
        return link

    def write(self, link: Link, route: Route, envelope: Envelope, deadline: float = float("inf")) -> Posting:
        """Write `envelope`; without a confirm the publish ends at `deadline`."""
        connection, body = link.connection, envelope.body
        properties = encoded(route, envelope, connection.max_properties_bytes)
        posted = Posting(envelope.job_id, route.key, deadline, link=link, route=route, job=envelope.job, size=len(body))
        if posted.size > connection.max_body_bytes:
            raise _too_large(posted, connection.max_body_bytes)
        link.window.publish(route.exchange, properties, body, posted)
        return posted

    def ready(self, route: Route) -> Link | None:
        """Return the link if `route` is declared and the window has room; None if a publish must wait first."""
        links = self._links
        link = links.of(route.lane) if links.aside else links.current
        if link is None or link.window.closed is not None or link.window.full:
            return None
        if route not in link.ready:
            if route.queue not in link.declared or route.ladder not in link.declared:
                return None
            if route.kept:
                link.ready.add(route)
            elif _unseen(link, route):
                return None
        return link

    async def prepare(self, route: Route, envelope: Envelope, deadline: float) -> Link:
        """Return a link with room on which `route` is declared, or raise a `PublishError` by `deadline`, with nothing sent."""
        declared, failed = False, ""
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    declared = False
                    try:
                        link = await self._links.connected(route.lane)
                        for what in (route.queue, route.ladder):
                            if what is not None and what not in link.declared:
                                await self._once(link, what, partial(self._declare, link, what))
                        if route.ladder is not None and route.due_in is not None and _unseen(link, route):
                            look = partial(self._look, link, route.ladder, route.due_in)
                            await self._once(link, (route.ladder, route.due_in), look)
                            if route.ladder not in link.declared:
                                continue
                        declared = True
                        await link.window.room(len(envelope.body))
                    except _Gone as error:
                        msg = f"{error} was deleted; the next publish declares it again"
                        raise Unroutable(
                            _says(route, envelope.job, msg), job_id=envelope.job_id, queue=route.target
                        ) from None
                    except ConfigurationError as error:
                        raise BrokerUnavailable(
                            _says(route, envelope.job, str(error)), job_id=envelope.job_id
                        ) from error
                    except ConnectionLost as error:
                        failed = str(error)
                        if self._links.closed:
                            raise BrokerUnavailable(
                                _says(route, envelope.job, failed), job_id=envelope.job_id
                            ) from error
                        await self._links.pause(1)
                    else:
                        # if the link was left meanwhile, every waiter was woken without room
                        if link.usable and link is self._links.of(route.lane) and not link.window.full:
                            return link
        except TimeoutError:
            self._nothing_sent(
                route, envelope, None if declared else failed or "RabbitMQ hasn't answered the declaration of the queue"
            )

    def _nothing_sent(self, route: Route, envelope: Envelope, undeclared: str | None) -> NoReturn:
        """Raise what a publish at its deadline raises: `from None`, since the text says more than asyncio's TimeoutError."""
        link = self._links.of(route.lane)
        if link is None or not link.usable:
            raise BrokerUnavailable(
                _says(route, envelope.job, f"no connection in time: {self._links.state.why}"), job_id=envelope.job_id
            ) from None
        msg = _says(
            route, envelope.job, f"nothing was sent in time: {undeclared or link.window.why_full}{_blocked(link)}"
        )
        raise PublishTimeout(msg, job_id=envelope.job_id, maybe_published=False) from None

    async def _once(self, link: Link, what: object, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do `work` about `what` in one task per link; many publishes may wait for it."""
        task = link.declaring.get(what)
        if task is None:
            task = link.declaring[what] = asyncio.create_task(work())
            task.add_done_callback(
                lambda ended: (link.declaring.pop(what, None), ended.cancelled() or ended.exception())
            )
        await asyncio.shield(task)

    async def _look(self, link: Link, ladder: Ladder, queue: str) -> None:
        """Find out whether the way of a delayed job exists: the broker confirms the job at the first hop.

        Raises `_Gone` if the queue at its end was deleted. An exchange that was deleted is declared again.
        """
        try:
            gone = await missing(link.connection, topology.way(ladder), queue, self._runtime.settings.connect_timeout_s)
        except FAULTS as error:
            raise ConnectionLost(f"the delay ladder could not be looked at: {reason_of(error)}") from error
        if gone is None:
            link.seen[ladder, queue] = time.monotonic()
            return
        link.forget()
        if gone == queue:
            raise _Gone(f"queue {gone}")
        logger.warning("exchange %s was deleted; declaring it again", gone)

    async def _declare(self, link: Link, what: Queue | Ladder) -> None:
        """Declare `what`: a queue's topology, or a ladder."""
        if isinstance(what, Queue):
            name, records = what.name, topology.SHARED + topology.of_queue(what)
        else:
            name, records = "lv.delay.*", topology.of_ladder(what)
        await declare(link.connection, records, name, self._runtime.settings.connect_timeout_s)
        link.declared.update([what] if isinstance(what, Queue) else what.lower())

    async def close(self) -> None:
        """Close the connections; publishes that wait for a connection fail."""
        await self._links.close()


def _unseen(link: Link, route: Route) -> bool:
    """Return whether a delayed job's way must be looked at first."""
    return route.due_in is not None and time.monotonic() - link.seen.get((route.ladder, route.due_in), -inf) > SEEN_S


def _failure(posted: Posting, error: Exception) -> PublishError:
    """Return the error that a failed publish raises to its caller."""
    link, route, job_id = posted.link, posted.route, posted.job_id
    match error:
        case Returned():
            link.forget()
            msg = f"no queue took it: exchange {route.exchange} has no binding for key {route.key}"
            return Unroutable(_says(route, posted.job, msg), job_id=job_id, queue=route.target)
        case Refused() if (limit := size_limit(error.why)) is not None:
            return _too_large(posted, limit)
        case Refused() if error.why.code == 404:
            msg = f"exchange {route.exchange} was deleted; the next publish declares it again ({error})"
            return Unroutable(_says(route, posted.job, msg), job_id=job_id, queue=route.target)
        case Refused():
            msg = f"RabbitMQ refuses the publish; give the user the permission to write: {error}"
            return BrokerUnavailable(_says(route, posted.job, msg), job_id=job_id)
        case Nacked():
            return BrokerUnavailable(_says(route, posted.job, str(error)), job_id=job_id)
        case Unread():
            msg = f"RabbitMQ didn't read it, because of an earlier publish: {error}"
            return PublishTimeout(_says(route, posted.job, msg), job_id=job_id, maybe_published=False)
        case Late():
            msg = f"no confirm in time{_blocked(link)}"
        case Closed(scope="channel"):
            msg = f"its channel was closed before its confirm, because of another publish: {reason_of(error)}"
        case _:
            msg = f"the connection was lost before its confirm: {reason_of(error)}"
    msg = f"{msg}; the job may be in the queue, so publish it again under the same id"
    return PublishTimeout(_says(route, posted.job, msg), job_id=job_id, maybe_published=True)


def _too_large(posted: Posting, limit: int) -> MessageTooLarge:
    msg = f"the body has {posted.size} bytes, and RabbitMQ takes {limit} (max_message_size); store the data elsewhere and send a reference"
    says = _says(posted.route, posted.job, msg)
    return MessageTooLarge(says, job_id=posted.job_id, size_bytes=posted.size, limit_bytes=limit)


def _blocked(link: Link) -> str:
    blocked = link.connection.blocked
    return "" if blocked is None else f"; the broker blocks publishers (connection.blocked: {blocked})"


def _says(route: Route, job: str, text: str) -> str:
    return f"{job or 'a job'} to queue {route.target}: {text}"
