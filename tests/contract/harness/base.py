"""What every harness has: brokers to open, queues to use, levers to break and heal them; and what tests say of envelopes and time."""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import msgspec

from leveret.admin import Admin, Depth
from leveret.broker import Broker, Consumption, Delivery, Features, Subscription
from leveret.clock import Clock, SystemClock, moment_ms
from leveret.envelope import JSON, Envelope
from leveret.ids import new_job_id
from leveret.job import Queue
from leveret.runtime import Runtime
from leveret.schemes import broker_module

PATIENCE_S = 15.0
"""How long anything that must happen may take on a loaded machine; it never takes so long where all is well."""


def soon(seconds: float = PATIENCE_S) -> float:
    """A deadline for a publish that is expected to work."""
    return time.monotonic() + seconds


def make_envelope(queue: Queue, body: bytes = b'{"n": 1}', **fields: Any) -> Envelope:
    """An envelope as a publisher makes one."""
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
    """`envelope` with its time: confirmed by `deadline`, due in `delay_s` by `clock` (the system's)."""
    due_ms = moment_ms((clock or SystemClock()).now() + delay_s) if delay_s else envelope.due_ms
    return msgspec.structs.replace(envelope, deadline=deadline, due_ms=due_ms)


class Recorder:
    """A sink that keeps what it is given, for a test to wait for."""

    def __init__(self) -> None:
        self._arrived: asyncio.Queue[Delivery] = asyncio.Queue()
        self.losses = 0
        self.lost_once = asyncio.Event()

    def deliver(self, delivery: Delivery, /) -> None:
        self._arrived.put_nowait(delivery)

    def lost(self) -> None:
        self.losses += 1
        self.lost_once.set()

    async def next(self, timeout_s: float = PATIENCE_S) -> Delivery:
        """Return the next delivery, or fail."""
        return await asyncio.wait_for(self._arrived.get(), timeout_s)

    async def take(self, count: int) -> list[Delivery]:
        """Return the next `count` deliveries."""
        return [await self.next() for _ in range(count)]

    @property
    def waiting(self) -> int:
        """Deliveries that came and that no test took."""
        return self._arrived.qsize()


class Harness(ABC):
    """One broker under test; what it opened it closes, what it made it deletes."""

    example: ClassVar[str]
    """A URL of the broker, of which its features can be asked."""
    queue_type: ClassVar[Literal["quorum", "classic"]] = "quorum"

    def __init__(self, url: str) -> None:
        self.url = url
        self.queues: list[Queue] = []
        self._open: list[Broker | Admin] = []

    async def start(self) -> None:  # noqa: B027 - most have nothing to do
        """Make ready what brokers will be opened on."""

    def queue(self, *, priorities: bool = True) -> Queue:
        """A queue that nobody used before, deleted at the end."""
        queue = Queue(f"t-{uuid.uuid4().hex[:12]}", type=self.queue_type, priorities=priorities)
        self.queues.append(queue)
        return queue

    def runtime(self, clock: Clock | None = None) -> Runtime:
        return Runtime(app="contract", clock=clock or SystemClock())

    def open(self) -> Broker:
        """A broker of its own, as another process would have; closed at the end."""
        broker = broker_module(self.url).open_broker(self.url, self.runtime())
        self._open.append(broker)
        return broker

    def admin(self) -> Admin:
        """An admin; closed at the end."""
        admin = broker_module(self.url).open_admin(self.url, self.runtime())
        self._open.append(admin)
        return admin

    @abstractmethod
    async def put(
        self,
        queue: Queue,
        body: bytes,
        *,
        job: str = "",
        job_id: str | None = None,
        content_type: str = JSON,
        content_encoding: str | None = None,
        headers: Mapping[str, Any] | None = None,
    ) -> None:
        """Put what a foreign producer would, at NORMAL; the queue must have been published to or consumed before."""

    @abstractmethod
    async def break_publishing(self) -> None:
        """From now on no publish can be confirmed, though what was delivered stays live for a few seconds."""

    @abstractmethod
    async def heal(self) -> None:
        """Let it work again."""

    def cut(self) -> None:
        """Cut every connection; new ones are let in. For a broker that is `connected`."""
        raise NotImplementedError

    async def delete(self, queue: Queue) -> None:
        """Delete `queue`, all levels, behind the broker's back. For a broker whose queues are `deletable`."""
        raise NotImplementedError

    @classmethod
    def features(cls) -> Features:
        """What its broker promises of the queues that `queue` makes: the suite leaves out what it doesn't promise."""
        broker = broker_module(cls.example).open_broker(cls.example, Runtime(app="contract"))
        return broker.features(Queue("any", type=cls.queue_type))

    async def close(self) -> None:
        """End everything and delete every queue."""
        await self.heal()
        for opened in self._open:
            await asyncio.wait_for(opened.close(), PATIENCE_S)


async def consume(
    broker: Broker, *queues: Queue, prefetch: int = 100, sink: Recorder | None = None
) -> tuple[Consumption, Recorder]:
    """Start to take from `queues`; return once every consumer is registered."""
    recorder = sink or Recorder()
    consumption = await broker.consume([Subscription(queue, prefetch) for queue in queues], recorder)
    return consumption, recorder


async def depth(admin: Admin, queue: Queue) -> Depth:
    """The depths of one queue."""
    [row] = await admin.depths([queue])
    return row


def received(envelope: Envelope, **fields: Any) -> Envelope:
    """What must arrive of `envelope`."""
    return msgspec.structs.replace(envelope, **{"cause": None, "deadline": float("inf")} | fields)
