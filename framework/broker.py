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
from .outcome import MAX_DELAY_S


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """What a broker promises of a queue: what differs between brokers, and between the queue types of one. The core and the suite read it."""

    durable: bool
    """A confirmed job survives the death of every process and of the broker."""
    shared: bool
    """Several processes may use the broker at once."""
    counts_redelivery: bool
    """`Delivery.redelivered` is True after a worker died with the job."""
    connected: bool
    """A connection to the broker can be lost, and then what was delivered on it is no longer `live`."""
    queue_type: str | None
    """The type that the queue has here; None where the broker ignores `Queue(type=…)`."""
    window_per_level: bool
    """Each level has a prefetch window, so that held jobs of one level keep no other level's job from being delivered."""
    deletable: bool
    """Somebody may delete the queue; a publish to it is then `Unroutable`. Otherwise every queue exists."""
    max_delay_s: float = MAX_DELAY_S
    """The longest delay of a publish or a retry, seconds."""
    bounds_headers: bool = False
    """Headers that take too much room can't be published (`MessageTooLarge`)."""
    held_at_most_s: float | None = None
    """The broker takes back a delivery that is unsettled for longer, seconds; None: it doesn't."""
    physical: tuple[str, ...] = ()
    """The broker's names of the queues that hold the jobs of this one; none: the broker has no such notion."""


class Delivery(Protocol):
    """An envelope that the broker waits to hear about. The consumer settles it exactly once, by one of its four verbs.

    No verb has an effect on a delivery that isn't `live`: the broker delivers the job again.
    """

    @property
    def queue(self) -> Queue:
        """The queue that delivered the job."""
        ...

    @property
    def envelope(self) -> Envelope:
        """What came; always there, whatever came."""
        ...

    @property
    def redelivered(self) -> bool:
        """Whether the broker says that it delivered the job before."""
        ...

    @property
    def problem(self) -> str | None:
        """Why the job can't run, where that shows before decoding: a leveret header that isn't a number, for example."""
        ...

    @property
    def live(self) -> bool:
        """Whether the delivery can still be settled; False once its channel or lease is gone: the broker delivers the job again.

        A settlement that is committed after its caller gave up waiting doesn't end it: the next try of it returns as done.
        """
        ...

    def done(self) -> None:
        """Ack the job: batched, flushed once per loop turn."""
        ...

    async def again(self, envelope: Envelope, /) -> None:
        """Publish `envelope` to the delivery's queue, due at its `due_ms`, confirmed by its `deadline`, then ack.

        Raises as `Broker.publish` does, and then nothing is acked. Called again after a `PublishTimeout`, it goes on waiting
        for the first publish where it can: while a broker blocks publishers, each copy that is written would run.
        """
        ...

    async def bury(self, envelope: Envelope, /) -> None:
        """Publish `envelope` to the queue's dead letters, body byte for byte, confirmed by its `deadline`, then ack.

        Raises as `Broker.publish` does, and then nothing is acked. Called again after a `PublishTimeout`, it goes on waiting,
        as `again` does.
        """
        ...

    def give_back(self) -> None:
        """Let another worker have the job, at once; it wasn't started."""
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

    def features(self, queue: Queue | None = None, /) -> Features:
        """Return what the broker promises of `queue`; None: of a queue with all defaults."""
        ...

    async def publish(self, queue: Queue, envelope: Envelope) -> None:
        """Return once the broker has confirmed the job, durable if the broker is; not deliverable before `due_ms`.

        Safe to call concurrently: a bounded window of unconfirmed publishes gives back-pressure. Raises, by the envelope's
        `deadline`, `BrokerUnavailable`, `PublishTimeout` (the job may be there) or `Unroutable` (no queue took it).
        """
        ...

    def post(self, queue: Queue, envelope: Envelope) -> Posted | None:
        """Publish a job that isn't delayed without a task, if it can be sent at once; None: use `publish`, nothing was done.

        For many at a time: a task and its wake-up cost more than the publish itself.
        """
        ...

    async def consume(self, subscriptions: Sequence[Subscription], sink: Sink) -> Consumption:
        """Start to take. Returns after the first try to connect, which may have failed for now.

        Raises `ConfigurationError` (a refused login, a queue that differs) where waiting wouldn't help.
        """
        ...

    async def close(self) -> None:
        """End every connection, within a deadline of its own. Idempotent."""
        ...
