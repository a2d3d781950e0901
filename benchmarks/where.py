"""Where a job's time goes in our process: `python -m benchmarks.where URL [JOBS]`; a sampling profile by file and by function.

A timer of the process's own CPU time interrupts it every few milliseconds, and the function that runs is noted; a call into C
(a system call, msgspec, uvloop) counts for the Python function that made it. Unlike a tracing profiler that costs nothing
between samples, so that small functions aren't made to look large.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Self

from leveret import App, Job, Queue
from leveret.consuming.worker import working
from leveret.middleware import RateLimit, Retries, Timeout, Tracing
from leveret.process.loop import run_loop
from leveret.schemes import broker_module

EACH_S = 0.001
"""Asked for; the kernel's own tick (often 4 ms) is the least, so that shares are scaled to the time that was really used."""
WARM_UP = 1000


class Invoice(Job, name="invoice.send", queue=Queue("bench.where")):
    """About 200 bytes with its field names."""

    order_id: int
    email: str = "a@example.org"
    subject: str = "hello"
    text: str = "x" * 120
    tags: tuple[str, ...] = ("a", "b")


class Samples:
    """Functions, by how often they were found running."""

    def __init__(self) -> None:
        self.functions: Counter[tuple[str, str]] = Counter()
        self.cpu_s = 0.0

    def __enter__(self) -> Self:
        self.cpu_s = -time.process_time()
        signal.signal(signal.SIGPROF, self._note)
        signal.setitimer(signal.ITIMER_PROF, EACH_S, EACH_S)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        self.cpu_s += time.process_time()

    def _note(self, _: int, frame: FrameType | None) -> None:
        if frame is not None:
            self.functions[_place(frame.f_code.co_filename), frame.f_code.co_qualname] += 1


def _place(file: str) -> str:
    parts = Path(file).parts
    if "leveret" in parts:
        return "/".join(parts[len(parts) - parts[::-1].index("leveret") :])
    return f"python: {parts[-2]}/{parts[-1]}" if len(parts) > 1 else file


def show(what: str, found: Samples, jobs: int) -> None:
    """Print shares and microseconds per job, by file and by function."""
    functions, total = found.functions, found.functions.total()
    files: Counter[str] = Counter()
    for (file, _), samples in functions.items():
        files[file] += samples
    each_us = found.cpu_s / jobs * 1e6
    print(f"\n{what}: {each_us:.1f} CPU us per job, {total} samples\n")
    for file, samples in files.most_common(16):
        print(f"{samples / total:6.1%}  {samples / total * each_us:5.2f} us  {file}")
    print()
    for (file, function), samples in functions.most_common(24):
        print(f"{samples / total:6.1%}  {samples / total * each_us:5.2f} us  {function}  ({file})")


async def profiled(jobs: int, url: str) -> None:
    """Publish `jobs` pipelined, then consume them with the standard chain."""
    app = App("bench", broker=url, middleware=[Tracing(), Retries(max_attempts=5), RateLimit(1e9), Timeout(30)])
    left, finished = jobs + WARM_UP, asyncio.Event()

    @app.handler
    async def send(job: Invoice) -> None:
        nonlocal left
        left -= 1
        if not left:
            finished.set()

    admin = broker_module(url).open_admin(url, app.runtime())
    for handler in app.handlers():
        await admin.purge(handler.queue)
    await admin.close()
    async with app.publisher() as publisher:
        await publisher.publish_many([Invoice(n) for n in range(WARM_UP)], timeout_s=60)
        with Samples() as published:
            await publisher.publish_many((Invoice(n) for n in range(jobs)), timeout_s=300)
    with Samples() as consumed:
        async with working(app):
            await finished.wait()
    show("publish pipelined", published, jobs)
    show("consume, standard chain", consumed, jobs + WARM_UP)


def main() -> None:
    """Profile on the RabbitMQ whose URL is given."""
    if len(sys.argv) < 2 or not sys.argv[1].startswith("amqp") or not all(text.isdecimal() for text in sys.argv[2:]):
        sys.exit(
            "usage: python -m benchmarks.where amqp://… [JOBS]; from the clone's folder, with its .venv. Below 100 000 jobs there are few samples"
        )
    run_loop(profiled(int(sys.argv[2]) if len(sys.argv) > 2 else 100_000, sys.argv[1]))


if __name__ == "__main__":
    main()
