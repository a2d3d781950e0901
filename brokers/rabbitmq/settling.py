"""A retry or a burial: what takes a delivery's place is published and confirmed, then the delivery is acked."""

from __future__ import annotations

import asyncio
from typing import Protocol

import msgspec

from leveret.envelope import Envelope
from leveret.job import Queue

from .publishing import Posting, Publishing
from .route import Route
from .routing import Routing


class Replaceable(Protocol):
    """A delivery that something else may take the place of."""

    instead: Posting | None
    """What was published to take its place, and isn't confirmed yet."""

    @property
    def queue(self) -> Queue:
        """The queue that delivered it."""
        ...

    @property
    def live(self) -> bool:
        """Whether its channel is open."""
        ...

    def done(self) -> None:
        """Ack it."""
        ...


class Settling:
    """Retries and burials. They have a connection to themselves, so that no publish to a queue that confirms nothing holds them up."""

    def __init__(self, publishing: Publishing, routes: Routing) -> None:
        self._publishing = publishing
        self._routes = routes

    async def again(self, delivery: Replaceable, envelope: Envelope) -> None:
        """Publish `envelope` to the delivery's queue, confirmed, then ack."""
        if delivery.live:
            if delivery.instead is None:
                route = await self._routes.ready(delivery.queue, envelope, self._publishing)
                await self._write(delivery, route, envelope)
            await self._confirmed(delivery, envelope.deadline)

    async def bury(self, delivery: Replaceable, envelope: Envelope) -> None:
        """Publish `envelope` to the queue's dead letters, confirmed, then ack."""
        if delivery.live:
            if delivery.instead is None:
                queue = delivery.queue
                buried = envelope if envelope.origin else msgspec.structs.replace(envelope, origin=queue.name)
                await self._write(delivery, self._routes.dead(queue), buried)
            await self._confirmed(delivery, envelope.deadline)

    async def _write(self, delivery: Replaceable, route: Route, envelope: Envelope) -> None:
        """Write what takes the delivery's place, if the delivery is still ours: while a link was waited for, the broker may have it back."""
        link = await self._publishing.linked(route, envelope, envelope.deadline)
        if delivery.live:
            delivery.instead = self._publishing.write(link, route, envelope)

    async def _confirmed(self, delivery: Replaceable, deadline: float) -> None:
        """Ack the delivery once what takes its place is confirmed.

        Where no confirm comes in time (a broker that blocks publishers), the next call waits for the same publish: each
        copy that is written runs.
        """
        publish = delivery.instead
        if publish is None:
            return
        try:
            async with asyncio.timeout_at(deadline):
                await publish.wait()
        except TimeoutError:
            raise publish.late() from None
        delivery.instead = None
        await publish
        delivery.done()

    async def close(self) -> None:
        """End the connection."""
        await self._publishing.close()
