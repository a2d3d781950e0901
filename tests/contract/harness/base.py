"""The base of every harness: brokers, queues, and levers that break and heal them; and helpers for envelopes and time."""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict, Unpack

import msgspec
import pytest

from leveret.admin import Admin, Depth
from leveret.broker import Broker, Consumption, Delivery, Features, QueueState, Subscription
from leveret.clock import Clock, SystemClock, moment_ms
from leveret.envelope import Envelope
from leveret.ids import new_job_id
from leveret.job import Queue
from leveret.runtime import Runtime
from leveret.schemes import broker_module

PATIENCE_S = 15.0
"""How long a test waits for an event on a loaded machine, seconds; a passing test never waits this long."""


def soon(seconds: float = PATIENCE_S) -> float:
    """Return the deadline of a publish that is expected to succeed."""
    return time.monotonic() + seconds


async def soonest_s(measure: Callable[[], Awaitable[float]], limit_s: float) -> float:
    """Return what `measure` returns: of three tries the first that is within the limit, since a machine may stand still once."""
    tries_s = list[float]()
    while len(tries_s) < 3 and not any(tried_s <= limit_s for tried_s in tries_s):
        tries_s.append(await measure())
    return min(tries_s)


def make_envelope(queue: Queue, body: bytes = b'{"n": 1}', **fields: Any) -> Envelope:
    """Return an envelope as a publisher makes it."""
    usual: dict[str, Any] = {
        "job_id": new_job_id(),
        "job": "contract.case",
        "queue": queue.name,
        "body": body,
        "created_s": 1_700_000_000,
        "app": "contract",
    }
    return Envelope(**usual | fields)


def timed(envelope: Envelope, deadline: float, *, delay_s: float = 0.0, clock: Clock | None = None) -> Envelope:
    """Return `envelope` with its times: confirmed by `deadline`, due in `delay_s` by `clock` (by default the system's)."""
    due_ms = moment_ms((clock or SystemClock()).now() + delay_s) if delay_s else envelope.due_ms
    return msgspec.structs.replace(envelope, deadline=deadline, due_ms=due_ms)


class Recorder:
    """A sink that keeps its deliveries until a test takes them."""

    def __init__(self) -> None:
        self._arrived: asyncio.Queue[Delivery] = asyncio.Queue()
        self.losses = 0
        self.lost_once = asyncio.Event()
        self.states: list[QueueState] = []
        """Every state of the followed consumption's queues, at each change."""
        self.overdues: list[tuple[str, float | None]] = []
        """The queues of which the broker took back a delivery, each with the broker's limit."""
        self._followed: Consumption | None = None
        self._changed = asyncio.Event()

    def deliver(self, delivery: Delivery, /) -> None:
        self._arrived.put_nowait(delivery)

    def lost(self) -> None:
        self.losses += 1
        self.lost_once.set()

    def overdue(self, queue: str, limit_s: float | None) -> None:
        self.overdues.append((queue, limit_s))

    def queues_changed(self) -> None:
        if self._followed is not None:
            self.states += self._followed.queues
        self._changed.set()

    def follow(self, consumption: Consumption) -> None:
        """Keep the states of its queues from now on."""
        self._followed = consumption

    async def until(self, happened: Callable[[], bool]) -> None:
        """Wait until `happened`, looking at each change of a queue's state."""
        while not happened():
            self._changed.clear()
            await self._changed.wait()

    async def next(self, timeout_s: float = PATIENCE_S) -> Delivery:
        """Return the next delivery; TimeoutError after `timeout_s`."""
        return await asyncio.wait_for(self._arrived.get(), timeout_s)

    async def take(self, count: int) -> list[Delivery]:
        """Return the next `count` deliveries."""
        return [await self.next() for _ in range(count)]

    @property
    def waiting(self) -> int:
        """The number of deliveries that the test hasn't taken."""
        return self._arrived.qsize()


class Foreign(TypedDict, total=False):
    """What a foreign producer may say of a message. Default: nothing, and JSON as the content type."""

    job: str
    job_id: str | None
    content_type: str
    content_encoding: str | None
    headers: Mapping[str, Any] | None


class Harness(ABC):
    """One broker under test; the harness closes what it opened and deletes what it made."""

    example: ClassVar[str]
    """A URL of the broker, for asking for its features."""
    queue_type: ClassVar[Literal["quorum", "classic"]] = "quorum"
    marks: ClassVar[tuple[pytest.MarkDecorator, ...]] = ()
    """Marks of every case on this broker."""

    @classmethod
    @abstractmethod
    def make(cls, request: pytest.FixtureRequest, folder: Path) -> Harness:
        """Return a harness for one case, which may use `folder`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.queues: list[Queue] = []
        self._open: list[Broker | Admin] = []

    async def start(self) -> None:  # noqa: B027 - most harnesses have nothing to prepare
        """Prepare the environment before any broker is opened."""

    def queue(self, *, priorities: bool = True) -> Queue:
        """Return a new queue, which is deleted at the end."""
        queue = Queue(f"t-{uuid.uuid4().hex[:12]}", type=self.queue_type, priorities=priorities)
        self.queues.append(queue)
        return queue

    def runtime(self, clock: Clock | None = None) -> Runtime:
        return Runtime(app="contract", clock=clock or SystemClock())

    def open(self) -> Broker:
        """Return a new broker, as another process would open it; closed at the end."""
        broker = broker_module(self.url).open_broker(self.url, self.runtime())
        self._open.append(broker)
        return broker

    def admin(self) -> Admin:
        """Return an admin, which is closed at the end."""
        admin = broker_module(self.url).open_admin(self.url, self.runtime())
        self._open.append(admin)
        return admin

    @abstractmethod
    async def put(self, queue: Queue, body: bytes, **fields: Unpack[Foreign]) -> None:
        """Publish as a foreign producer would, at NORMAL; the queue must exist, by a publish or a consumption."""

    @abstractmethod
    async def break_publishing(self) -> None:
        """Let no publish be confirmed from now on, while deliveries stay live for a few seconds."""

    @abstractmethod
    async def heal(self) -> None:
        """End `break_publishing`."""

    def cut(self) -> None:
        """Take every delivery from its worker, as a lost connection or lease does. For a broker that `counts_redelivery`."""
        raise NotImplementedError

    async def delete(self, queue: Queue) -> None:
        """Delete `queue`, all levels, without the broker's knowledge. For a broker whose queues are `deletable`."""
        raise NotImplementedError

    @classmethod
    def features(cls) -> Features:
        """Return what the broker promises of the queues that `queue` makes; the suite skips the tests of other promises."""
        broker = broker_module(cls.example).open_broker(cls.example, Runtime(app="contract"))
        return broker.features(Queue("any", type=cls.queue_type))

    async def close(self) -> None:
        """Heal and close everything that was opened."""
        await self.heal()
        for opened in self._open:
            await asyncio.wait_for(opened.close(), PATIENCE_S)


async def consume(
    broker: Broker, *queues: Queue, prefetch: int = 100, sink: Recorder | None = None
) -> tuple[Consumption, Recorder]:
    """Consume `queues` with a recorder as the sink."""
    recorder = sink or Recorder()
    consumption = await broker.consume([Subscription(queue, prefetch) for queue in queues], recorder)
    return consumption, recorder


def ready(consumption: Consumption) -> bool:
    """Whether every queue is consumed."""
    return all(state.name == "consumed" for state in consumption.queues)


async def depth(admin: Admin, queue: Queue) -> Depth:
    """Return the depth of one queue."""
    [row] = await admin.depths([queue])
    return row


def received(envelope: Envelope, **fields: Any) -> Envelope:
    """Return the envelope that must arrive when `envelope` is published."""
    return msgspec.structs.replace(envelope, **{"cause": None, "deadline": float("inf"), "resend": False} | fields)
