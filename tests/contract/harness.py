"""What the conformance suite needs of a broker beyond the contract: a foreign producer's put, a lever that breaks publishing, cleaning up.

A lever is a fault of the real thing, no mock: the memory broker's own switch, another connection's exclusive lock on the SQLite file,
a link to RabbitMQ on which nothing moves any more.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import msgspec
import pytest
from pamqp.commands import Basic

from leveret.admin import Admin, Depth
from leveret.broker import Broker, Consumption, Delivery, Subscription
from leveret.clock import Clock, SystemClock
from leveret.envelope import JSON, Envelope
from leveret.ids import new_job_id
from leveret.job import Priority, Queue
from leveret.runtime import Runtime
from leveret.schemes import broker_module
from tests.rabbit.proxy import FaultProxy
from tests.rabbit.raw import connect

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

    one_window = False
    """All levels of a queue share one prefetch window (RabbitMQ's classic queue)."""
    connected = True
    """Workers reach it over something that can be cut."""

    def __init__(self, url: str, queue_type: Literal["quorum", "classic"] = "quorum") -> None:
        self.url = url
        self._type: Literal["quorum", "classic"] = queue_type
        self.queues: list[Queue] = []
        self._open: list[Broker | Admin] = []

    async def start(self) -> None:  # noqa: B027 - most have nothing to do
        """Make ready what brokers will be opened on."""

    def queue(self, *, priorities: bool = True) -> Queue:
        """A queue that nobody used before, deleted at the end."""
        queue = Queue(f"t-{uuid.uuid4().hex[:12]}", type=self._type, priorities=priorities)
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
        """Cut every connection; new ones are let in. Only where `connected`."""
        raise NotImplementedError

    async def delete(self, queue: Queue) -> None:
        """Delete `queue`, all levels, behind the broker's back."""
        pytest.skip("its queues can't be deleted")

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


class MemoryHarness(Harness):
    """The memory broker, on a store of its own name."""

    def __init__(self) -> None:
        super().__init__(f"memory://{uuid.uuid4().hex}")
        from leveret.brokers.memory.store import memory_store

        self.store = memory_store(self.url)

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
        self.store.inject(
            queue.name,
            body,
            job=job,
            job_id=job_id,
            content_type=content_type,
            content_encoding=content_encoding,
            headers=headers,
        )

    async def break_publishing(self) -> None:
        self.store.refuse()

    async def heal(self) -> None:
        self.store.accept()

    def cut(self) -> None:
        self.store.disconnect()


class SqliteHarness(Harness):
    """A SQLite file; broken by another connection that holds the exclusive lock."""

    connected = False

    def __init__(self, path: Path) -> None:
        super().__init__(f"sqlite:///{path}")
        self.path = path
        self._blocker: sqlite3.Connection | None = None

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
        from leveret.brokers.sqlite.rows import headers_text

        with closing(sqlite3.connect(self.path, timeout=PATIENCE_S)) as connection, connection:
            connection.execute(
                "INSERT INTO jobs (queue, level, job_id, job, content_type, content_encoding, body, created_s, headers)"
                " VALUES (?, 'normal', ?, ?, ?, ?, ?, 0, ?)",
                (
                    queue.name,
                    job_id or new_job_id(),
                    job,
                    content_type,
                    content_encoding,
                    body,
                    headers_text(headers or {}),
                ),
            )

    async def break_publishing(self) -> None:
        blocker = sqlite3.connect(self.path, timeout=PATIENCE_S, isolation_level=None)
        blocker.execute("BEGIN EXCLUSIVE")
        self._blocker = blocker

    async def heal(self) -> None:
        if self._blocker is not None:
            self._blocker.execute("ROLLBACK")
            self._blocker.close()
            self._blocker = None


_NOT_HERE = "the RabbitMQ isn't on this machine, so that its link can't be spoilt"


class RabbitHarness(Harness):
    """A RabbitMQ node, reached through a link that can stand still."""

    def __init__(self, url: str, queue_type: Literal["quorum", "classic"]) -> None:
        super().__init__(url, queue_type)
        self.one_window = queue_type == "classic"
        self.direct_url = url
        self._link: FaultProxy | None = None

    async def start(self) -> None:
        """Build the link, where the node is on this machine; brokers made after this go through it."""
        parts = urlsplit(self.direct_url)
        if parts.scheme == "amqp" and parts.hostname in {"127.0.0.1", "localhost"}:
            self._link = await FaultProxy(parts.port or 5672).__aenter__()
            credentials = parts.netloc.rpartition("@")[0]
            self.url = urlunsplit(parts._replace(netloc=f"{credentials}@127.0.0.1:{self._link.port}"))

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
        properties = Basic.Properties(
            headers=dict(headers) if headers else None,
            content_type=content_type,
            content_encoding=content_encoding,
            message_id=job_id,
            message_type=job or None,
        )
        async with connect(self.direct_url) as raw:
            await raw.publish(queue.name, body, properties=properties)

    async def break_publishing(self) -> None:
        if self._link is None:
            pytest.skip(_NOT_HERE)
        self._link.freeze()

    async def heal(self) -> None:
        if self._link is not None:
            self._link.thaw()

    def cut(self) -> None:
        if self._link is None:
            pytest.skip(_NOT_HERE)
        self._link.reset()

    def _names(self, queue: Queue) -> list[str]:
        if queue.type == "classic":
            return [queue.name]
        return [queue.name if level is Priority.NORMAL else f"{queue.name}.{level.value}" for level in queue.levels]

    async def _delete(self, names: list[str]) -> None:
        async with connect(self.direct_url) as raw:
            for name in names:
                await raw.delete(name)

    async def delete(self, queue: Queue) -> None:
        await self._delete(self._names(queue))

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            if self._link is not None:
                await self._link.__aexit__(None, None, None)
            await self._delete([name for queue in self.queues for name in (*self._names(queue), f"{queue.name}.dead")])
