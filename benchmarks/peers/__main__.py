"""leveret beside its peers, on one RabbitMQ node, rounds interleaved: tables, ratios, JSON, a plot.

    make bench-peers BENCH_ARGS="--rounds 3 --only leveret,celery --measure publish,consume"
    python -m benchmarks.peers --toy        leveret and raw aio-pika, a few jobs each: whether it all still runs
    python -m benchmarks.peers --show benchmarks/results/X.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console

from benchmarks.peers.contestants import AIO_PIKA, HUEY, LEVERET, RABBIT, ROOT, Contestant, missing
from benchmarks.peers.harness import Broker, Refused
from benchmarks.peers.measures import MEASURES, UNITS, Context, entrants
from benchmarks.peers.report import Figures, draw, goals, show, show_goals
from tests.rabbit.node import Node, Rabbit, Unavailable, find_rabbit

RESULTS = ROOT / "benchmarks" / "results"
TOY = {
    "rounds": 2, "jobs": 300, "one_by_one": 50, "seconds": 0.5, "fails": 20, "sqlite_jobs": 100,
    "measure": "publish,consume,latency,retries,sqlite", "only": f"{LEVERET.name},{AIO_PIKA.name}", "out": "",
}


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="contestants whose name contains one of these, with commas between")
    parser.add_argument("--measure", default="", help=f"some of {', '.join(MEASURES)}, with commas between")
    parser.add_argument("--kind", default="", help="one queue type alone: quorum, classic (with priorities), plain (classic without: the peers), sqlite")
    parser.add_argument("--jobs", type=int, default=20_000, help="a throughput measurement")
    parser.add_argument("--one-by-one", type=int, default=1000, help="most jobs that are awaited one by one")
    parser.add_argument("--seconds", type=float, default=10.0, help="of publishing for each latency")
    parser.add_argument("--memory-jobs", type=int, default=200_000)
    parser.add_argument("--delayed", type=int, default=2000)
    parser.add_argument("--due", type=int, default=5000)
    parser.add_argument("--fails", type=int, default=5000)
    parser.add_argument("--sqlite-jobs", type=int, default=5000)
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks", help="where SQLite files are made: a real disk")
    parser.add_argument("--out", default=None, help="where the JSON goes; empty: nowhere (default: benchmarks/results/<date>-<machine>.json)")
    parser.add_argument("--toy", action="store_true", help="toy size, leveret and raw aio-pika, nothing written")
    parser.add_argument("--show", type=Path, help="print and draw an earlier run's JSON")
    given = parser.parse_args()
    if given.toy:
        for name, value in TOY.items():
            if getattr(given, name) == parser.get_default(name):
                setattr(given, name, value)
    unknown = {one for one in given.measure.split(",") if one} - set(MEASURES)
    if unknown:
        parser.error(f"--measure: {', '.join(sorted(unknown))} isn't one of {', '.join(MEASURES)}")
    return given


def machine() -> dict[str, str]:
    """Return what is measured on: no host's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "name": f"{platform.machine()}-{len(os.sched_getaffinity(0))}cpu",
        "processor": processor,
        "cpus": str(len(os.sched_getaffinity(0))),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def describe(result: dict[str, Any]) -> str:
    """Return a run's conditions as one line."""
    on = result["machine"]
    versions = "; ".join(result["versions"].values())
    return (
        f"{result['date']}: {on['processor']}, {on['cpus']} CPUs shared by broker and clients (load {on['load']} at the start), {on['system']}, "
        f"Python {on['python']}, RabbitMQ {result['rabbitmq']}; {versions}; {result['rounds']} interleaved rounds, {result['arguments']['jobs']} jobs"
    )


def output(given: argparse.Namespace, result: dict[str, Any]) -> Path | None:
    """Return where the JSON goes, if anywhere."""
    if given.out == "":
        return None
    return Path(given.out) if given.out else RESULTS / f"{result['date']}-{result['machine']['name']}.json"


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def measure(console: Console, broker: Broker | None, given: argparse.Namespace) -> dict[str, Any]:
    """Run every unit in every round, each contestant in turn; after each round what there is is written."""
    wanted, names = [one for one in given.measure.split(",") if one], [one.lower() for one in given.only.split(",") if one]
    units = [unit for unit in UNITS if (not wanted or unit.measure in wanted) and (broker is not None or unit.sqlite)]
    chosen = [one for one in (*RABBIT, HUEY) if not names or any(part in one.name.lower() for part in names)]
    absent = {one.name: why for one in chosen if (why := missing(one))}
    for name, why in absent.items():
        console.print(f"skipped: {name}: {why}", highlight=False, markup=False)
    here = {one.name for one in chosen if one.name not in absent}
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
        "rabbitmq": broker.version if broker is not None else "none",
        "versions": {one.name: one.versions for one in chosen if one.name in here},
        "settings": {one.name: one.settings for one in chosen if one.name in here},
        "skipped": absent,
        "rounds": given.rounds,
        "toy": given.toy,
        "arguments": {key: value for key, value in vars(given).items() if isinstance(value, (int, float, str))},
    }
    figures, used = Figures(), set[tuple[Contestant, str]]()
    try:
        for number in range(given.rounds):
            for unit in units:
                if number >= unit.most:
                    continue
                for contestant, kind in entrants(unit):
                    if contestant.name not in here or given.kind not in ("", kind):
                        continue
                    if not unit.sqlite:
                        used.add((contestant, kind))
                    begun = time.monotonic()
                    row: dict[str, float] | str
                    try:
                        row = unit.run(Context(broker, given), contestant, kind)  # type: ignore[arg-type]
                    except Refused as refused:
                        row = str(refused)
                    figures.add(unit, contestant, kind, row)
                    said = row if isinstance(row, str) else ", ".join(f"{value:,.1f} {unit.metrics[key]}" for key, value in row.items())
                    console.print(
                        f"{number + 1}/{given.rounds} {unit.name}: {contestant.name}, {kind}: {said}  [{time.monotonic() - begun:.1f} s]",
                        highlight=False, markup=False,
                    )
            result["figures"] = figures.as_json()
            if (path := output(given, result)) is not None:
                write(path, result)
    finally:
        if broker is not None:
            for contestant, kind in used:
                broker.delete(contestant, kind)
    return result


def finish(result: dict[str, Any], path: Path | None) -> None:
    """Print the tables, and draw beside the JSON."""
    console = Console(width=150)
    figures = Figures.of_json(result["figures"])
    console.print(describe(result), highlight=False, markup=False)
    show(console, figures)
    if not result["toy"]:
        show_goals(console, goals(figures))
    if path is not None and (why := draw(figures, describe(result), path.with_suffix(".svg"))):
        console.print(why, highlight=False, markup=False)


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM ends it as ^C does: processes ended, queues deleted."""
    sys.exit(128 + number)


def main() -> int:
    """Measure, print, write, draw; 1 where leveret has no figure in any round: a peer that can't keep a rate is no failure."""
    given = options()
    if given.show:
        finish(json.loads(given.show.read_text()), given.show)
        return 0
    signal.signal(signal.SIGTERM, terminate)
    console = Console(stderr=True, width=220)
    node: Node | Rabbit | None = None
    try:
        found = find_rabbit()
        node = found if isinstance(found, Rabbit) else Node(found)
        if isinstance(node, Node):
            asyncio.run(node.start())
    except Unavailable as error:
        console.print(f"no RabbitMQ here, SQLite only: {error}", highlight=False, markup=False)
    try:
        result = measure(console, Broker(node.url) if node is not None else None, given)
    finally:
        if node is not None:
            asyncio.run(node.close())
    path = output(given, result)
    if path is not None:
        console.print(f"written: {path}", highlight=False, markup=False)
    finish(result, path)
    return 1 if any(not any(row["rounds"]) and row["contestant"] == LEVERET.name for row in result["figures"]) else 0


if __name__ == "__main__":
    sys.exit(main())
