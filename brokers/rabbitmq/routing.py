"""The route of a job: to its level, or through the delay ladder until the job is due."""

from __future__ import annotations

from leveret.clock import Clock
from leveret.envelope import ALONE_FROM, Envelope
from leveret.errors import InvalidJob
from leveret.job import Priority, Queue

from . import topology
from .properties import priority_property
from .publishing import Publishing, encoded
from .route import Route


class Routing:
    """The routes of one broker; a route without a delay is made once."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: dict[tuple[str, Priority], Route] = {}

    def level(self, queue: Queue, level: Priority) -> Route:
        """Return the route to a level of `queue`."""
        known = self._known.get((queue.name, level))
        if known is None or (known.queue is not queue and known.queue != queue):
            exchange, key, _ = topology.route(queue, level, 0)
            priority = priority_property(queue, level)
            known = self._known[queue.name, level] = Route(exchange, key, priority, queue, None, kept=True)
        return known

    def dead(self, queue: Queue) -> Route:
        """Return the route to the dead letters of `queue`."""
        return Route(topology.DEAD, queue.name, None, queue, None, ends_at=topology.dead_queue(queue.name))

    def suspects(self, queue: Queue, level: Priority) -> Route:
        """Return the route to the suspects of `queue`; the level travels as AMQP's priority."""
        lane = topology.suspects_queue(queue.name)
        return Route(topology.JOBS, lane, topology.PRIORITY_PROPERTY[level], queue, None, ends_at=lane)

    async def ready(self, queue: Queue, envelope: Envelope, publishing: Publishing) -> Route:
        """Return the route of `envelope`, a suspect's included; for a delay, prepare the ladder on `publishing` first, and use the delay that is left then."""
        route = self._route(queue, envelope)
        if route.ladder is not None and not publishing.ready(route):
            # an envelope that AMQP can't carry is refused at once, with or without a connection
            encoded(route, envelope)
            await publishing.prepare(route, envelope, envelope.deadline)
            route = self._route(queue, envelope)  # connecting and declaring used up part of the delay
        return route

    def _route(self, queue: Queue, envelope: Envelope) -> Route:
        delay_s = 0.0 if envelope.due_ms is None else envelope.due_in_s(self._clock.now())
        if not delay_s:
            return (self.suspects if envelope.crashes >= ALONE_FROM else self.level)(queue, envelope.priority)
        try:
            exchange, key, ladder = topology.route(queue, envelope.priority, delay_s)
        except ValueError as error:
            msg = f"{envelope.job or 'a job'} to queue {queue.name}: {error}"
            raise InvalidJob(msg, job_id=envelope.job_id) from None
        level = envelope.priority
        due_in = topology.physical(queue, level)
        return Route(exchange, key, priority_property(queue, level), queue, ladder, due_in=due_in)
