"""leveret beside its peers, on one node of each server, rounds interleaved: tables, ratios, JSON, a plot.

make bench-peers BENCH_ARGS="--rounds 3 --only leveret,celery --measure publish,consume"
.venv/bin/python -m benchmarks.peers --toy        leveret and raw aio-pika, a few jobs each: whether it all still runs
.venv/bin/python -m benchmarks.peers --show benchmarks/results/X.json        an earlier run's tables; writes nothing
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import string
import sys
import time
from collections.abc import Collection, Iterable
from contextlib import ExitStack, closing
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console

from benchmarks.peers.contestants import (
    AIO_PIKA,
    CONTESTANTS,
    KINDS,
    LEVERET,
    PACKAGE,
    ROOT,
    SERVERS,
    Contestant,
    Server,
    missing,
)
from benchmarks.peers.harness import Refused
from benchmarks.peers.measures import MEASURES, UNITS, Context, Unit, entrants
from benchmarks.peers.report import Figures, draw, show, show_beside, show_goals
from benchmarks.peers.servers import Running
from leveret.settings import redact
from tests.nodes import Unavailable

RESULTS = ROOT / "benchmarks" / "results"
Turns = list[tuple[Unit, list[tuple[Contestant, str]]]]
"""Each kind of work, with who does it on which queue type."""
TOY = {
    "rounds": 2,
    "jobs": 300,
    "one_by_one": 50,
    "seconds": 0.5,
    "fails": 20,
    "sqlite_jobs": 100,
    "kept": 100,
    "measure": "publish,consume,latency,retries,sqlite,results",
    "only": f"{LEVERET.name},{AIO_PIKA.name}",
    "out": "",
}


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="contestants whose name contains one of these, with commas between")
    parser.add_argument("--measure", default="", help=f"some of {', '.join(MEASURES)}, with commas between")
    parser.add_argument(
        "--kind",
        default="",
        help="some kinds of queue, with commas between: quorum, classic (with priorities), plain (classic without: the peers), sqlite, postgresql, redis",
    )
    parser.add_argument("--jobs", type=int, default=20_000, help="a throughput measurement")
    parser.add_argument("--one-by-one", type=int, default=1000, help="most jobs that are awaited one by one")
    parser.add_argument("--seconds", type=float, default=10.0, help="of publishing for each latency")
    parser.add_argument("--memory-jobs", type=int, default=200_000)
    parser.add_argument("--delayed", type=int, default=2000)
    parser.add_argument("--due", type=int, default=5000)
    parser.add_argument("--fails", type=int, default=5000)
    parser.add_argument("--sqlite-jobs", type=int, default=5000)
    parser.add_argument("--kept", type=int, default=5000, help="jobs whose results are kept beside RabbitMQ")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "benchmarks", help="where SQLite files are made: a real disk"
    )
    parser.add_argument(
        "--out",
        default=None,
        help="where the JSON goes, in place of what is there; empty: nowhere (default: "
        "benchmarks/results/<date>-<machine>.json, with -b, -c … where that is taken)",
    )
    parser.add_argument("--toy", action="store_true", help="toy size, leveret and raw aio-pika, nothing written")
    parser.add_argument("--show", type=Path, help="print an earlier run's JSON; writes nothing")
    parser.add_argument("--plot", type=Path, help="with --show: draw it into this file")
    given = parser.parse_args()
    if given.toy:
        for name, value in TOY.items():
            if getattr(given, name) == parser.get_default(name):
                setattr(given, name, value)
    names = list(dict.fromkeys(one.name for one in CONTESTANTS))
    for option, said, known in (
        ("--measure", set(listed(given.measure)) - set(MEASURES), MEASURES),
        ("--kind", set(listed(given.kind)) - set(KINDS), KINDS),
        ("--only", {part for part in listed(given.only) if not any(part in name.lower() for name in names)}, names),
    ):
        if said:
            parser.error(f"{option}: no {', '.join(sorted(said))} here; known: {', '.join(known)}")
    if given.rounds < 1:
        parser.error(f"--rounds: at least 1, not {given.rounds}")
    if given.show is not None and not given.show.is_file():
        parser.error(f"--show: there is no file {given.show}")
    if given.plot is not None and given.show is None:
        parser.error("--plot goes with --show: a run draws beside its JSON by itself")
    return given


def listed(text: str) -> list[str]:
    """Return what stands between the commas."""
    return [one.strip().lower() for one in text.split(",") if one.strip()]


def machine() -> dict[str, str]:
    """Return what is measured on: no host's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
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
    found = result.get("servers", {"RabbitMQ": result.get("rabbitmq")})  # earlier results name one server
    servers = ", ".join(f"{name} {version}" for name, version in found.items())
    versions = "; ".join(result["versions"].values())
    return (
        f"{result['date']}: {on['processor']}, {on['cpus']} CPUs shared by broker and clients (load {on['load']} at the start), {on['system']}, "
        f"Python {on['python']}, {servers or 'no server'}; {versions}; {result['rounds']} interleaved rounds, {result['arguments']['jobs']} jobs"
    )


def output(given: argparse.Namespace, result: dict[str, Any]) -> Path | None:
    """Return where the JSON goes, if anywhere: where `--out` says, else a name that nothing bears yet."""
    if given.out is not None:
        return Path(given.out) if given.out else None
    plain = f"{result['date']}-{result['machine']['name']}"
    for name in (plain, *(f"{plain}-{letter}" for letter in string.ascii_lowercase[1:])):
        path = RESULTS / f"{name}.json"
        if not path.exists() and not path.with_suffix(".svg").exists():
            return path
    sys.exit(f"{RESULTS} has {plain}.json to -z.json: say by --out which of them may go")


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def turns(given: argparse.Namespace, here: Iterable[Contestant], without: Collection[Server] = ()) -> Turns:
    """Return what is asked for, as far as there is who does it, and on what."""
    wanted, kinds = listed(given.measure) or MEASURES, listed(given.kind)
    every = [
        (
            unit,
            [
                (one, kind)
                for one, kind in entrants(unit)
                if one in here and one.server not in without and (not kinds or kind in kinds)
            ],
        )
        for unit in UNITS
        if unit.measure in wanted and not any(server in without for server in unit.beside)
    ]
    return [(unit, who) for unit, who in every if who]


def measure(
    console: Console,
    servers: dict[Server, Running],
    given: argparse.Namespace,
    todo: Turns,
    absent: dict[str, str],
) -> tuple[dict[str, Any], Path | None]:
    """Run every unit in every round, each contestant in turn; after each round what there is is written. Return it, and where it was written."""
    here = [one for one in CONTESTANTS if any(one == who for _, each in todo for who, _ in each)]
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
        "servers": {server.name: running.version for server, running in servers.items()},
        "versions": {one.name: one.versions for one in here},
        "settings": {one.name: one.settings for one in here},
        "skipped": absent,
        "rounds": given.rounds,
        "toy": given.toy,
        "arguments": {key: value for key, value in vars(given).items() if isinstance(value, (int, float, str))},
    }
    figures, path = Figures(), None
    for number in range(given.rounds):
        for unit, who in todo:
            if number >= unit.most:
                continue
            for contestant, kind in who:
                begun = time.monotonic()
                row: dict[str, float] | str
                try:
                    row = unit.run(Context(servers, given), contestant, kind)
                except Refused as refused:
                    row = str(refused)
                figures.add(unit, contestant, kind, row)
                said = (
                    row
                    if isinstance(row, str)
                    else ", ".join(f"{value:,.1f} {unit.metrics[key]}" for key, value in row.items())
                )
                console.print(
                    f"{number + 1}/{given.rounds} {unit.name}: {contestant.name}, {kind}: {said}  [{time.monotonic() - begun:.1f} s]",
                    highlight=False,
                    markup=False,
                )
        result["figures"] = figures.as_json()
        if figures:
            path = path or output(given, result)  # now, not before: whoever ran at the same time has its name by now
            if path is not None:
                write(path, result)
    return result, path


def finish(result: dict[str, Any], plot: Path | None) -> None:
    """Print the conditions and the tables, and draw the plot where one is wanted."""
    console = Console(width=160)
    figures = Figures.of_json(result["figures"])
    heading = [f"note: {result['note']}"] if result.get("note") else []
    heading += ["toy size: these figures say nothing about speed"] if result["toy"] else []
    heading += [describe(result)]
    for line in heading:
        console.print(line, highlight=False, markup=False)
    show(console, figures)
    if not result["toy"]:
        show_beside(console, figures)
        show_goals(console, figures)
    if plot is not None:
        why = draw(figures, " ".join(heading), plot)
        console.print(why or f"plot: {plot}", highlight=False, markup=False, soft_wrap=True)


def open_server(console: Console, server: Server) -> Running | None:
    """Find the server, or start one, and say which; None where there is none."""
    try:
        running: Running = importlib.import_module(f"{PACKAGE}.{server.module}").start()
    except Unavailable as error:
        console.print(f"no {server.name} here, so nothing of it: {error}", highlight=False, markup=False)
        return None
    whose = "started for this run" if running.ours else "running already"
    console.print(f"{server.name} {running.version} at {redact(running.url)}, {whose}", highlight=False, markup=False)
    return running


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM ends it as ^C does: processes ended, queues deleted."""
    sys.exit(128 + number)


def main() -> int:
    """Measure, print, write, draw; 1 where leveret has no figure in any round (a peer that can't keep a rate is no failure), 2 where there is nothing to do."""
    given = options()
    if given.show:
        finish(json.loads(given.show.read_text()), given.plot)
        return 0
    signal.signal(signal.SIGTERM, terminate)
    console = Console(stderr=True, width=220)
    chosen = [
        one for one in CONTESTANTS if not given.only or any(part in one.name.lower() for part in listed(given.only))
    ]
    absent = {one.name: why for one in chosen if (why := missing(one))}
    for name, why in absent.items():
        console.print(f"skipped: {name}: {why}", highlight=False, markup=False)
    here = [one for one in chosen if one.name not in absent]
    todo, servers, without = turns(given, here), dict[Server, Running](), list[Server]()
    with ExitStack() as stack:
        for server in SERVERS:
            if server.module and any(
                server in unit.beside or any(one.server == server for one, _ in who) for unit, who in todo
            ):
                running = open_server(console, server)
                if running is None:
                    without.append(server)
                else:
                    servers[server] = stack.enter_context(closing(running))
        todo = turns(given, here, without)
        if not todo:
            console.print(
                "nothing to measure: nobody of --only who is here takes part in --measure on --kind",
                highlight=False,
                markup=False,
            )
            return 2
        result, path = measure(console, servers, given, todo, absent)
    if not Figures.of_json(result["figures"]):
        console.print("no figure in any round, so nothing is written", highlight=False, markup=False)
    elif path is not None:
        console.print(f"written: {path}", highlight=False, markup=False)
    finish(result, path.with_suffix(".svg") if path is not None else None)
    return 1 if any(not any(row["rounds"]) and row["contestant"] == LEVERET.name for row in result["figures"]) else 0


if __name__ == "__main__":
    sys.exit(main())
