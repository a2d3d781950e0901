"""What a waiter learns of jobs whose worker or store fails. Real processes, real signals, real locks."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import pytest

from leveret import App
from leveret.consuming.worker import working
from leveret.job import spec_of
from leveret.outcome import Kind
from leveret.runtime import Runtime
from leveret.schemes import broker_module
from tests.contract.harness import depth
from tests.contract.store.harness import PostgresStoreHarness, RedisStoreHarness, SqliteStoreHarness, StoreHarness
from tests.fault.apps import diary
from tests.fault.apps.kept import work_of
from tests.fault.bench import PATIENCE_S, eventually

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

_ROOT = Path(__file__).parents[2]
RUNTIME = Runtime(app="fault")


@pytest.fixture(params=["sqlite", "rabbit", pytest.param("redis", marks=pytest.mark.redis)])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A broker that lives on when its workers die."""
    return f"sqlite:///{tmp_path}/jobs.db" if request.param == "sqlite" else request.getfixturevalue(request.param).url


class Place:
    """A broker, a store and a queue, and the workers on them."""

    def __init__(self, folder: Path, broker: str) -> None:
        self.folder = folder
        self.work = work_of(f"kept-{uuid.uuid4().hex[:12]}")
        spec = spec_of(self.work)
        assert spec is not None
        self.queue = spec.queue
        self.urls = broker, f"sqlite:///{folder}/records.db"
        self.app: App[None] = App("kept", broker=self.urls[0], store=self.urls[1])
        self.workers: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        """Start a worker."""
        with (self.folder / "log").open("ab") as log:
            arguments = [
                sys.executable,
                "-m",
                "tests.fault.apps.kept",
                *self.urls,
                self.queue.name,
                str(self.folder / "diary"),
            ]
            self.workers.append(subprocess.Popen(arguments, cwd=_ROOT, stdout=log, stderr=log))
        return self.workers[-1]

    @property
    def starts(self) -> list[int]:
        """The jobs whose handlers began, in order."""
        return [int(words[2]) for words in diary.read(self.folder / "diary") if words[0] == "start"]

    @property
    def log(self) -> str:
        """What the workers said."""
        return (self.folder / "log").read_text()


@pytest.fixture
def place(tmp_path: Path, broker: str) -> Generator[Place]:
    """A place whose workers end with the test."""
    made = Place(tmp_path, broker)
    yield made
    for worker in made.workers:
        worker.kill()
        worker.wait(10)


async def test_a_job_whose_worker_dies_runs_until_another_one_ends_it(place: Place) -> None:
    """A waiter would be told of a failure, or of a second attempt, that never was."""
    async with place.app.publisher() as publisher:
        handle = await publisher.publish(place.work(n=1, dies="running"), timeout_s=PATIENCE_S)
        first = place.start()
        await eventually(lambda: place.starts == [1], lambda: place.log)
        first.kill()
        first.wait(10)
        assert (await handle.status()).state == "running"

        place.start()
        assert await handle.result(timeout_s=PATIENCE_S) == 1
        status = await handle.status()

    assert (status.state, status.attempt) == ("done", 1)
    assert place.starts == [1, 1]


async def test_a_job_whose_worker_dies_before_the_acknowledgement_does_not_run_again(place: Place) -> None:
    """Its effect and its result are there: a second run would charge the card twice."""
    async with place.app.publisher() as publisher:
        handle = await publisher.publish(place.work(n=1, dies="written"), timeout_s=PATIENCE_S)
        first = place.start()
        await eventually(lambda: first.poll() == -9, lambda: place.log)
        assert await handle.result(timeout_s=PATIENCE_S) == 1

        place.start()
        later = await publisher.publish(place.work(n=2), timeout_s=PATIENCE_S)
        assert await later.result(timeout_s=PATIENCE_S) == 2
        async with asyncio.timeout(PATIENCE_S):
            while await _unfinished(place):
                await asyncio.sleep(0.05)

    assert place.starts == [1, 2]


async def _unfinished(place: Place) -> int:
    """Return how many jobs the broker still has."""
    admin = broker_module(place.urls[0]).open_admin(place.urls[0], RUNTIME)
    try:
        row = await depth(admin, place.queue)
        return row.ready + (row.unsettled or 0) + (row.delayed or 0) + row.dead
    finally:
        await admin.close()


@pytest.fixture(params=["sqlite", "postgresql", pytest.param("redis", marks=pytest.mark.redis)])
def frozen(request: pytest.FixtureRequest, tmp_path: Path) -> StoreHarness:
    """A store that can be frozen: by another connection's lock on its file, or by a link on which nothing moves."""
    if request.param == "sqlite":
        return SqliteStoreHarness(f"sqlite:///{tmp_path}/records.db")
    if request.param == "redis":
        return RedisStoreHarness(request.getfixturevalue("redis").url)
    return PostgresStoreHarness(request.getfixturevalue("postgres_url"))


@pytest.fixture
async def store(frozen: StoreHarness) -> AsyncGenerator[StoreHarness]:
    """The same, under way."""
    await frozen.start()
    yield frozen
    await frozen.close()


async def test_jobs_go_on_while_their_store_is_frozen_and_it_hears_of_all_of_them(store: StoreHarness) -> None:
    """A backup of the store, or a cut cable, would stop the jobs or cost their results."""
    count = 300
    app: App[None] = App("kept", broker=f"memory://{uuid.uuid4().hex}", store=store.url)
    work = work_of(f"kept-{uuid.uuid4().hex[:12]}")

    @app.handler(job=work)
    async def handle(job: Any) -> int:
        n: int = job.n
        return n

    async with app.publisher() as publisher, working(app) as worker:
        first = await publisher.publish(work(n=0))
        assert await first.result(timeout_s=PATIENCE_S) == 0
        await store.break_()
        began = time.monotonic()
        receipts = await publisher.publish_many([work(n=n) for n in range(1, count + 1)])
        await eventually(lambda: worker.consumer.counts[Kind.DONE] == count + 1)
        took_s = time.monotonic() - began
        await store.heal()
        handles = [publisher.handle(receipt.job_id, work) for receipt in receipts]
        results = await asyncio.gather(*(handle.result(timeout_s=PATIENCE_S) for handle in handles))

    assert took_s < 8  # a store that jobs wait for holds up each claim by 10 s
    assert results == list(range(1, count + 1))
