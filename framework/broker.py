"""The contract of a broker: a broker moves envelopes, and knows nothing of jobs, handlers or middleware.

Every broker passes the same conformance suite (tests/contract). Its `Features` declare what it doesn't promise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, TypeGuard

import msgspec

from .envelope import Envelope
from .errors import PublishError
from .job import Queue
from .outcome import MAX_DELAY_S

if TYPE_CHECKING:
    from .store import Change, Progress, Store


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """What a broker promises for a queue, where brokers or queue types differ. The core and the conformance suite read it."""

    durable: bool
    """A confirmed job survives the death of every process and of the broker."""
    durability: str = ""
    """How durable a confirmed job is, as a phrase, if the broker's URL or its server decides on that; otherwise empty."""
    shared: bool
    """Several processes may use the broker at once."""
    counts_redelivery: bool
    """`Delivery.redelivered` is True after a worker died with the job."""
    counts_crashes: bool = False
    """The broker raises `Envelope.crashes` of a job that had begun when its worker died, and of no other. If False, the worker does."""
    connected: bool
    """A connection to the broker can be lost; its deliveries are then no longer `live`."""
    queue_type: str | None
    """The type of the queue on this broker; None if the broker ignores `Queue(type=…)`."""
    keeps_order: bool
    """Jobs of one level are delivered in the order in which they were published; so are the jobs that a closed consumption held."""
    keeps_place: bool
    """A job that is given back keeps its place in its level. If False, it comes back ahead of the jobs that were never delivered."""
    window_per_level: bool
    """Each priority level has a prefetch window, so that held jobs of one level don't block the deliveries of another."""
    deletable: bool
    """The queue can be deleted; a publish to it then raises `Unroutable`. If False, every queue exists."""
    max_delay_s: float = MAX_DELAY_S
    """The longest delay of a publish or a retry, in seconds."""
    bounds_headers: bool = False
    """The broker limits the size of headers; larger headers raise `MessageTooLarge`."""
    held_at_most_s: float | None = None
    """The seconds after which the broker takes back an unsettled delivery; None: never."""
    physical: tuple[str, ...] = ()
    """The names, on the broker, of the queues that hold this queue's jobs; empty if the broker has no such queues."""


class Delivery(Protocol):
    """A delivered envelope. The consumer settles it exactly once, by `done`, `again`, `bury` or `give_back`.

    None of the four has an effect on a delivery that isn't `live`: the broker delivers the job again.
    """

    @property
    def queue(self) -> Queue:
        """The queue that delivered the job."""
        ...

    @property
    def envelope(self) -> Envelope:
        """The envelope; present even if the message can't be decoded."""
        ...

    @property
    def redelivered(self) -> bool:
        """Whether the broker marked the delivery as redelivered."""
        ...

    @property
    def counted(self) -> bool:
        """Whether `Envelope.crashes` counts the death that brought this delivery back, if one did. False: the worker must judge."""
        ...

    @property
    def problem(self) -> str | None:
        """Why the job can't run, if known before decoding: a leveret header that isn't a number, for example. Otherwise None."""
        ...

    @property
    def consumers(self) -> int:
        """How many workers consume the job's queue at its level, as counted lately: very many before the first count, 0 if nobody counts."""
        ...

    @property
    def live(self) -> bool:
        """Whether the channel or lease is still there, so that the delivery can be settled. Once it is gone, the broker delivers the job again.

        A settlement may be committed after its caller has stopped waiting. The delivery must then stay live, and the next try of the
        same settlement must return as done. After a settlement that has returned, either value is right.
        """
        ...

    async def begin(self) -> bool:
        """Note that the job, which crashed a worker before, begins; return False if the delivery is no longer live."""
        ...

    def done(self) -> None:
        """Acknowledge the job; acknowledgements are batched, and flushed once per turn of the event loop."""
        ...

    async def again(self, envelope: Envelope, /) -> bool:
        """Publish `envelope` to the delivery's queue, due at its `due_ms` and confirmed by its `deadline`, then acknowledge.

        A `due_ms` that has passed means now. A broker without `Features.counts_crashes` sets an envelope with two crashes or
        more aside, unless it waits: the queue's workers take such jobs one at a time, by deliveries that are `counted`.

        Returns whether the job is published; False if the delivery was lost before.

        Raises the errors of `Broker.publish`; the delivery is then not acknowledged. A call after a `PublishTimeout` waits
        for the first publish if the broker can: while a broker blocks publishers, every further copy that is written would run.
        """
        ...

    async def bury(self, envelope: Envelope, /) -> bool:
        """Publish `envelope` to the queue's dead letters, its body unchanged, confirmed by its `deadline`, then acknowledge.

        The letter keeps the priority. A missing `origin` is the delivery's queue. Returns as `again`.

        Raises the errors of `Broker.publish`; the delivery is then not acknowledged. A call after a `PublishTimeout` waits for
        the first publish, as in `again`.
        """
        ...

    def give_back(self) -> None:
        """Return the job, which wasn't started, to its queue; another worker may have it at once."""
        ...


class Recorded(Delivery, Protocol):
    """A delivery of a broker that `shares` its transactions with the job store."""

    changes: Sequence[Change | Progress]
    """What the next `done`, `again` or `bury` enters into the job store in its own transaction, as `Store.write` does; at first nothing."""


class Sink(Protocol):
    """The receiver of deliveries: the consumer. The broker calls its methods on the event loop; they must not block."""

    def deliver(self, delivery: Delivery, /) -> None:
        """Take a delivery. Within one level of a queue, deliveries come in the broker's order."""
        ...

    def lost(self) -> None:
        """Forget the deliveries that haven't started and are no longer `live`. There may be none."""
        ...

    def overdue(self, queue: str, limit_s: float | None) -> None:
        """Hold no delivery of `queue` for longer than `limit_s`: the broker took one back. None: the broker doesn't name its limit.

        Called before the `lost` of that queue's deliveries, so that their age shows a limit that isn't named.
        """
        ...

    def queues_changed(self) -> None:
        """Look at `Consumption.queues`, which has changed. After a loss, `lost` is called first."""
        ...


class Subscription(msgspec.Struct, frozen=True):
    """A queue to consume, and its prefetch."""

    queue: Queue
    prefetch: int
    """The maximum of unsettled deliveries per level; of all levels together without `Features.window_per_level`."""


class QueueState(msgspec.Struct, frozen=True):
    """Whether a worker takes the jobs of a queue, and why it doesn't."""

    queue: str
    """The queue's name."""
    name: Literal["connecting", "consumed", "sick", "stopped"]
    """
    - connecting: the broker isn't reached, or the consumers aren't registered yet.
    - consumed: every consumer of the queue is registered.
    - sick: the broker answers, but the queue, or one of its levels, can't be consumed.
    - stopped: the worker stops.
    """
    why: str = ""
    """Why the queue isn't consumed, or why no job can be buried from it; otherwise empty."""


class Consumption(Protocol):
    """A running consumption; the broker reconnects with back-off, and then consumes every queue again.

    Each queue comes and goes by itself: a queue that can't be consumed neither stops the others nor costs their deliveries.
    """

    @property
    def queues(self) -> Sequence[QueueState]:
        """The state of each subscription, in their order. `Sink.queues_changed` tells of each change but those of a stop."""
        ...

    async def failed(self) -> None:
        """Wait until waiting won't help any more, and raise the reason. Transient faults never raise.

        The reason is a `ConfigurationError` if the consumption has ended. It is another `LeveretError` if the broker answers and
        yet no queue could be consumed for long: the consumption then goes on trying, and a new process may do better.
        """
        ...

    async def stop_taking(self) -> None:
        """Stop delivering. After the return nothing more is delivered; held deliveries can still be settled."""
        ...

    async def close(self) -> None:
        """Flush the settlements, then end; unsettled deliveries go back to their queues."""
        ...


class Sharing(Protocol):
    """What a broker also has if a job store may be in its database. Optional for a broker."""

    def shares(self, store: Store, missed: Callable[[Change | Progress], object], /) -> bool:
        """Return whether `store` is in the broker's database; every delivery of the broker is then `Recorded`.

        A settlement and its changes are then there together, or neither is. `missed` is called on the loop with those of a `done` that
        the store refuses, whose lease was lost before, or of which nobody knows whether they were committed.
        """
        ...


def is_sharing(broker: object) -> TypeGuard[Sharing]:
    """Return whether a job store may be in the database of `broker`."""
    return getattr(broker, "shares", None) is not None


PublisherStateName: TypeAlias = Literal["connecting", "ready", "blocked", "closed"]


class PublisherState(msgspec.Struct, frozen=True):
    """How a publisher is; see `Publisher.state`."""

    name: PublisherStateName
    """
    - connecting: no connection is open; the first publish opens it, and a lost one is opened again.
    - ready: the broker takes publishes.
    - blocked: the broker is there, and takes no publishes: an alarm of RabbitMQ, or a locked file of SQLite.
    - closed: the publisher was left.
    """
    since: datetime
    """When `name` began, UTC."""
    why: str = ""
    """Why the publisher is connecting or blocked, on one line; otherwise empty."""

    @staticmethod
    def at(now: float, name: PublisherStateName, why: str = "") -> PublisherState:
        """Return the state `name` that began at `now`, Unix seconds."""
        return PublisherState(name, datetime.fromtimestamp(now, timezone.utc), why)

    def then(self, now: float, name: PublisherStateName, why: str = "") -> PublisherState:
        """Return the state that follows at `now`; `since` stays if the name does."""
        return PublisherState(name, self.since, why) if name == self.name else PublisherState.at(now, name, why)


class Posted(Protocol):
    """A publish in progress; it ends by its deadline."""

    @property
    def job_id(self) -> str:
        """The job's id."""
        ...

    @property
    def ended(self) -> bool:
        """Whether the publish is confirmed or has failed."""
        ...

    async def wait(self) -> None:
        """Wait until the publish has ended. Only one task may wait."""
        ...

    def error(self) -> PublishError | None:
        """Return the error that `publish` would have raised, or None; valid once the publish has ended."""
        ...


class Broker(Protocol):
    """A broker, used by one process and one event loop. It connects at the first use.

    Deadlines are in seconds of `time.monotonic()`, the clock of event loops. A publish raises a `PublishError` by its deadline. It
    raises `CancelledError` only if its caller is cancelled.
    """

    def features(self, queue: Queue | None = None, /) -> Features:
        """Return what the broker promises for `queue`; None stands for a queue with all defaults. Connects to nothing."""
        ...

    @property
    def publishing(self) -> PublisherState:
        """How publishing is. Costs nothing, and may be asked from any thread; a broker without connections is ready from the start."""
        ...

    async def publish(self, queue: Queue, envelope: Envelope) -> None:
        """Publish `envelope`, and return once the broker has confirmed the job; it isn't delivered before `due_ms`.

        Declares the queue if it doesn't exist. `pack_headers` of `leveret.headers` has the headers to send.

        A confirmed job is durable if the broker is. Concurrent calls are safe: a bounded window of unconfirmed publishes gives
        back-pressure. By the envelope's `deadline`, raises `BrokerUnavailable` (also after `close`), `PublishTimeout` (the job may
        be published), `Unroutable` (no queue took the job), `InvalidJob` or `MessageTooLarge` (the broker can't carry its headers).
        If waiting wouldn't help (a refused login, a file that can't be used), raises
        `BrokerUnavailable` with the `ConfigurationError` as its `__cause__`.
        """
        ...

    def post(self, queue: Queue, envelope: Envelope) -> Posted | None:
        """Publish a job without delay and without a task, if it can be sent at once; None: nothing was done, use `publish`.

        A broker may always return None. `due_ms` of the envelope is None.

        Meant for many publishes at a time: a task and its wake-up cost more than the publish.
        """
        ...

    async def consume(self, subscriptions: Sequence[Subscription], sink: Sink) -> Consumption:
        """Start to consume. Returns after the first try to connect, even if the try failed; the broker then tries again.

        Declares the queues that don't exist. Deliveries may come before the return, and a broker may consume several times at once.
        Raises `ConfigurationError` if waiting wouldn't help: a refused login, or a queue that exists with other arguments.
        """
        ...

    async def close(self) -> None:
        """Close every connection, within the broker's own deadline. Idempotent."""
        ...
