"""`RateLimit` over the processes of one `leveret work`: one bucket in shared memory, whoever has the jobs, and whoever dies."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

from leveret import Attempt, Done, Snooze
from leveret.clock import ManualClock
from leveret.middleware import RateLimit
from leveret.process.shared import SharedMemory, make_shared
from leveret.runtime import Runtime
from tests.unit.middleware.test_ratelimit import most_in
from tests.unit.runs import Memory, Piece, attempt, chain

PATIENCE_S = 20.0


class Process:
    """One process, with its own `RateLimit` on the shared bucket."""

    def __init__(self, clock: ManualClock, piece: Piece, layer: RateLimit, processes: int = 3) -> None:
        self.starts: list[float] = []
        self.layer = layer
        self._clock = clock
        bound = Runtime(app="test", clock=clock, processes=processes, shared=Memory([piece]))
        self.step = chain(layer, handler=self._run, bound=bound)

    async def _run(self, _: Attempt[Any]) -> None:
        self.starts.append(self._clock.monotonic())

    async def start(self, jobs: int) -> int:
        """Start at most `jobs`, as a consumer would: only what may start now. Return how many started."""
        started = 0
        while started < jobs and not self.layer.ready_in_s():
            for _ in range(min(self.layer.starts_now(), jobs - started)):
                assert await self.step(attempt()) == Done()
                started += 1
        return started


def processes(limit: float, count: int = 3, **more: Any) -> tuple[ManualClock, Piece, list[Process]]:
    clock, piece = ManualClock(), Piece()
    return clock, piece, [Process(clock, piece, RateLimit(limit, **more), count) for _ in range(count)]


@pytest.mark.parametrize("holders", [1, 2, 3])
@pytest.mark.parametrize("limit", [10, 1000])
async def test_the_limit_is_reached_and_kept_whoever_has_the_jobs(limit: int, holders: int) -> None:
    """Divided by the number of processes, a limit of 10 starts 3 per second when one of three processes has the backlog."""
    clock, _, all_ = processes(limit)
    while clock.monotonic() < 5:
        for process in all_[:holders]:
            await process.start(100)
        clock.advance(0.001)
    starts = sorted(start for process in all_ for start in process.starts)
    assert limit * 5 * 0.95 <= len(starts) <= limit * 5 + all_[0].layer.burst
    assert most_in(starts, 0.1) <= limit / 10 + 2 * all_[0].layer.burst


async def test_a_burst_is_one_burst_of_all_processes() -> None:
    """Starts that a process drew long ago and didn't use would come on top: three processes start three bursts."""
    clock, _, all_ = processes(10, burst=8)
    for wait_s in (0.0, 0.005, 60.0, 60.0):
        clock.advance(wait_s)
        started = [await process.start(100) for process in all_]
        assert sum(started) == (0 if wait_s == 0.005 else 8)
        clock.advance(60.0)
        for process in all_:  # leave each with unused starts
            await process.start(3)
            clock.advance(0.005)


async def test_a_process_with_one_job_keeps_no_starts_from_the_others() -> None:
    """The others would wait for starts that nobody uses, and `burst` would hold for one of them only."""
    _, _, (idle, busy, _) = processes(10, burst=100)
    assert await idle.start(1) == 1
    assert await busy.start(200) == 99


async def test_what_was_drawn_and_not_used_goes_back() -> None:
    """A process whose jobs come now and then would use up the limit without starting anything."""
    clock, _, (few, many, _) = processes(100, burst=10)
    assert await few.start(4) == 4  # drew 1, 2 and 4
    assert await many.start(100) == 3
    clock.advance(0.02)
    assert [await few.start(1), await many.start(100)] == [1, 4]  # two are due, three came back


async def test_ready_means_that_no_other_process_takes_the_start() -> None:
    """All processes wake at the same moment: all but one would start a job only to send it back to the broker."""
    _, _, (first, second, _) = processes(1, every_s=10.0)
    assert first.layer.ready_in_s() == 0
    assert second.layer.ready_in_s() == 10.0
    assert [first.layer.ready_in_s(), first.layer.starts_now()] == [0, 1]
    assert await first.step(attempt()) == Done()


async def test_snoozed_jobs_get_places_of_all_processes() -> None:
    """With places of one process each, the jobs that one process snoozed come back at a third of the limit, or three at once."""
    clock, _, all_ = processes(1, every_s=10.0)
    assert await all_[0].start(1) == 1
    delays: list[float] = []
    for process in all_ * 3:
        outcome = await process.step(attempt())
        assert isinstance(outcome, Snooze)
        delays.append(outcome.delay_s)
    assert all(10.0 * place <= delay <= 10.0 * place + 1.0 for place, delay in enumerate(delays, 1))
    assert clock.monotonic() == 0


async def test_a_lock_that_stays_busy_is_waited_for_during_one_interval() -> None:
    """A stopped process that has the lock would stop the queue in all the others."""
    clock, piece, (process, *_) = processes(10)
    piece.kept = True
    while process.layer.ready_in_s():
        clock.advance(0.001)
    assert clock.monotonic() == pytest.approx(0.1)
    while clock.monotonic() < 2.1:
        await process.start(100)
        clock.advance(0.001)
    assert 19 <= len(process.starts) <= 21


async def test_a_stopped_holder_that_goes_on_costs_at_most_a_burst() -> None:
    """It writes the time that it read before its stop; the starts of the others meanwhile must not come once more."""
    clock, piece, (process, *_) = processes(100, burst=3)
    old = piece.numbers[1]
    while clock.monotonic() < 2:
        await process.start(100)
        clock.advance(0.001)
    piece.numbers[1] = old
    assert await process.start(100) == 3


async def test_a_job_waits_in_its_slot_for_a_lock_that_is_busy() -> None:
    """Without a gate the job gets here while another process draws: it must neither be snoozed nor start for nothing."""
    clock, piece, (process, *_) = processes(10)
    piece.kept = True
    task = asyncio.ensure_future(process.step(attempt()))
    for _ in range(3):
        await asyncio.sleep(0)
        clock.advance(0.001)
    assert process.starts == []
    piece.kept = False
    for _ in range(3):
        await asyncio.sleep(0)
        clock.advance(0.001)
    assert await task == Done()


async def test_another_limit_in_the_same_place_takes_its_share_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that was restarted with new code would use a bucket of another rate, and nobody would know."""
    clock, piece, (old, *_) = processes(10)
    same = Process(clock, piece, RateLimit(10))
    assert not caplog.records

    new = Process(clock, piece, RateLimit(30))

    [line] = [record.getMessage() for record in caplog.records]
    assert line == (
        "RateLimit(30, every_s=1): this process starts at most 10 jobs per second: another process of this `leveret work` "
        "has another rate limit in this place; restart `leveret work`"
    )
    assert await old.start(1) == 1
    assert (same.layer.ready_in_s(), new.layer.ready_in_s()) == (0.1, 0)
    assert await new.start(9) == 1


async def test_more_limits_than_regions_take_their_share(caplog: pytest.LogCaptureFixture) -> None:
    """The last limits of a very large app would hold once per process."""
    layer = RateLimit(30)
    layer.bind(Runtime(app="test", processes=3, shared=Memory([])))
    assert layer.ready_in_s() == 0
    assert layer.starts_now() == 1
    assert "too many rate limits" in caplog.text


async def test_a_publisher_in_a_worker_takes_no_region() -> None:
    """It would take the place of the next limit, in this process only."""
    piece, other = Piece(), Piece()
    shared = Memory([piece, other])
    layer = RateLimit(10)
    for runtime in (
        Runtime(app="shop"),
        Runtime(app="shop", processes=2, shared=shared),
        Runtime(app="shop", processes=2, shared=shared),
        Runtime(app="shop"),
    ):
        layer.bind(runtime)
    assert shared.region() is other
    assert layer.ready_in_s() == 0
    assert piece.numbers[1] > 0


@pytest.fixture
def memory() -> Generator[int, None, None]:
    """The file descriptor of real shared memory."""
    fd = make_shared()
    assert fd is not None
    yield fd
    os.close(fd)


WORKER = """
import asyncio, os, signal, sys, time
from leveret.middleware import RateLimit
from leveret.process.shared import SharedMemory
from leveret.runtime import Runtime
from tests.unit.runs import attempt, chain

shared = SharedMemory(int(sys.argv[1]))
what, limit, seconds = sys.argv[2], float(sys.argv[3]), float(sys.argv[4])

async def starts():
    count, layer = 0, RateLimit(limit, burst=int(limit / 10))  # a loaded machine may wake it 0.1 s late
    async def run(_):
        nonlocal count
        count += 1
    step = chain(layer, handler=run, bound=Runtime(app="test", processes=4, shared=shared))
    print("begun", flush=True)
    sys.stdin.readline()
    begins = time.monotonic()
    while (now := time.monotonic()) < begins + seconds:
        if wait_s := layer.ready_in_s():
            await asyncio.sleep(wait_s)
        else:
            await step(attempt())
    print(count, begins, now, flush=True)

if what == "starts":
    asyncio.run(starts())
else:
    region = shared.region()
    assert region.lock()
    print("locked", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    region.unlock()
"""


@contextmanager
def worker(fd: int, what: str, limit: float = 0, seconds: float = 0) -> Generator["subprocess.Popen[str]", None, None]:
    """A process that has the shared memory, once it has begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(fd), what, str(limit), str(seconds)],
        pass_fds=[fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == ("begun" if what == "starts" else "locked")
            yield process
        finally:
            process.kill()


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def starts(process: "subprocess.Popen[str]") -> tuple[int, float, float]:
    """How many jobs it started, from when until when."""
    assert process.stdout is not None
    count, begins, ends = process.stdout.readline().split()
    return int(count), float(begins), float(ends)


def counted(process: "subprocess.Popen[str]") -> int:
    return starts(process)[0]


def locked(fd: int, until_s: float) -> bool:
    """Whether this process gets the lock of the first region in time."""
    region = SharedMemory(os.dup(fd)).region()  # a dup: closing it would end the locks of this process
    assert region is not None
    ends = time.monotonic() + until_s
    while not (got := region.lock()) and time.monotonic() < ends:
        time.sleep(0.002)
    if got:
        region.unlock()
    return got


@pytest.mark.parametrize("limit", [20, 500])
def test_processes_that_all_have_jobs_keep_the_limit_together(memory: int, limit: int) -> None:
    """The provider behind the handlers counts all processes as one, and answers 429."""
    with (
        worker(memory, "starts", limit, 2) as a,
        worker(memory, "starts", limit, 2) as b,
        worker(memory, "starts", limit, 2) as c,
    ):
        for process in (a, b, c):
            go(process)
        counts, begins, ends = zip(*map(starts, (a, b, c)), strict=True)
    took_s = max(ends) - min(begins)  # they don't begin at once
    # three shares of a quarter would be 75 %
    assert limit * 2 * 0.8 <= sum(counts) <= limit * took_s * 1.05 + limit / 10


def test_a_killed_holder_frees_the_lock(memory: int) -> None:
    """The kernel kills for memory, at any instruction: the lock would stay, and no job of the queue would start any more."""
    with worker(memory, "lock") as holder:
        assert not locked(memory, 0.05)
        holder.kill()
        holder.wait(PATIENCE_S)
        assert locked(memory, PATIENCE_S)


def test_a_killed_process_stops_nobody_and_loses_at_most_a_block(memory: int) -> None:
    """A worker that is killed in mid-work must not leave the others without starts."""
    with worker(memory, "starts", 500, 60) as victim, worker(memory, "starts", 500, 2) as other:
        go(victim)
        time.sleep(0.3)
        victim.send_signal(signal.SIGKILL)
        victim.wait(PATIENCE_S)
        go(other)
        assert 1000 * 0.6 <= counted(other) <= 1000 * 1.05 + 50  # a share of a quarter would be 250


def test_a_stopped_holder_stops_the_others_for_one_interval_at_most(memory: int) -> None:
    """A process under a debugger, or frozen with its container, would stop the queue in all the others until it goes on."""
    with worker(memory, "lock") as holder, worker(memory, "starts", 20, 2) as other:
        assert not locked(memory, 0.05)
        go(other)
        assert 40 * 0.6 <= counted(other) <= 43  # a share of a quarter would be 10
        holder.send_signal(signal.SIGCONT)
        holder.wait(PATIENCE_S)
    assert locked(memory, PATIENCE_S)


def test_a_stopped_process_without_the_lock_stops_nobody(memory: int) -> None:
    """The same, at most of its instructions."""
    with worker(memory, "starts", 100, 60) as stopped, worker(memory, "starts", 100, 1) as other:
        go(stopped)
        time.sleep(0.2)
        stopped.send_signal(signal.SIGSTOP)
        go(other)
        assert 100 * 0.6 <= counted(other) <= 112  # a share of a quarter would be 25


def test_each_limit_has_its_own_region(memory: int) -> None:
    """Two limits of one app would count each other's starts."""
    one, two = RateLimit(1, every_s=60.0), RateLimit(1, every_s=60.0)
    shared = SharedMemory(os.dup(memory))
    for layer in (one, two):
        layer.bind(Runtime(app="test", processes=2, shared=shared))
    assert one.ready_in_s() == 0
    twin = RateLimit(1, every_s=60.0)
    twin.bind(Runtime(app="test", processes=2, shared=SharedMemory(os.dup(memory))))
    assert twin.ready_in_s() > 59
    assert two.ready_in_s() == 0


def test_without_memfd_a_file_that_has_no_name_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memfd, as on macOS, each worker would take its share alone there."""
    monkeypatch.delattr(os, "memfd_create")
    fd = make_shared()
    assert fd is not None
    try:
        with worker(fd, "lock"):
            assert not locked(fd, 0.05)
    finally:
        os.close(fd)


def test_without_any_shared_memory_the_workers_start_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A sandbox that forbids it must not keep the workers from starting: each takes its share, as before."""

    def forbidden(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    assert make_shared() is None
    assert "Operation not permitted" in caplog.text
