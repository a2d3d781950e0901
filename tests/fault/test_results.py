"""What a waiter learns of jobs whose worker or store fails. Real processes, real signals, real locks."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from leveret import App, Bury, Handle, JobFailed, StoreUnavailable
from leveret.admin import Depth
from leveret.consuming.worker import working
from leveret.job import spec_of
from leveret.outcome import Kind
from leveret.runtime import Runtime
from leveret.schemes import broker_module
from tests.conftest import StartPostgres
from tests.contract.harness import depth
from tests.contract.store.harness import PostgresStoreHarness, RedisStoreHarness, SqliteStoreHarness, StoreHarness
from tests.fault.apps import diary
from tests.fault.apps.kept import work_of
from tests.fault.bench import PATIENCE_S, eventually
from tests.postgres.node import Node, Postgres, migrate

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

_ROOT = Path(__file__).parents[2]
RUNTIME = Runtime(app="fault")


@pytest.fixture(params=["sqlite", "rabbit", pytest.param("redis", marks=pytest.mark.redis)])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A broker that lives on when its workers die."""
    return f"sqlite:///{tmp_path}/jobs.db" if request.param == "sqlite" else request.getfixturevalue(request.param).url


class Place:
    """A broker, a store and a queue, and the workers on them."""

    def __init__(self, folder: Path, broker: str, store: str | None = None) -> None:
        self.folder = folder
        self.work = work_of(f"kept-{uuid.uuid4().hex[:12]}")
        spec = spec_of(self.work)
        assert spec is not None
        self.queue = spec.queue
        self.urls = broker, store or f"sqlite:///{folder}/records.db"
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

    def stop(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.kill()
            worker.wait(10)


@pytest.fixture
def place(tmp_path: Path, broker: str) -> Generator[Place]:
    """A place whose workers end with the test."""
    made = Place(tmp_path, broker)
    yield made
    made.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def one_place(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Place]:
    """A place whose store is beside the broker's jobs: in one file, or in one database."""
    on_disk = request.param == "sqlite"
    url = f"sqlite:///{tmp_path}/jobs.db" if on_disk else request.getfixturevalue("postgres_url")
    made = Place(tmp_path, url, url)
    yield made
    made.stop()


async def test_a_publisher_that_dies_leaves_its_job_unknown_until_it_starts(place: Place) -> None:
    """A program that asks by the id would wait for a job that nobody knows, although a worker runs it."""
    dies = (
        "import asyncio, os, sys\n"
        "from leveret import App\n"
        "from tests.fault.apps.kept import work_of\n"
        "async def main():\n"
        "    async with App('kept', broker=sys.argv[1], store=sys.argv[2]).publisher() as publisher:\n"
        "        await publisher.publish(work_of(sys.argv[3])(n=7), job_id='by-one-who-died', timeout_s=30)\n"
        "        os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    arguments = [sys.executable, "-c", dies, *place.urls, place.queue.name]
    publishes = await asyncio.create_subprocess_exec(*arguments, cwd=_ROOT)
    assert await publishes.wait() == -9

    async with place.app.publisher() as publisher:
        handle = publisher.handle("by-one-who-died", place.work)
        waits = asyncio.create_task(handle.result(timeout_s=PATIENCE_S))
        assert (await handle.status()).state == "unknown"
        place.start()
        assert await waits == 7
        assert (await handle.status()).state == "done"


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


@pytest.mark.parametrize(("publish", "state"), [("bury", "failed"), ("retry", "retrying")])
async def test_a_worker_that_dies_at_a_confirm_leaves_the_state_that_was_confirmed(
    one_place: Place, publish: str, state: str
) -> None:
    """A dead letter whose job "runs" for seven days: its waiter waits for it, and nobody looks for the letter."""
    async with one_place.app.publisher() as publisher:
        handle = await publisher.publish(one_place.work(n=1, dies=publish), timeout_s=PATIENCE_S)
        worker = one_place.start()
        await eventually(lambda: worker.poll() == -9, lambda: one_place.log)
        status = await handle.status()
    row = await _depth(one_place)

    assert status.state == state
    assert (row.ready, row.unsettled or 0, row.delayed or 0, row.dead) == (0, 0, state == "retrying", state == "failed")


async def test_a_lock_on_the_records_holds_up_both_and_costs_no_lease(
    postgres: Postgres, postgres_url: str, tmp_path: Path
) -> None:
    """An acknowledged job would "run" for ever; or each job that ends during a VACUUM FULL of the records would run once more elsewhere."""
    place = Place(tmp_path, postgres_url, postgres_url)
    goes_on, runs = asyncio.Event(), list[int]()

    @place.app.handler(job=place.work)
    async def handle(job: Any) -> int:
        runs.append(job.n)
        await goes_on.wait()
        return 7

    async def beat() -> int:
        [(number,)] = await postgres.query("SELECT max(beat) FROM leveret.workers", url=postgres_url)
        return int(number)

    holder = await asyncpg.connect(postgres_url)
    try:
        async with place.app.publisher() as publisher, place.app.worker():
            waits = await publisher.publish(place.work(n=1), timeout_s=PATIENCE_S)
            await eventually(lambda: runs == [1])
            await holder.execute("BEGIN; LOCK leveret.records IN EXCLUSIVE MODE")
            goes_on.set()
            while not await holder.fetch("SELECT FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.01)
            began = await beat()
            while await beat() == began:  # the end of a first try, after which there is a second one
                await asyncio.sleep(0.02)
            row, status = await _depth(place), await waits.status()
            await holder.execute("ROLLBACK")
            assert await waits.result(timeout_s=PATIENCE_S) == 7
            while await _unfinished(place):
                await asyncio.sleep(0.02)
    finally:
        await holder.close()

    assert (row.unsettled, status.state, runs) == (1, "running", [1])


async def test_a_lost_answer_of_a_commit_leaves_one_truth(postgres_node: StartPostgres) -> None:
    """The worker can't know whether the jobs are settled. Whichever it is, their states must say it, and nothing runs twice here."""
    node = await postgres_node()
    work = work_of(f"kept-{uuid.uuid4().hex[:12]}")
    goes_on, runs = asyncio.Event(), list[int]()
    async with node.database() as url:
        await migrate(url)
        app: App[None] = App("kept", broker=url)

        @app.handler(job=work)
        async def handle(job: Any) -> int:
            runs.append(job.n)
            await goes_on.wait()
            if job.n:
                raise Bury("no paper")
            return 7

        async with app.publisher() as publisher, app.worker():
            done, dead = [await publisher.publish(work(n=n), timeout_s=PATIENCE_S) for n in (0, 1)]
            await eventually(lambda: len(runs) == 2)
            # a commit now waits for a standby that isn't there; ended meanwhile, it is committed, and nobody says so
            await _sync_with(node, "'nobody'")
            goes_on.set()
            while not (waits := await node.query("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'")):
                await asyncio.sleep(0.01)
            for [pid] in waits:
                await node.terminate(pid)
            await _sync_with(node, "DEFAULT")

            assert await done.result(timeout_s=PATIENCE_S) == 7
            with pytest.raises(JobFailed, match="no paper"):
                await dead.result(timeout_s=PATIENCE_S)
            spec = spec_of(work)
            assert spec is not None
            admin = broker_module(url).open_admin(url, RUNTIME)
            while (row := await depth(admin, spec.queue)).ready + (row.unsettled or 0):
                await asyncio.sleep(0.05)
            await admin.close()

    assert (sorted(runs), row.dead) == ([0, 1], 1)


async def _sync_with(node: Node, standbys: str) -> None:
    await node.query(f"ALTER SYSTEM SET synchronous_standby_names = {standbys}")
    await node.query("SELECT pg_reload_conf()")
    while (await node.query("SHOW synchronous_standby_names"))[0][0] != standbys.strip("'").replace("DEFAULT", ""):
        await asyncio.sleep(0.01)


async def _unfinished(place: Place) -> int:
    """Return how many jobs the broker still has."""
    row = await _depth(place)
    return row.ready + (row.unsettled or 0) + (row.delayed or 0) + row.dead


async def _depth(place: Place) -> Depth:
    """Return how many jobs the broker has in each place."""
    admin = broker_module(place.urls[0]).open_admin(place.urls[0], RUNTIME)
    try:
        return await depth(admin, place.queue)
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


class SqliteBackup:
    """A store in a SQLite file, and its backup."""

    def __init__(self, folder: Path) -> None:
        self._live, self._copy = folder / "records.db", folder / "yesterday.db"
        self.url = f"sqlite:///{self._live}"

    async def start(self) -> None:
        """Need nothing."""

    async def back_up(self) -> None:
        """Copy the records as they are."""
        _copy(self._live, self._copy)

    async def restore(self) -> None:
        """Put the copy in their place, under the programs that use them."""
        _copy(self._copy, self._live)


def _copy(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target, timeout=PATIENCE_S)) as new:
        old.backup(new)


class PostgresBackup:
    """A store in a PostgreSQL, and a copy of its folder."""

    def __init__(self, start: StartPostgres) -> None:
        self._start = start

    async def start(self) -> None:
        """Start the server."""
        self._node = await self._start()
        self._live, self._copy = self._node.folder / "data", self._node.folder / "yesterday"
        self.url = self._node.url
        await migrate(self.url)

    async def back_up(self) -> None:
        """Copy the folder of the stopped server, and start it again."""
        await self._node.stop()
        # with its owner, who isn't root
        copies = await asyncio.create_subprocess_exec("cp", "-a", self._live, self._copy)
        assert await copies.wait() == 0
        await self._node.start()

    async def restore(self) -> None:
        """Start the server with the copy."""
        await self._node.kill9()
        await asyncio.to_thread(shutil.rmtree, self._live)
        self._copy.rename(self._live)
        await self._node.start()


@pytest.fixture(params=["sqlite", "postgresql"])
def backup(request: pytest.FixtureRequest, tmp_path: Path) -> SqliteBackup | PostgresBackup:
    """A store with a backup. No coroutine, since its fixtures may run a loop of their own."""
    if request.param == "sqlite":
        return SqliteBackup(tmp_path)
    return PostgresBackup(request.getfixturevalue("postgres_node"))


async def test_a_store_that_is_restored_from_yesterday_does_not_know_todays_jobs_and_goes_on(
    backup: SqliteBackup | PostgresBackup, tmp_path: Path
) -> None:
    """The restored records would fail workers and waiters, or be those of other jobs."""
    await backup.start()
    app: App[None] = App("kept", broker=f"sqlite:///{tmp_path}/jobs.db", store=backup.url)
    work, begun, goes_on = work_of("kept"), asyncio.Event(), asyncio.Event()

    @app.handler(job=work)
    async def handle(job: Any) -> int:
        if job.n == 3:
            begun.set()
            await goes_on.wait()
        n: int = job.n
        return n

    async with app.publisher() as publisher, app.worker():
        yesterday = await publisher.publish(work(n=1), timeout_s=PATIENCE_S)
        assert await yesterday.result(timeout_s=PATIENCE_S) == 1
        await backup.back_up()
        today = await publisher.publish(work(n=2), timeout_s=PATIENCE_S)
        assert await today.result(timeout_s=PATIENCE_S) == 2
        runs = await publisher.publish(work(n=3), timeout_s=PATIENCE_S)
        await begun.wait()
        assert await _state(runs) == "running"
        waits = [
            asyncio.create_task(each.result(timeout_s=PATIENCE_S))
            for each in (runs, publisher.handle(runs.job_id, work))
        ]

        await backup.restore()
        states = [await _state(each) for each in (yesterday, today, runs)]
        with pytest.raises(TimeoutError, match="nothing is known of its end"):
            await today.result(timeout_s=0.1)
        assert await today.abort(timeout_s=PATIENCE_S) == "unknown"
        goes_on.set()
        results = await asyncio.gather(*waits)
        later = await publisher.publish(work(n=4), timeout_s=PATIENCE_S)
        assert await later.result(timeout_s=PATIENCE_S) == 4

    assert states == ["done", "unknown", "unknown"]
    assert results == [3, 3]


async def _state(handle: Handle[Any]) -> str:
    """Return the state of a job once its store answers."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with suppress(StoreUnavailable):
                return (await handle.status()).state


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
