"""A worker of jobs with `keep`, on a memory broker and a memory store that says what it hears."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec

from leveret import App, Job, Keep, Queue, Settings
from leveret.attempt import Attempt
from leveret.broker import Broker
from leveret.brokers.memory.jobs import MemoryJobs, Records
from leveret.brokers.memory.store import memory_store
from leveret.clock import ManualClock
from leveret.consuming.worker import Working, working
from leveret.envelope import Envelope
from leveret.job import spec_of
from leveret.outcome import Kind
from leveret.runtime import Runtime
from leveret.store import Change, Key, Progress, Record, Store, Verdict

images = Queue("images")


class Thumbnail(msgspec.Struct):
    width: int


class Resize(Job[Thumbnail], name="image.resize", queue=images, keep=Keep(result_s=60, failed_s=600, max_bytes=100)):
    url: str = "a.png"


class Paint(Job, name="image.paint", queue=images, keep=Keep()):
    """A job that is kept, and has no result."""


class Plain(Job, name="image.plain", queue=images):
    """A job of which nothing is kept."""


class Hearing:
    """A job store in memory that remembers what it was told; `hangs` holds back its answers."""

    def __init__(self, runtime: Runtime) -> None:
        self.records = Records()
        self._store = MemoryJobs(self.records, "memory://heard", runtime)
        self.heard: list[Change | Progress] = []
        self.begins = 0
        self.closed = False
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def write(self, changes: Sequence[Change | Progress], /) -> None:
        """As `Store.write`."""
        await self.goes_on.wait()
        await self._store.write(changes)
        self.heard += changes

    async def begin(self, changes: Sequence[Change], /) -> Sequence[Verdict]:
        """As `Store.begin`."""
        self.begins += 1
        verdicts = await self._store.begin(changes)
        self.heard += [change for change, verdict in zip(changes, verdicts, strict=True) if verdict == "go"]
        return verdicts

    async def close(self) -> None:
        """As `Store.close`."""
        self.closed = True

    def life(self, job_id: str = "id-1") -> list[tuple[str, int, int]]:
        """The states of a job in the order in which they were told, each with its pass and attempt."""
        return [(c.state, c.passes, c.attempt) for c in self.heard if isinstance(c, Change) and c.job_id == job_id]


class Bench(App[None]):
    """An app with its broker, store and clock, and what a test does with them."""

    def __init__(self, *, middleware: Sequence[Any] = (), settings: Settings | None = None) -> None:
        url = f"memory://{uuid.uuid4().hex}"
        super().__init__("bench", broker=url, middleware=middleware, settings=settings, concurrency=100)
        self.clock = ManualClock()
        self._time = Runtime(app="bench", clock=self.clock, settings=settings or Settings())
        self.store = Hearing(self._time)
        self.stores_opened = 0
        self.broker: Broker | None = None
        self.contents = memory_store(cast("str", self.broker_url()))

    def open_store(self, runtime: Runtime) -> Store | None:
        self.stores_opened += 1
        return cast("Store", self.store)

    @asynccontextmanager
    async def works(self) -> AsyncGenerator[Working]:
        """A worker under the clock of the test."""
        async with working(self, runtime=self._time, grace_s=5) as work:
            yield work

    async def publish(self, job: Job, job_id: str = "id-1", /, *, publish: int = 7, **fields: Any) -> Key:
        """Publish a job as a publisher with a store does."""
        spec = spec_of(type(job))
        assert spec is not None
        given = {"job_id": job_id, "job": spec.name, "queue": "images", "publish": publish, "created_s": 1}
        envelope = Envelope(**{"body": msgspec.json.encode(job), **given, **fields})
        if self.broker is None:
            self.broker = self.open_broker(self._time)
        await self.broker.publish(images, envelope)
        return Key(job_id, publish)

    async def record(self, key: Key) -> Record:
        """The record of a publish."""
        [record] = await self.store.read([key])
        assert record is not None
        return record

    async def passes(self, seconds: float) -> None:
        """Let time pass, and what it wakes run."""
        await turns()
        self.clock.advance(seconds)
        await turns()


def queued(key: Key) -> Change:
    """What a publisher tells the store of a publish."""
    return Change(
        job_id=key.job_id,
        publish=key.publish,
        queue="images",
        job="image.paint",
        state="queued",
        passes=0,
        attempt=1,
        keep_s=60.0,
        at_ms=1,
    )


async def turns() -> None:
    """Let everything run that waits neither for the clock nor for a test."""
    for _ in range(50):
        await asyncio.sleep(0)


async def ended(work: Working, kind: Kind, count: int = 1) -> None:
    """Wait until so many deliveries have ended in one way, and nothing runs any more."""
    await until(lambda: work.consumer.counts[kind] == count and not work.consumer.busy)
    await turns()  # what is told without a wait


async def until(true: Callable[[], bool]) -> None:
    """Wait for what has no event to wait on."""
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.001)


class Blocks:
    """A handler that runs until the test lets it go on, and notes how it ends."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.ends: list[str] = []
        self.runs = 0
        self.attempt: Attempt[Any] | None = None

    async def __call__(self, attempt: Attempt[Any]) -> Any:
        self.runs += 1
        self.attempt = attempt
        self.begun.set()
        try:
            await self.goes_on.wait()
            self.ends.append("to its end")
        finally:
            self.ends.append("finally")
