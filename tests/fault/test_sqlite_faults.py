"""What becomes of jobs on SQLite when processes die, stand still, or find the disk full. Real processes, real signals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import pytest

from leveret.admin import Depth
from leveret.brokers.sqlite import open_admin, open_broker, open_store
from leveret.errors import BrokerUnavailable, StoreUnavailable
from leveret.job import Queue
from leveret.runtime import Runtime
from leveret.store import Key
from tests.contract.harness import consume, make_envelope, ready, soon, timed
from tests.contract.store.changes import Publish
from tests.fault.apps import diary

pytestmark = [pytest.mark.fault, pytest.mark.timeout(240)]

_ROOT = Path(__file__).parents[2]
QUEUE = Queue("jobs")
RUNTIME = Runtime(app="fault")

# Each line of a log is one of a diary. Times are the machine's monotonic clock.
_COMMON = """
import asyncio, os, sys, time
import msgspec
from leveret.broker import Subscription
from leveret.brokers import leases
from leveret.brokers.sqlite import open_broker
from leveret.envelope import Envelope
from leveret.errors import PublishError
from leveret.ids import new_job_id
from leveret.job import Queue
from leveret.runtime import Runtime
from tests.fault.apps import diary

url, log_path, argument = sys.argv[1:]
log = diary.open_diary(log_path)
QUEUE = Queue("jobs")

def say(*words):
    diary.write(log, *words)
"""

_PUBLISHER = (
    _COMMON
    + """
async def main():
    broker = open_broker(url, Runtime(app="fault"))
    async def publish():
        while True:
            job_id = new_job_id()
            due_ms = int((time.time() + 0.1) * 1000) if job_id[-1] in "01" else None
            try:
                await broker.publish(QUEUE, Envelope(job_id=job_id, job="a", queue="jobs", body=os.urandom(200), due_ms=due_ms,
                                                     deadline=time.monotonic() + 5))
            except PublishError as error:
                print(error, file=sys.stderr)
            else:
                say(job_id)
            await asyncio.sleep(0.05)
    await asyncio.gather(*(publish() for _ in range(int(argument))))

asyncio.run(main())
"""
)

_WORKER = (
    _COMMON
    + """
lease_s = float(argument)
if lease_s:
    leases.LEASE_S, leases.BEAT_S = lease_s, lease_s / 3

class Sink:
    def deliver(self, delivery):
        asyncio.get_running_loop().create_task(run(delivery))
    def lost(self):
        say("lost", os.getpid(), "-", time.monotonic())
    def queues_changed(self):
        pass

async def run(delivery):
    job_id = delivery.envelope.job_id
    say("start", os.getpid(), job_id, time.monotonic(), int(delivery.redelivered))
    await asyncio.sleep(float(delivery.envelope.headers.get("takes_s", 0.01)))
    while "until" in delivery.envelope.headers and not os.path.exists(f"{delivery.envelope.headers['until']}-{os.getpid()}"):
        await asyncio.sleep(0.05)
    if delivery.envelope.attempt == 1 and job_id[-1] in "23":
        again = msgspec.structs.replace(delivery.envelope, attempt=2, due_ms=int((time.time() + 0.05) * 1000),
                                        deadline=time.monotonic() + 30)
        say("again", os.getpid(), job_id, time.monotonic())
        await delivery.again(again)
        return
    say("done" if delivery.live else "dead", os.getpid(), job_id, time.monotonic())
    delivery.done()

async def main():
    global broker
    broker = open_broker(url, Runtime(app="fault"))
    consumption = await broker.consume([Subscription(QUEUE, 20)], Sink())
    say("ready", os.getpid(), "-", time.monotonic())
    await consumption.failed()

asyncio.run(main())
"""
)


class Program:
    """A process that is started anew each time it is killed."""

    def __init__(self, code: str, path: Path, log: Path, argument: str) -> None:
        self._command = [sys.executable, "-c", code, f"sqlite:///{path}", str(log), argument]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, cwd=_ROOT)  # where `tests` is

    def kill(self) -> tuple[int, float]:
        """End it as the kernel's out-of-memory killer does; return its pid, and when that was at the earliest."""
        assert self.process.poll() is None, "it ended by itself"
        at = time.monotonic()
        self.process.kill()
        self.process.wait(10)
        return self.process.pid, at


async def depth_of(path: Path) -> Depth:
    admin = open_admin(f"sqlite:///{path}", RUNTIME)
    [row] = await admin.depths([QUEUE])
    await admin.close()
    return row


async def line(log: Path, *words: str) -> list[str]:
    """Wait for a line of `log` that begins so."""
    async with asyncio.timeout(60):
        while True:
            for found in diary.read(log):
                if found[: len(words)] == list(words):
                    return found
            await asyncio.sleep(0.05)


@contextlib.contextmanager
def programs() -> Generator[list[Program]]:
    """Whatever is appended is killed at the end."""
    started: list[Program] = []
    try:
        yield started
    finally:
        for program in started:
            if program.process.poll() is None:
                program.process.kill()
                program.process.wait(10)


async def test_thirty_kills_lose_no_confirmed_job_and_no_job_runs_twice_at_once(tmp_path: Path) -> None:
    """The whole promise of the embedded broker, with publisher and workers dying at random."""
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    path, confirmed_log, worker_log = tmp_path / "jobs.db", tmp_path / "confirmed", tmp_path / "worked"
    died: dict[int, float] = {}

    def hit() -> bool:
        """Return whether a job that a killed worker had run was run again."""
        return any(words[0] == "start" and words[4] == "1" for words in diary.read(worker_log))

    with programs() as running:
        publisher = Program(_PUBLISHER, path, confirmed_log, "25")
        running.append(publisher)
        running += [Program(_WORKER, path, worker_log, "0") for _ in range(4)]
        await line(worker_log, "done")
        async with asyncio.timeout(150):
            while len(died) < 30 or not hit():
                await asyncio.sleep(rng.uniform(0.05, 0.5))
                # a slow machine needs more than a second to start the publisher
                while len(diary.read(confirmed_log)) < 20 * len(died):
                    await asyncio.sleep(0.05)
                victim = rng.choice(running)
                killed, killed_at = await asyncio.to_thread(victim.kill)
                died[killed] = killed_at
                victim.start()
        await asyncio.sleep(1.0)
        publisher.process.terminate()
        publisher.process.wait(10)
        async with asyncio.timeout(60):
            while (row := await depth_of(path)).ready + (row.delayed or 0) + (row.unsettled or 0):
                await asyncio.sleep(0.2)

    confirmed = {words[0] for words in diary.read(confirmed_log)}
    runs = diary.read(worker_log)
    done = Counter(words[2] for words in runs if words[0] == "done")
    assert confirmed - done.keys() == set(), f"seed {seed}"
    # whatever ran twice ran after the death of who had it
    open_runs: defaultdict[str, list[str]] = defaultdict(list)
    for words in sorted(runs, key=lambda words: float(words[3])):
        verb, pid, job_id, at = words[:4]
        if verb == "start":
            for other in open_runs[job_id]:
                assert died.get(int(other), float("inf")) < float(at), (
                    f"seed {seed}: {job_id} ran in {pid} while it ran in {other}"
                )
            open_runs[job_id] = [pid]
        elif verb in ("done", "again"):
            open_runs[job_id].remove(pid)
    with closing(sqlite3.connect(path)) as file:
        assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert file.execute("SELECT count(*) FROM jobs").fetchone() == (0,)


async def test_what_a_killed_worker_held_comes_back_at_once_and_in_order(tmp_path: Path) -> None:
    """On the same machine nobody need wait for a lease: the process table says that it is gone."""
    path, log = tmp_path / "jobs.db", tmp_path / "worked"
    broker = open_broker(f"sqlite:///{path}", RUNTIME)
    sent = [b"%d" % number for number in range(5)]
    for body in sent:
        await broker.publish(QUEUE, timed(make_envelope(QUEUE, body, headers={"takes_s": 600}), soon()))
    with programs() as running:
        running.append(Program(_WORKER, path, log, "0"))
        while len([words for words in diary.read(log) if words[0] == "start"]) < 5:
            await asyncio.sleep(0.05)
        _, sink = await consume(broker, QUEUE)
        await asyncio.to_thread(running[0].kill)

        started = time.monotonic()
        deliveries = await sink.take(5)

    assert time.monotonic() - started < 5
    assert [(each.envelope.body, each.redelivered) for each in deliveries] == [(body, True) for body in sent]
    await broker.close()


def stop_between_writes(process: int, path: Path) -> None:
    """Stop a child while it holds no lock on the file: with the lock it would stop everybody."""
    while True:
        os.kill(process, signal.SIGSTOP)
        os.waitpid(process, os.WUNTRACED)
        with (
            closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as file,
            contextlib.suppress(sqlite3.OperationalError),
        ):
            file.execute("BEGIN IMMEDIATE")
            return
        os.kill(process, signal.SIGCONT)
        time.sleep(0.01)


def make(path: str) -> None:
    """Make an empty file."""
    Path(path).touch()


async def test_a_worker_that_was_stopped_for_longer_than_its_lease_settles_nothing_when_it_wakes(
    tmp_path: Path,
) -> None:
    """A paused container wakes up with jobs that another has done since: its acks must not touch them, and it must know."""
    path, log = tmp_path / "jobs.db", tmp_path / "worked"
    broker = open_broker(f"sqlite:///{path}", RUNTIME)
    ends = tmp_path / "ends"
    await broker.publish(QUEUE, timed(make_envelope(QUEUE, job_id="job-9", headers={"until": str(ends)}), soon()))
    with programs() as running:
        running.append(Program(_WORKER, path, log, "1.5"))
        await line(log, "start")
        stopped = running[0].process.pid
        stop_between_writes(stopped, path)
        running.append(Program(_WORKER, path, log, "1.5"))
        other = running[1].process.pid
        taken = await line(log, "start", str(other))
        os.kill(stopped, signal.SIGCONT)
        await line(log, "lost", str(stopped))
        make(f"{ends}-{stopped}")
        await line(log, "dead", str(stopped), "job-9")
        make(f"{ends}-{other}")
        await line(log, "done", str(other), "job-9")
        async with asyncio.timeout(60):
            while (row := await depth_of(path)).unsettled:  # the line comes before the acknowledgement
                await asyncio.sleep(0.05)

    assert taken[4] == "1", "it came redelivered"
    assert row.ready == 0
    await broker.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_full_disk_refuses_publishes_and_loses_nothing_that_was_confirmed(small_disk: Path) -> None:
    """It is the commonest end of an embedded database; the reason must reach the caller, and space freed must end it."""
    path = small_disk / "jobs.db"
    broker = open_broker(f"sqlite:///{path}", RUNTIME)
    confirmed: list[str] = []

    async def fill_up() -> None:
        for number in range(1000):
            job_id = f"job-{number}"
            await broker.publish(QUEUE, timed(make_envelope(QUEUE, os.urandom(20_000), job_id=job_id), soon()))
            confirmed.append(job_id)

    with pytest.raises(BrokerUnavailable, match="full") as raised:
        await fill_up()
    refused = raised.value.job_id
    results = await asyncio.gather(
        *(broker.publish(QUEUE, timed(make_envelope(QUEUE, os.urandom(20_000)), soon())) for _ in range(20)),
        return_exceptions=True,
    )

    assert all(isinstance(result, BrokerUnavailable) for result in results)
    assert refused == f"job-{len(confirmed)}"
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)  # noqa: ASYNC221
    _, sink = await consume(broker, QUEUE, prefetch=1000)
    deliveries = await sink.take(len(confirmed))
    for delivery in deliveries:
        delivery.done()
    await broker.publish(QUEUE, timed(make_envelope(QUEUE, job_id="after"), soon()))

    assert [delivery.envelope.job_id for delivery in deliveries] == confirmed
    assert (await sink.next()).envelope.job_id == "after"
    await broker.close()
    with closing(sqlite3.connect(path)) as file:
        assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_settlements_survive_a_full_disk(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A worker must not forget what it has done because another program filled the disk for a minute."""
    path = small_disk / "jobs.db"
    broker = open_broker(f"sqlite:///{path}", RUNTIME)
    for _ in range(20):
        await broker.publish(QUEUE, timed(make_envelope(QUEUE), soon()))
    consumption, sink = await consume(broker, QUEUE)
    deliveries = await sink.take(20)
    ballast = small_disk / "ballast"
    fill(ballast)

    for delivery in deliveries[:10]:
        delivery.done()
    with pytest.raises(BrokerUnavailable):
        await deliveries[10].bury(timed(deliveries[10].envelope, soon()))
    assert deliveries[10].live
    async with asyncio.timeout(30):
        while ready(consumption):
            await asyncio.sleep(0.05)
    ballast.unlink()
    async with asyncio.timeout(60):
        while not ready(consumption):
            await asyncio.sleep(0.05)
    await deliveries[10].bury(timed(deliveries[10].envelope, soon()))
    row = await depth_of(path)

    assert (row.unsettled, row.dead) == (9, 1)
    assert sum("can't be written" in message for message in caplog.messages) == 1
    await broker.close()


def fill(path: Path) -> None:
    """Take every byte that is left, those that the log has been given included."""
    with path.open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(b"\0" * 4096)


async def test_a_full_disk_refuses_records_and_keeps_those_that_were_written(small_disk: Path) -> None:
    """A store that is full ends the records of jobs until it is started anew, or loses results that were acknowledged."""
    store = open_store(f"sqlite:///{small_disk / 'jobs.db'}", RUNTIME)
    kept: list[Publish] = []

    async def fill_up() -> None:
        for _ in range(1000):
            publish = Publish()
            await store.write([publish.is_("done", result=os.urandom(20_000))])
            kept.append(publish)

    with pytest.raises(StoreUnavailable, match="full"):
        await fill_up()
    with pytest.raises(StoreUnavailable):
        await store.begin([Publish().is_("running") for _ in range(200)])

    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)  # noqa: ASYNC221
    records = await store.read([publish.key for publish in kept])
    assert {record is not None and record.state for record in records} == {"done"}
    assert set(await store.begin([Publish().is_("running") for _ in range(200)])) == {"go"}
    await store.close()


_KEEPER = """
import asyncio, sys
from leveret.brokers.sqlite import open_store
from leveret.runtime import Runtime
from tests.contract.store.changes import Publish

async def main():
    store = open_store(sys.argv[1], Runtime(app="fault"))
    while True:
        batch = [Publish() for _ in range(20)]
        await store.begin([one.is_("running") for one in batch])
        await store.write([one.is_("done", result=one.key.job_id.encode()) for one in batch])
        print(*(f"{one.key.job_id}:{one.key.publish}" for one in batch), flush=True)

asyncio.run(main())
"""


async def test_kills_lose_no_record_that_was_written(tmp_path: Path) -> None:
    """A job is acknowledged because its result is in the store, and then nobody has the result."""
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    written: list[Key] = []
    for _ in range(8):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _KEEPER, url, cwd=_ROOT, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        lines = [await process.stdout.readline() for _ in range(random.randint(1, 12))]
        process.kill()
        lines += (await process.stdout.read()).splitlines(keepends=True)
        await process.wait()
        for line in lines:
            if line.endswith(b"\n"):
                written += [
                    Key(job_id, int(publish)) for job_id, publish in (each.split(":") for each in line.decode().split())
                ]

    store = open_store(url, RUNTIME)
    records = await store.read(written)
    await store.close()

    assert len(written) >= 8 * 20
    assert [record and record.result for record in records] == [key.job_id.encode() for key in written]
