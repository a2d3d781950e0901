"""Run the PostgreSQL broker at scale: 0 if it holds.

waiting  a backlog of 10 million beside one of 10 thousand: claims, publishing, a worker's memory, `leveret queues`
bloat    a snapshot that is held for 10 minutes at 1 000 jobs a second, and what is left of it
day      10 million jobs as fast as they go: what the tables take in the end

--part 0.01 makes a hundredth of all that, and the pauses of autovacuum shorter alike. It fails only by what doesn't depend on how fast
the machine is. The figures, with what they must be, go to the terminal and to a JSON file.
"""

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Self

import asyncpg

from leveret import BrokerUnavailable
from tests.nodes import Unavailable
from tests.postgres.installation import Installation
from tests.postgres.node import Node, find_postgres
from tests.scale.figures import Figure, Report, percentile
from tests.scale.site import PREFIX, Site, site

SMALL, BIG = 10_000, 10_000_000
ROUNDS, MANY = 10, 2000
"""How often so many jobs are published, to measure it."""
RATE = 1000
RUSH = 20_000
HELD_S = 600.0
NAP_S = 60
"""autovacuum_naptime of a new server."""
FEW = 5000
"""So many dead rows of a table no vacuum is worth: `autovacuum_vacuum_threshold` of leveret's tables."""
_BUILD = Path(__file__).parents[2] / "build"


async def waiting(node: Node, folder: Path, part: float, report: Report) -> None:
    """Compare a long queue with a short one, in turns, so that a busy machine is alike for both."""
    many = max(2 * SMALL, int(BIG * part))
    async with site(node, folder) as short, site(node, folder) as long:
        began = time.monotonic()
        await long.fill(many)
        report.add(Figure(f"{many:,} jobs wait after", time.monotonic() - began, "s"))
        report.add(Figure(f"tables with {many:,} waiting", await long.size_mib(), "MiB"))
        rates = await _publishing(short, long)
        for name, rate in zip((f"{SMALL:,}", f"{many:,}"), rates, strict=True):
            report.add(Figure(f"publish_many with {name} waiting", rate, "jobs/s"))
        report.add(Figure("publishing, long queue : short queue", rates[1] / rates[0], "", at_least=0.9))
        began = time.monotonic()
        try:
            ready = (await long.bench.depth()).ready
        except BrokerUnavailable as error:
            print(error)
            ready = 0
        report.add(Figure(f"`queues` with {many:,} waiting", time.monotonic() - began, "s", at_most=5.0))
        missing = many + ROUNDS * MANY - ready
        report.add(Figure("jobs that wait and aren't in `queues`", missing, "", at_most=0, timed=False))
        await _claims(short, long, rounds=3 if part < 0.1 else 20, report=report)
        await _memory(long, max(20_000, int(BIG * part / 10)), report)


async def _publishing(short: Site, long: Site) -> tuple[float, float]:
    """Return the rates of `publish_many` to both."""
    seen: dict[Site, list[float]] = {short: [], long: []}
    async with short.counting.app.publisher() as one, long.counting.app.publisher() as other:
        for _ in range(ROUNDS):
            await short.fill(SMALL)
            for queue, publisher in ((short, one), (long, other)):
                seen[queue].append(await queue.publish(publisher, MANY))
    return median(seen[short]), median(seen[long])


async def _claims(short: Site, long: Site, rounds: int, report: Report) -> None:
    """Let a worker run most of the short queue, and as many of the long one."""
    took: dict[Site, list[float]] = {short: [], long: []}
    for _ in range(rounds):
        await short.fill(SMALL)
        for queue in (short, long):
            before = queue.counting.runs
            async with queue.claims(took[queue]), queue.worker():
                await queue.until_runs(before + SMALL * 4 // 5)
    worst = {queue: percentile(took[queue], 0.99) for queue in took}
    for name, queue in (("short", short), ("long", long)):
        report.add(Figure(f"claims of the {name} queue that were timed", len(took[queue]), ""))
        report.add(Figure(f"a claim of the {name} queue, p50", percentile(took[queue], 0.5), "ms"))
        report.add(Figure(f"a claim of the {name} queue, p99", worst[queue], "ms"))
    report.add(Figure("a claim's p99, long queue : short queue", worst[long] / worst[short], "", at_most=3.0))


async def _memory(long: Site, jobs: int, report: Report) -> None:
    """Watch a worker that has a long queue before it."""
    before = long.counting.runs
    async with long.worker() as worker:
        await long.until_runs(before + jobs // 5)
        early_kib, began, runs = worker.resident_kib, time.monotonic(), long.counting.runs
        await long.until_runs(before + jobs)
        rate = (long.counting.runs - runs) / (time.monotonic() - began)
        late_kib = worker.resident_kib
    report.add(Figure("a worker on the long queue", rate, "jobs/s"))
    report.add(Figure("its memory", late_kib / 1024, "MiB"))
    growth = (late_kib - early_kib) / 1024
    report.add(Figure(f"its growth over {jobs * 4 // 5:,} jobs", growth, "MiB", at_most=5.0, timed=False))


class Stream:
    """Publishes `RATE` jobs a second until the block ends."""

    def __init__(self, where: Site) -> None:
        self.published = 0
        self._site = where
        self._over = False

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._publish())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        await self._task

    async def _publish(self) -> None:
        began, mail = time.monotonic(), self._site.counting.Mail
        async with self._site.counting.app.publisher() as publisher:
            while not self._over:
                due = int((time.monotonic() - began) * RATE) - self.published
                jobs = [mail(time.monotonic()) for _ in range(min(due, RATE))]
                await publisher.publish_many(jobs, timeout_s=60)
                self.published += len(jobs)
                await asyncio.sleep(0.01)

    async def run(self, seconds: float) -> float:
        """Let it run; return how many jobs a second were run meanwhile."""
        runs, began = self._site.counting.runs, time.monotonic()
        await asyncio.sleep(seconds)
        return (self._site.counting.runs - runs) / (time.monotonic() - began)


async def bloat(node: Node, folder: Path, part: float, report: Report) -> None:
    """Hold a snapshot under a steady load, and see what goes when it ends."""
    seconds, nap_s = max(10.0, HELD_S * part), _nap_s(part)
    async with site(node, folder) as where, where.worker():
        async with Stream(where) as stream:
            await stream.run(2.0)
            await _calm(where, stream, max(5.0, seconds / 10), report)
            holder = await asyncpg.connect(where.url)
            await holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM leveret.jobs")
            await stream.run(seconds * 3 / 4)
            await _held(where, stream, seconds / 4, report)
        published = stream.published
        await where.until_runs(published, 120)
        rush, published = await _rush(where), published + RUSH
        peak = await where.size_mib()
        report.add(Figure("dead rows at the snapshot's end", await where.dead_rows(), ""))
        report.add(Figure("tables at the snapshot's end", peak, "MiB"))
        await holder.close()
        gone_s, left = await _until_cleared(where, 3 * nap_s + 60), await where.dead_rows()
        report.add(Figure("dead rows after the vacuum", left, "", at_most=3 * FEW, timed=False))
        report.add(Figure("the dead rows were gone after", gone_s, "s", at_most=nap_s + 15))
        later, published = await _rush(where), published + RUSH
        report.add(Figure(f"a rush of {RUSH:,} jobs with the snapshot", rush, "jobs/s"))
        report.add(Figure("the same rush : one after the vacuum", rush / later, "", at_least=0.5))
        async with Stream(where) as stream:
            await stream.run(seconds)
        published += stream.published
        await where.until_runs(published, 120)
        again, goal = await where.size_mib(), 1.1 * peak  # what was added, and isn't cleared yet
        report.add(Figure("tables after as many jobs once more", again, "MiB", at_most=goal, timed=False))
        missing = published - where.counting.runs
        report.add(Figure("jobs that didn't run", missing, "", at_most=0, timed=False))


async def _calm(where: Site, stream: Stream, seconds: float, report: Report) -> None:
    took_ms = list[float]()
    where.counting.slowest_s()
    async with where.claims(took_ms):
        rate = await stream.run(seconds)
    report.add(Figure("jobs run without a snapshot", rate, "jobs/s"))
    report.add(Figure("from publish to handler, slowest", where.counting.slowest_s(), "s"))
    report.add(Figure("a claim, p99", percentile(took_ms, 0.99), "ms"))


async def _held(where: Site, stream: Stream, seconds: float, report: Report) -> None:
    took_ms = list[float]()
    where.counting.slowest_s()
    async with where.claims(took_ms):
        rate = await stream.run(seconds)
    behind = stream.published - where.counting.runs
    report.add(Figure("jobs run at the end of the time with a snapshot", rate, "jobs/s", at_least=0.95 * RATE))
    report.add(Figure("jobs that wait then", behind, "", at_most=RATE))
    report.add(Figure("from publish to handler then, slowest", where.counting.slowest_s(), "s"))
    report.add(Figure("a claim then, p99", percentile(took_ms, 0.99), "ms", at_most=50.0))
    report.add(Figure("a claim then, slowest", max(took_ms), "ms"))


async def _rush(where: Site) -> float:
    """Publish and run jobs as fast as it goes; return how many a second."""
    runs, began = where.counting.runs, time.monotonic()
    async with where.counting.app.publisher() as publisher:
        await where.publish(publisher, RUSH)
    await where.until_runs(runs + RUSH)
    return RUSH / (time.monotonic() - began)


async def _until_cleared(where: Site, limit_s: float) -> float:
    """Return after how many seconds a vacuum has removed the dead rows."""
    began = time.monotonic()
    while await where.dead_rows() > FEW and time.monotonic() - began < limit_s:
        await asyncio.sleep(0.2)
    return time.monotonic() - began


async def day(node: Node, folder: Path, part: float, report: Report) -> None:
    """Publish and run all jobs of a busy day, one after another as fast as it goes."""
    jobs, peak = max(2 * SMALL, int(BIG * part)), 0.0
    async with site(node, folder) as where, where.worker(), where.counting.app.publisher() as publisher:
        began = looked = time.monotonic()
        for published in range(0, jobs, 1000):
            await where.until_runs(published - 2 * SMALL)
            await where.publish(publisher, 1000)
            if time.monotonic() - looked > 1:
                peak, looked = max(peak, await where.size_mib()), time.monotonic()
        await where.until_runs(jobs)
        took_s = time.monotonic() - began
        peak = max(peak, await where.size_mib())
        await _until_cleared(where, 3 * _nap_s(part) + 60)
        end = await where.size_mib()
        report.add(Figure(f"{jobs:,} jobs, published and run at once", jobs / took_s, "jobs/s"))
        report.add(Figure("tables at their largest", peak, "MiB"))
        report.add(Figure("tables in the end", end, "MiB", at_most=100.0, timed=False))
        report.add(Figure("jobs run more than once", where.counting.runs - jobs, "", at_most=0, timed=False))


def _nap_s(part: float) -> int:
    return max(1, round(NAP_S * part))


PARTS = {"waiting": waiting, "bloat": bloat, "day": day}


async def scale(installation: Installation, names: list[str], part: float, report: Report) -> None:
    """Measure on a private server, which syncs each commit to the disk."""
    conf: dict[str, str | int] = {
        "autovacuum_naptime": _nap_s(part),
        "log_line_prefix": PREFIX,
        "log_parameter_max_length": 0,
    }
    node = Node(installation, conf=conf)
    with tempfile.TemporaryDirectory(prefix="leveret-scale-") as folder:
        try:
            await node.start()
            for name in names:
                print(f"\n{name}", flush=True)
                await PARTS[name](node, Path(folder), part, report)
        finally:
            await node.close()


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=float, default=1.0)
    parser.add_argument("--only", choices=list(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--out", type=Path, default=_BUILD / "scale.json")
    arguments = parser.parse_args()
    report = Report()
    try:
        found = find_postgres()
        if not isinstance(found, Installation):
            raise Unavailable(f"it reads the server's log: {found.why_no_levers}")
        asyncio.run(scale(found, arguments.only, arguments.part, report))
    except Unavailable as error:
        print(f"nothing measured: {error}", file=sys.stderr)
        return 1
    missed = report.missed(timed=arguments.part >= 1)
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "postgresql": found.major,
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, {platform.platform()}",
        "part": arguments.part,
        "missed": missed,
        "figures": report.rows(),
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{'missed: ' + '; '.join(missed) if missed else 'all held'}\nwritten to {arguments.out}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
