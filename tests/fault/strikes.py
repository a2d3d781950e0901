"""Kills of four workers and of their server under a load, and which repeated runs they excuse."""

import asyncio
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from tests.fault.bench import PATIENCE_S, Bench, Worker, eventually
from tests.fault.load import Load

JOBS = int(os.environ.get("LEVERET_KILL_JOBS", "1000"))
"""Under how many jobs workers and server are killed; from 10 000 on, ten workers are killed instead of four."""
RATE = 500 if JOBS >= 10_000 else 100
"""How many jobs are published a second meanwhile."""
SLOW_S = 2.0
"""What a slow machine may add to a promised time, seconds."""


class Server(Protocol):
    """What is killed and started again."""

    async def kill9(self) -> None: ...

    async def start(self) -> None: ...


@dataclass(frozen=True)
class Strike:
    """A kill: of a worker's process, or of the server (None), which is back at `until_s`; both of the machine's monotonic clock."""

    process: int | None
    at_s: float
    until_s: float

    def excuses(self, process: int, start_s: float, end_s: float) -> bool:
        """Whether a run of a job ran then, or had ended just before, so that it was perhaps not settled."""
        return self.process in {None, process} and start_s <= self.until_s and end_s >= self.at_s - SLOW_S


def unexcused(lines: Iterable[list[str]], strikes: list[Strike]) -> list[str]:
    """Return the jobs that ran once more although no strike hit the run before."""
    runs: defaultdict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for verb, job, _, process, at_s in lines:
        if verb == "start":
            runs[job].append((int(process), float(at_s), math.inf))
        else:
            place = next(n for n, run in enumerate(runs[job]) if run[0] == int(process) and run[2] == math.inf)
            runs[job][place] = (*runs[job][place][:2], float(at_s))
    return [job for job, ran in runs.items() if not all(any(one.excuses(*run) for one in strikes) for run in ran[:-1])]


async def kill_one(made: Bench, victim: Worker, taken_back: Callable[[], Awaitable[bool]]) -> tuple[Strike, float]:
    """Kill a worker while it runs jobs, and wait until all that it held is done: a job that two kills hit would run alone, later.

    `taken_back` says whether three workers are left, and none has a job of a dead one.
    Return the strike, and after how many seconds the last of the jobs that ran began again elsewhere.
    """
    process = victim.process.pid

    def running() -> set[str]:
        lines = made.recorder.lines()
        begun = {words[1] for words in lines if words[0] == "start" and int(words[3]) == process}
        return begun - {words[1] for words in lines if words[0] == "end"}

    await eventually(lambda: bool(running()), lambda: made.logs, every_s=0.1)
    at_s = time.monotonic()
    await asyncio.to_thread(victim.kill9)
    strike, left = Strike(process, at_s, time.monotonic()), running()
    await eventually(lambda: not running(), lambda: f"{running()}; {made.logs}", every_s=0.1)
    starts_s = [float(words[4]) for words in made.recorder.lines("start") if words[1] in left]
    async with asyncio.timeout(PATIENCE_S):
        while not await taken_back():
            await asyncio.sleep(0.05)
    return strike, max(starts_s, default=at_s) - at_s


async def kill_all_in_turn(
    made: Bench, server: Server, taken_back: Callable[[], Awaitable[bool]], within_s: float
) -> None:
    """Kill workers and the server under a load, and see that nothing is lost and that only what ran at a kill runs again.

    Each job that a killed worker ran begins elsewhere `within_s`.
    """
    rng, many = random.Random(21), JOBS >= 10_000
    workers = [await made.working() for _ in range(4)]
    strikes, waits_s = list[Strike](), list[float]()
    script = (["worker"] * (5 if many else 2) + ["server"]) * 2
    async with Load(made, rate=RATE, seconds=0.2) as load:
        for number, victim in enumerate(script, 1):
            enough = number * JOBS // (len(script) + 1)
            await eventually(lambda: len(load.confirmed) >= enough, lambda: str(load.counts()), timeout_s=90)  # noqa: B023 - awaited at once
            if victim == "server":
                at_s = time.monotonic()
                await server.kill9()
                await server.start()
                strikes.append(Strike(None, at_s, time.monotonic()))
            else:
                killed = workers.pop(rng.randrange(4))
                strike, wait_s = await kill_one(made, killed, taken_back)
                strikes.append(strike)
                waits_s.append(wait_s)
                workers.append(await made.working())
        await eventually(lambda: len(load.confirmed) >= JOBS, lambda: str(load.counts()), timeout_s=90)
    await made.until_empty()

    counts = load.counts()
    assert (counts.lost, counts.strange) == (0, 0)
    assert counts.late_s < SLOW_S, "each publish has its answer in time"
    assert counts.repeated > 0, "no kill hit a running job: it proves nothing"
    assert unexcused(made.recorder.lines(), strikes) == []
    assert max(waits_s) < within_s
