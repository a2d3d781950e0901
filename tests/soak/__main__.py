"""Run the soak: 0 if no confirmed job was lost and the memory of a worker that lived through all of it stayed flat.

It publishes 100 jobs a second to three workers, each on a node of its own at first. A script, made of the seed, kills nodes and closes their
connections, hangs them, cuts them off, and rolls or kills all workers but the first; each fault is over, and the cluster whole, before the next.
Counts, throughput and memory go to a JSON file and, where matplotlib is, to a chart beside it.
"""

import argparse
import asyncio
import importlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

from tests.fault.bench import Bench, Worker
from tests.fault.load import Counts, Load
from tests.nodes import Unavailable
from tests.rabbit.cluster import Cluster
from tests.rabbit.network import NoNetwork
from tests.rabbit.node import SUITES, installation_of

RATE = 100
GROWTH_MIB = 5.0
"""What a worker may have more in the last quarter of its life than in the second, once all that it ever needs is loaded."""
_BUILD = Path(__file__).parents[2] / "build"


@dataclass(frozen=True)
class Struck:
    """One fault."""

    what: str
    at_s: float
    until_s: float


@dataclass
class Soak:
    """The running soak: its parts, and what was seen of them."""

    cluster: Cluster
    bench: Bench
    rng: random.Random
    workers: list[Worker] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    faults: list[Struck] = field(default_factory=list)
    memory: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    """MiB of each worker by its process id, and when."""

    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    async def hire(self, place: int) -> Worker:
        """Start a worker; each begins on another node, so that each node that is struck has clients."""
        return await self.bench.working(url=_with_heartbeat(self.cluster.url_from(self.cluster.nodes[place])))

    async def break_things(self, ends_s: float) -> None:
        """Strike one fault after the other until `ends_s`."""
        kinds = (
            self.kill_node,
            self.kill_node,
            self.close_connections,
            self.hang_node,
            self.part_node,
            self.roll,
            self.kill_worker,
        )
        queue: list[Callable[[], Awaitable[str]]] = []
        while self.now() < ends_s - 15:  # the last one is to be over, too
            await asyncio.sleep(self.rng.uniform(3, 8))
            if not queue:
                queue = self.rng.sample(kinds, len(kinds))
            at_s = self.now()
            what = await queue.pop()()
            await self.cluster.whole()
            self.faults.append(Struck(what, at_s, self.now()))
            print(f"{at_s:7.1f} s: {what}, over after {self.now() - at_s:.1f} s", flush=True)

    async def kill_node(self) -> str:
        """A node dies and comes back."""
        node = self.rng.choice(self.cluster.nodes)
        await node.kill9()
        await asyncio.sleep(self.rng.uniform(0, 6))
        await node.start()
        return "node killed"

    async def close_connections(self) -> str:
        """An administrator closes all connections."""
        await self.rng.choice(self.cluster.nodes).close_connections()
        return "connections closed"

    async def hang_node(self) -> str:
        """A node hangs and goes on."""
        node, seconds = self.rng.choice(self.cluster.nodes), self.rng.uniform(2, 15)
        node.pause()
        await asyncio.sleep(seconds)
        node.resume()
        return f"node hung {seconds:.0f} s"

    async def part_node(self) -> str:
        """A node is cut from its peers; clients still reach it."""
        node, seconds = self.rng.choice(self.cluster.nodes), self.rng.uniform(2, 20)
        self.cluster.isolate(node)
        await asyncio.sleep(seconds)
        self.cluster.heal()
        return f"node parted {seconds:.0f} s"

    async def roll(self) -> str:
        """All workers but the first are told to stop, one by one, each replaced first."""
        for place in range(1, len(self.workers)):
            old, self.workers[place] = self.workers[place], await self.hire(place)
            await old.drained()
        return "workers rolled"

    async def kill_worker(self) -> str:
        """A worker dies, and another takes its place."""
        place = self.rng.randrange(1, len(self.workers))
        await asyncio.to_thread(self.workers[place].kill9)
        self.workers[place] = await self.hire(place)
        return "worker killed"

    async def watch(self) -> None:
        """Note each worker's memory once a second."""
        while True:
            for worker in self.workers:
                if worker.process.poll() is None:
                    self.memory.setdefault(worker.process.pid, []).append((self.now(), worker.resident_kib / 1024))
            await asyncio.sleep(1)

    def growth_mib(self) -> float:
        """By how much the first worker grew between the second and the last quarter."""
        seen = [mib for _, mib in self.memory[self.workers[0].process.pid]]
        quarter = max(1, len(seen) // 4)
        return median(seen[-quarter:]) - median(seen[quarter : 2 * quarter] or seen)

    def throughput(self) -> list[int]:
        """Jobs that ended in each second."""
        ended = Counter(int(float(words[4]) - self.began) for words in self.bench.recorder.lines("end"))
        return [ended[second] for second in range(max(ended, default=0) + 1)]


def _with_heartbeat(urls: str) -> str:
    return ",".join(f"{url}?heartbeat_s=5" for url in urls.split(","))


async def soak(cluster: Cluster, folder: Path, minutes: float, seed: int) -> tuple[Soak, Counts, Counter[str]]:
    """Start everything, break things for `minutes`, and wait until what was confirmed has run."""
    await cluster.start()
    bench = Bench(folder, _with_heartbeat(cluster.url))
    try:
        running = Soak(cluster, bench, random.Random(seed))
        running.workers = [await running.hire(place) for place in range(len(cluster.nodes))]
        watching = asyncio.create_task(running.watch())
        load = Load(bench, rate=RATE)
        try:
            async with load:
                await running.break_things(minutes * 60)
                await asyncio.sleep(max(0, minutes * 60 - running.now()))
        except AssertionError as error:  # not all of it ran: the counts say how much
            print(str(error)[-4000:], file=sys.stderr)
        watching.cancel()
        return running, load.counts(), load.refused
    finally:
        bench.close()
        (_BUILD / "soak.log").write_text(bench.logs)


def draw(result: dict[str, object], running: Soak, path: Path) -> str | None:
    """Draw throughput, memory and faults over time into `path`; return why not, where matplotlib is missing."""
    try:  # by name: the checkers run in environments with it and without
        importlib.import_module("matplotlib").use("svg")
    except ImportError:
        return "no chart: matplotlib isn't here (`make soak` installs it)"
    plt = importlib.import_module("matplotlib.pyplot")
    figure, (jobs, memory) = plt.subplots(
        2, 1, figsize=(14, 6), sharex=True, layout="constrained", height_ratios=[2, 1]
    )
    throughput = running.throughput()
    jobs.plot(range(len(throughput)), throughput, color="#c2410c", linewidth=1)
    jobs.set_ylabel("jobs ended per second")
    jobs.set_ylim(bottom=0)
    for struck in running.faults:
        for axis in (jobs, memory):
            axis.axvspan(struck.at_s, struck.until_s, color="#94a3b8", alpha=0.3, linewidth=0)
        jobs.text(struck.at_s, 1, struck.what, rotation=90, fontsize=6, va="top", transform=jobs.get_xaxis_transform())
    for seen in running.memory.values():
        memory.plot(*zip(*seen, strict=True), linewidth=1)
    memory.set_ylabel("MiB of each worker")
    memory.set_ylim(0, 1.2 * memory.get_ylim()[1])
    memory.set_xlabel("seconds")
    for axis in (jobs, memory):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"RabbitMQ {result['rabbitmq']}, three nodes, seed {result['seed']}: {result['verdict']}", fontsize=9
    )
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return None


def main() -> int:
    """Run the soak and write what it showed."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--version", default=os.environ.get("LEVERET_TEST_RABBIT", "4.3"), choices=list(SUITES))
    parser.add_argument("--out", type=Path, default=_BUILD / "soak.json")
    arguments = parser.parse_args()
    _BUILD.mkdir(exist_ok=True)

    async def run(cluster: Cluster, folder: Path) -> tuple[Soak, Counts, Counter[str]]:
        try:
            return await soak(cluster, folder, arguments.minutes, arguments.seed)
        finally:
            await cluster.close()

    try:
        installation = installation_of(arguments.version)
        with tempfile.TemporaryDirectory(prefix="leveret-soak-") as folder:
            cluster = Cluster(installation)
            running, counts, refused = asyncio.run(run(cluster, Path(folder)))
            growth = running.growth_mib()
            result: dict[str, object] = {
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "rabbitmq": installation.version,
                "seed": arguments.seed,
                "minutes": arguments.minutes,
                "verdict": f"{counts}; the worker that lived through all grew by {growth:.1f} MiB",
                "counts": asdict(counts),
                "refused": dict(refused),
                "growth_mib": round(growth, 1),
                "faults": [asdict(struck) for struck in running.faults],
                "ended_per_s": running.throughput(),
                "memory_mib": list(running.memory.values()),
            }
            problem = draw(result, running, arguments.out.with_suffix(".svg"))
    except (Unavailable, NoNetwork) as error:
        print(f"no soak: {error}", file=sys.stderr)
        return 1
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['verdict']}\nwritten to {arguments.out}{f'; {problem}' if problem else ''}")
    return counts.lost + counts.strange > 0 or growth > GROWTH_MIB


if __name__ == "__main__":
    sys.exit(main())
