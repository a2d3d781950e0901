"""Retries and burials: the replacement of a delivery is published and confirmed, then the delivery is acked."""

from __future__ import annotations

import asyncio
from typing import Protocol

import msgspec

from leveret.envelope import Envelope
from leveret.job import Queue

from . import topology
from .publishing import Posting, Publishing
from .route import Route
from .routing import Routing


class Replaceable(Protocol):
    """A delivery, as `Settling` sees it: a published replacement may take its place."""

    instead: Posting | None
    """The replacement that was published and isn't confirmed yet."""

    @property
    def queue(self) -> Queue:
        """The queue that delivered the job."""
        ...

    @property
    def live(self) -> bool:
        """Whether the channel of the delivery is open."""
        ...

    def done(self) -> None:
        """Ack the delivery."""
        ...


class Settling:
    """Retries and burials, each on a separate connection: neither waits for a queue that confirms nothing to the others."""

    def __init__(self, retrying: Publishing, burying: Publishing, routes: Routing) -> None:
        self._retrying = retrying
        self._burying = burying
        self._routes = routes

    async def again(self, delivery: Replaceable, envelope: Envelope) -> bool:
        """Publish `envelope` to the delivery's queue, confirmed, then ack.

        A burial on its way isn't waited for any more: its letter may be there twice in the end, but no copy runs.
        """
        if delivery.live:
            if delivery.instead is None or delivery.instead.route.exchange == topology.DEAD:
                route = await self._routes.ready(delivery.queue, envelope, self._retrying)
                await _write(delivery, self._retrying, route, envelope)
            return await self._confirmed(delivery, envelope.deadline)
        return False

    async def bury(self, delivery: Replaceable, envelope: Envelope) -> bool:
        """Publish `envelope` to the queue's dead letters, confirmed, then ack."""
        if delivery.live:
            if delivery.instead is None:
                queue = delivery.queue
                buried = envelope if envelope.origin else msgspec.structs.replace(envelope, origin=queue.name)
                await _write(delivery, self._burying, self._routes.dead(queue), buried)
            return await self._confirmed(delivery, envelope.deadline)
        return False

    async def anew(self, queue: Queue, envelope: Envelope) -> bool:
        """Publish `envelope` to `queue`, confirmed: a message that no worker has seen. Return False, at once, if the broker blocks publishers."""
        if self._retrying.state.name == "blocked":
            return False
        route = await self._routes.ready(queue, envelope, self._retrying)
        await self._retrying.send(route, envelope, envelope.deadline)
        return True

    async def _confirmed(self, delivery: Replaceable, deadline: float) -> bool:
        """Ack the delivery once its replacement is confirmed; return False if none was written.

        If no confirm comes in time (the broker blocks publishers), the next call waits for the same publish: a second copy
        would run too.
        """
        publish = delivery.instead
        if publish is None:
            return False
        try:
            async with asyncio.timeout_at(deadline):
                await publish.wait()
        except TimeoutError:
            raise publish.late() from None
        delivery.instead = None
        await publish
        delivery.done()
        return True

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(self._retrying.close(), self._burying.close())


async def _write(delivery: Replaceable, publishing: Publishing, route: Route, envelope: Envelope) -> None:
    """Write the replacement if the delivery is still live: during the wait for a link, the broker may have taken the delivery back."""
    link = await publishing.linked(route, envelope, envelope.deadline)
    if delivery.live:
        delivery.instead = publishing.write(link, route, envelope)
