"""The contract of a broker: it moves envelopes, and knows nothing of jobs, handlers or middleware.

Every broker passes one conformance suite (tests/contract). What one doesn't promise it declares in its `Features`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from .envelope import Envelope
from .errors import PublishError
from .job import Queue


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """What a broker promises, for `describe` and for the conformance suite."""

    durable: bool
    """A confirmed job survives the death of every process and of the broker."""
    shared: bool
    """Several processes may use it at once."""
    counts_redelivery: bool
    """`Delivery.redelivered` is True after a worker died with it."""


class Delivery(Protocol):
    """An envelope that the broker waits to hear about. The consumer settles it exactly once."""

    @property
    def queue(self) -> Queue:
        """The queue it came from."""
        ...

    @property
    def envelope(self) -> Envelope:
        """What came; always there, whatever came."""
        ...

    @property
    def redelivered(self) -> bool:
        """Whether the broker says that it delivered this before."""
        ...

    @property
    def problem(self) -> str | None:
        """Why it can't be run, where that shows before decoding: a header of leveret's that is no number."""
        ...

    @property
    def live(self) -> bool:
        """Whether it can still be settled; False once its channel or lease is gone: the broker delivers it again.

        A settlement that is committed after its caller gave up waiting doesn't end it: the next try of it returns as done.
        """
        ...


class Sink(Protocol):
    """Who hears of deliveries: the consumer. Both are called on the loop and must not block."""

    def deliver(self, delivery: Delivery, /) -> None:
        """A delivery arrived. Within one level of one queue they come in the broker's order."""
        ...

    def lost(self) -> None:
        """Some deliveries are no longer `live`; those that haven't started are to be forgotten."""
        ...


class Subscription(msgspec.Struct, frozen=True):
    """A queue to take from."""

    queue: Queue
    prefetch: int
    """Most unsettled deliveries at once, of each level."""


class Consumption(Protocol):
    """A running consumption; the broker connects again by itself, whole, with back-off."""

    @property
    def ready(self) -> bool:
        """Whether every intended consumer is registered now."""
        ...

    async def failed(self) -> None:
        """Wait until it can't go on, and raise why (a `ConfigurationError`); transient faults never end here."""
        ...

    async def stop_taking(self) -> None:
        """Deliver nothing more once this returned; what is held can still be settled."""
        ...

    async def close(self) -> None:
        """Flush what was settled, then end; what wasn't settled goes back to its queue."""
        ...


class Posted(Protocol):
    """A publish on its way; by its deadline it has ended."""

    @property
    def job_id(self) -> str:
        """The job's id."""
        ...

    @property
    def ended(self) -> bool:
        """Whether it is confirmed, or failed."""
        ...

    async def wait(self) -> None:
        """Return once it has ended; for one task at a time."""
        ...

    def error(self) -> PublishError | None:
        """Once it has ended: None, or what `publish` would have raised."""
        ...


class Broker(Protocol):
    """A broker, as one process and one loop use it. Nothing connects before the first use.

    Deadlines are `time.monotonic()` seconds, which is what loops count in. A publish raises a `PublishError` by then, never a bare
    `CancelledError` but the caller's own.
    """

    @property
    def features(self) -> Features:
        """What it promises."""
        ...

    async def publish(self, queue: Queue, envelope: Envelope, *, delay_s: float, deadline: float) -> None:
        """Return once the broker has confirmed it, durable if it is; not deliverable before `delay_s` seconds.

        Safe to call concurrently: a bounded window of unconfirmed ones gives back-pressure. Raises
        `BrokerUnavailable`, `PublishTimeout` (it may be there), `Unroutable` (no queue took it).
        """
        ...

    def post(self, queue: Queue, envelope: Envelope, *, deadline: float) -> Posted | None:
        """Publish without a task, if it can be sent at once; None: use `publish`, nothing was done.

        For many at a time: what a task and its wake-up cost is more than the publish itself.
        """
        ...

    async def consume(self, subscriptions: Sequence[Subscription], sink: Sink) -> Consumption:
        """Start to take. Returns after the first try to connect, which may have failed for now.

        Raises `ConfigurationError` (a refused login, a queue that differs) where waiting wouldn't help.
        """
        ...

    def done(self, delivery: Delivery) -> None:
        """Ack it: batched, flushed once a loop turn. No effect on a delivery that isn't live."""
        ...

    async def again(self, delivery: Delivery, envelope: Envelope, *, delay_s: float, deadline: float) -> None:
        """Publish `envelope` to the delivery's own queue, confirmed, then ack; raises as `publish` does, and then it isn't acked.

        Called again after a `PublishTimeout`, it goes on waiting where it can: while a broker blocks publishers, each copy
        written would run. No effect on a delivery that isn't live: it comes again.
        """
        ...

    async def bury(self, delivery: Delivery, envelope: Envelope, *, deadline: float) -> None:
        """Publish it to the queue's dead letters, body byte for byte, confirmed, then ack; raises as `publish` does, and then it isn't acked.

        Called again after a `PublishTimeout`, it goes on waiting, as `again` does. No effect on a delivery that isn't live.
        """
        ...

    def give_back(self, delivery: Delivery) -> None:
        """Let another worker have it, at once; it wasn't started."""
        ...

    async def close(self) -> None:
        """End every connection, within a deadline of its own. Idempotent."""
        ...
