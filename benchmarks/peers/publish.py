"""One publishing process: `python -m benchmarks.peers.publish MODULE HOW JOBS [SECONDS]`; prints JSON.

HOW: one (awaited one by one) | many (pipelined, or threads) | fill (the same without a warm-up) | paced (JOBS over SECONDS) |
spread (the same, delayed by SECONDS) | delayed (each by SECONDS) | due (JOBS that fall due evenly within 1 s, which begins after SECONDS) |
results (one by one, each until its result is here) | kept (as many; prints JSON, waits for a line of input, reads the results of all, prints JSON).
"""

from __future__ import annotations

import asyncio
import importlib
import json
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.peers.shape import RESULT, THREADS, WINDOW, Sender

WARM_UP = 50
WARM_UP_S = 1


def cpu_s() -> float:
    """Return user and system time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def run_blocking(sender: Sender, at: int, delay_s: float | None) -> Any:
    """Run a blocking publish: a coroutine that never waits."""
    try:
        sender.one(at, delay_s).__await__().send(None)
    except StopIteration as ended:
        return ended.value
    msg = "a blocking publish awaited something"
    raise RuntimeError(msg)


class Lanes:
    """Publishes many at once: in tasks, or in threads where the contestant blocks."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._loop = asyncio.get_running_loop()
        self._pool = ThreadPoolExecutor(THREADS) if sender.blocking else None
        self._window = asyncio.Semaphore(WINDOW)

    async def one(self, when: Callable[[], tuple[int, float | None]]) -> None:
        """Publish one; `when` says its time and delay at the moment of the call."""
        if self._pool is not None:
            await self._loop.run_in_executor(self._pool, lambda: run_blocking(self._sender, *when()))
            return
        async with self._window:
            await self._sender.one(*when())

    async def many(self, jobs: int) -> None:
        """Publish so many as fast as may be."""
        if self._sender.many is not None:
            await self._sender.many(jobs)
        else:
            await self.each(jobs, _forget)

    async def each(self, jobs: int, note: Callable[[Any], None]) -> None:
        """Publish so many by the call that publishes one; `note` gets what each call returned."""
        if self._pool is not None:
            each = [jobs // THREADS + (n < jobs % THREADS) for n in range(THREADS)]
            await asyncio.gather(*(self._loop.run_in_executor(self._pool, self._some, count, note) for count in each))
        else:
            left = iter(range(jobs))
            await asyncio.gather(*(self._lane(left, note) for _ in range(min(WINDOW, jobs))))

    async def _lane(self, left: Iterator[int], note: Callable[[Any], None]) -> None:
        for _ in left:
            note(await self._sender.one(*_now()))

    def _some(self, jobs: int, note: Callable[[Any], None]) -> None:
        for _ in range(jobs):
            note(run_blocking(self._sender, 0, None))


def _forget(_: Any) -> None:
    pass


def _now() -> tuple[int, float | None]:
    return time.monotonic_ns(), None


async def paced(lanes: Lanes, jobs: int, seconds: float, when: Callable[[], tuple[int, float | None]] = _now) -> None:
    """Publish evenly, whether or not the ones before are confirmed."""
    begun, tasks = time.monotonic(), set[asyncio.Task[None]]()
    for n in range(jobs):
        if (wait := begun + n * seconds / jobs - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.ensure_future(lanes.one(when))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        if not n % 100:
            await asyncio.sleep(0)
    await asyncio.gather(*tasks)


def _later(seconds: float) -> Callable[[], tuple[int, float | None]]:
    return lambda: (time.monotonic_ns() + int(seconds * 1e9), seconds)


async def spread(lanes: Lanes, jobs: int, seconds: float) -> None:
    """Publish evenly jobs that are each delayed by as long as that takes."""
    await paced(lanes, jobs, seconds, _later(seconds))


async def delayed(lanes: Lanes, jobs: int, seconds: float) -> None:
    """Publish jobs that are each delayed by so many seconds, as fast as it goes."""
    await asyncio.gather(*(lanes.one(_later(seconds)) for _ in range(jobs)))


async def due(lanes: Lanes, jobs: int, seconds: float) -> None:
    """Publish jobs that fall due evenly within the second after `seconds` from now."""
    begun = time.monotonic_ns() + int(seconds * 1e9)

    def when(n: int) -> tuple[int, float | None]:
        at = begun + n * 1_000_000_000 // jobs
        delay_s = (at - time.monotonic_ns()) / 1e9
        if delay_s <= 0:
            msg = f"publishing {jobs} delayed jobs took longer than {seconds} s: give it more"
            raise RuntimeError(msg)
        return at, delay_s

    await asyncio.gather(*(lanes.one(lambda n=n: when(n)) for n in range(jobs)))  # type: ignore[misc]


async def read(sender: Sender, handles: list[Any]) -> None:
    """Wait for the results of these jobs, and check them."""
    assert sender.read is not None
    wrong = [result for result in await sender.read(handles) if result != RESULT]
    if wrong:
        msg = f"{len(wrong)} of {len(handles)} results are wrong, such as {wrong[0]!r:.200}"
        raise RuntimeError(msg)


async def one_by_one(sender: Sender, jobs: int) -> dict[str, Any]:
    """Publish a job and wait for its result, then the next; return how long each took."""
    took_ns = list[int]()
    for _ in range(jobs):
        begun = time.monotonic_ns()
        await read(sender, [await sender.one(begun, None)])
        took_ns.append(time.monotonic_ns() - begun)
    return {"took_ns": took_ns}


async def kept(sender: Sender, lanes: Lanes, jobs: int) -> dict[str, Any]:
    """Publish, say so, and read the results once a line comes in."""
    handles = list[Any]()
    await lanes.each(WARM_UP, handles.append)
    cpu, begun = cpu_s(), time.perf_counter()
    await lanes.each(jobs, handles.append)
    took, used = time.perf_counter() - begun, cpu_s() - cpu
    print(json.dumps({"sent": len(handles), "per_s": jobs / took, "cpu_us": used / jobs * 1e6}), flush=True)
    await asyncio.to_thread(sys.stdin.readline)  # meanwhile what the contestant does beside goes on
    cpu, begun = cpu_s(), time.perf_counter()
    await read(sender, handles)
    took, used = time.perf_counter() - begun, cpu_s() - cpu
    return {"per_s": len(handles) / took, "cpu_us": used / len(handles) * 1e6}


async def run(module: str, how: str, jobs: int, seconds: float) -> dict[str, Any]:
    """Publish, and return what it took; `sent` counts warm-up jobs too."""
    contestant = importlib.import_module(module)
    async with contestant.sending() as sender:
        lanes = Lanes(sender)
        if how == "results":
            return await one_by_one(sender, jobs)
        if how == "kept":
            return await kept(sender, lanes, jobs)
        warm = 0
        if how in ("one", "many") and jobs > 1:
            warm = min(WARM_UP, jobs)
            for _ in range(warm):
                await sender.one(0, None)  # the very thread and connection that is measured
            if how == "many":
                await lanes.many(warm)
                warm *= 2
        if how in ("spread", "delayed", "due"):
            warm = 1
            await lanes.one(
                lambda: (time.monotonic_ns() + WARM_UP_S * 1_000_000_000, float(WARM_UP_S))
            )  # what delays need is declared then
        work: Awaitable[None]
        cpu, begun = cpu_s(), time.perf_counter()
        if how == "one":
            for _ in range(jobs):
                await sender.one(time.monotonic_ns(), None)
        else:
            work = (
                lanes.many(jobs)
                if how in ("many", "fill")
                else {"paced": paced, "spread": spread, "delayed": delayed, "due": due}[how](lanes, jobs, seconds)
            )
            await work
        took, used = time.perf_counter() - begun, cpu_s() - cpu
    return {"sent": jobs + warm, "per_s": jobs / took, "cpu_us": used / jobs * 1e6, "seconds": took}


def main() -> None:
    """Publish as the arguments say."""
    import uvloop

    module, how, jobs = sys.argv[1], sys.argv[2], int(sys.argv[3])
    seconds = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(run(module, how, jobs, seconds))))


if __name__ == "__main__":
    main()
