"""delivery → route: the handler of a job's name with its folded chain, or why a delivery has none in this worker."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ..broker import Delivery
from ..codec import Decoder
from ..envelope import Envelope
from ..failure import failures_of
from ..layer import Consume
from ..outcome import Bury, Undecodable, Unknown
from .handler import Handler


class Route(msgspec.Struct, frozen=True, eq=False):
    """The handler for a job name and its folded chain; made at the start, looked up once per delivery."""

    handler: Handler
    version: int
    """The highest version that the handler's job class knows."""
    decoder: Decoder
    step: Consume
    """The handler with its middleware folded around it."""
    in_thread: bool


def unroutable(delivery: Delivery, routes: Mapping[str, Route]) -> Undecodable | Unknown | Bury | None:
    """Return why a delivery can't start; None if it can, also without a name if there is only one kind of job."""
    envelope = delivery.envelope
    if envelope.bury_since_ms is not None:
        failures = failures_of(envelope)
        return Bury(failures[-1].reason or failures[-1].message if failures else "for a reason that didn't fit")
    if delivery.problem is not None:
        return Undecodable(delivery.problem)
    if not envelope.job:
        if len(routes) == 1:
            return None
        return Undecodable("the message has no job name (AMQP's type), and the queue has several kinds of jobs")
    route = routes.get(envelope.job)
    if route is None:
        advice = "if it should run it, list the handler's module in App(modules=[…])"
        return Unknown(f"this worker has no handler for the job {envelope.job!r:.200} ({advice})")
    if envelope.version <= route.version:
        return None
    return Unknown(
        f"{envelope.job} has version {envelope.version}, this worker's handler knows version {route.version}"
    )


def contracts(envelope: Envelope, route: Route, app: str) -> str:
    """Name the sender's contract and this worker's for a body that doesn't fit, unless one program has both."""
    if envelope.app is None or (envelope.app == app and envelope.version == route.version):
        return ""
    job_class = route.decoder.job_class
    return (
        f"; it was published by the app {envelope.app!r:.80} as version {envelope.version}, and this worker's app "
        f"{app!r} has version {route.version}, {job_class.__module__}.{job_class.__qualname__}"
    )
