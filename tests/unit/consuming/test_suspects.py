"""Jobs that may have killed a worker: beside the others at first, then alone, then buried. On SQLite, whose rows a test can set."""

import asyncio
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from leveret import App, Attempt, Job, Queue
from leveret.consuming.worker import Working, working
from leveret.outcome import Kind

images = Queue("images", priorities=False)


class Resize(Job, name="resize", queue=images):
    """A job."""

    n: int


class Shop:
    """An app on a file, its jobs, and who runs at once."""

    def __init__(self, path: Path, *crashes: int) -> None:
        self.path = path
        self.app = App("shop", broker=f"sqlite:///{path}")
        self.crashes = crashes
        self.gate = asyncio.Event()
        self.takes_s = 0.0
        self.running: set[int] = set()
        self.together: list[set[int]] = []

        @self.app.handler
        async def resize(job: Resize, attempt: Attempt) -> None:
            self.running.add(job.n)
            self.together.append(set(self.running))
            try:
                await self.gate.wait()
                await asyncio.sleep(self.takes_s)
            finally:
                self.running.discard(job.n)

    async def publish(self) -> None:
        """Publish a job per number of crashes, as if that many workers had died of it."""
        async with self.app.publisher() as publisher:
            for n in range(len(self.crashes)):
                await publisher.publish(Resize(n=n), job_id=str(n))
        with closing(sqlite3.connect(self.path)) as file, file:
            for n, crashes in enumerate(self.crashes):
                file.execute(
                    "UPDATE jobs SET crashes = ?, deliveries = ? WHERE job_id = ?", (crashes, crashes and 1, str(n))
                )

    def rows(self) -> list[tuple[int, int]]:
        """How often each job crashed a worker, and whether it is noted that it began."""
        with closing(sqlite3.connect(self.path)) as file:
            return file.execute("SELECT crashes, begun FROM jobs ORDER BY job_id").fetchall()

    async def until_running(self, *wanted: int) -> None:
        async with asyncio.timeout(10):
            while self.running != set(wanted):
                await asyncio.sleep(0.005)


async def until_counted(work: Working, kind: Kind, count: int, timeout_s: float = 10) -> None:
    """Wait until so many deliveries have ended as `kind`."""
    async with asyncio.timeout(timeout_s):
        while work.consumer.counts[kind] < count:
            await work.consumer.changed()


async def test_after_one_crash_a_job_runs_beside_the_others_and_it_is_noted_that_it_began(tmp_path: Path) -> None:
    """Whatever ran beside a job that killed its worker is innocent, and would wait in line; the guilty one must be known next time."""
    shop = Shop(tmp_path / "jobs.db", 0, 1, 1)
    await shop.publish()

    async with working(shop.app):
        await shop.until_running(0, 1, 2)
        rows = shop.rows()
        shop.gate.set()

    assert rows == [(0, 0), (1, 1), (1, 1)]


async def test_after_two_crashes_a_job_runs_alone(tmp_path: Path) -> None:
    """It takes along what runs beside it, each time."""
    shop = Shop(tmp_path / "jobs.db", 2, 2, 0, 0)
    await shop.publish()

    async with working(shop.app) as work:
        await asyncio.sleep(0.1)
        shop.gate.set()
        await until_counted(work, Kind.DONE, 4)

    assert [together for together in shop.together if together & {0, 1}] == [{0}, {1}]


async def test_many_suspects_leave_the_others_their_turns(tmp_path: Path) -> None:
    """Five kills of a busy worker make hundreds of innocent jobs suspects: alone, one by one, they were an outage for all others."""
    shop = Shop(tmp_path / "jobs.db", *[2] * 7, *[0] * 4)
    shop.takes_s = 0.3
    await shop.publish()

    async with working(shop.app) as work:
        shop.gate.set()
        await until_counted(work, Kind.DONE, 11, timeout_s=20)

    firsts = [min(together) for together in shop.together]
    turns = [place for place, together in enumerate(shop.together) if max(together) >= 7]
    assert set(firsts) >= set(range(7))
    assert max(turns) < 10, "the others waited for every suspect"
    assert all(len(together) == 1 for together in shop.together if together & set(range(7)))


async def test_suspects_do_not_wait_for_others_that_are_not_there(tmp_path: Path) -> None:
    """After an outage of the workers a few long suspects are what is left: each waited as long again as the one before it ran."""
    shop = Shop(tmp_path / "jobs.db", 2, 2)
    shop.takes_s = 2.0
    await shop.publish()

    async with working(shop.app) as work:
        shop.gate.set()
        await until_counted(work, Kind.DONE, 1)
        ended = time.monotonic()
        await shop.until_running(1)
        waited_s = time.monotonic() - ended
        await until_counted(work, Kind.DONE, 2)

    assert waited_s < 1.0


async def test_at_the_limit_a_job_is_buried_without_a_run(tmp_path: Path) -> None:
    """The last run kills a worker, too."""
    shop = Shop(tmp_path / "jobs.db", 5)
    await shop.publish()

    async with working(shop.app) as work:
        await until_counted(work, Kind.WORKER_LOST, 1)

    assert shop.together == []
    with closing(sqlite3.connect(shop.path)) as file:
        [(headers,)] = file.execute("SELECT headers FROM dead").fetchall()
    assert "worker_lost: 5 workers died while they ran this job" in headers
    assert '"lv-crashes":5' in headers


@pytest.mark.parametrize("crashes", [1, 2])
async def test_a_worker_that_ends_in_order_has_not_crashed(tmp_path: Path, crashes: int) -> None:
    """What is cut off at the end of a grace would be buried after a week of deploys."""
    shop = Shop(tmp_path / "jobs.db", crashes)
    await shop.publish()

    async with working(shop.app, grace_s=0.01):
        await shop.until_running(0)

    assert shop.rows() == [(crashes, 0)]
