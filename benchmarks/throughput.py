"""Confirmed publishes/s and consumed jobs/s of each broker, beside raw aio-pika on the same node.

    python benchmarks/throughput.py [--jobs N] [--rounds N] [--only TEXT] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contestant import CONTESTANTS  # noqa: E402 - the root must be on the path first
from tests.rabbit.node import Node, Rabbit, Unavailable, find_rabbit  # noqa: E402

MEASURES = ("publish one by one", "publish pipelined", "consume")


def measure(name: str, jobs: int, url: str) -> dict[str, Any]:
    """Run one contestant in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.contestant", name, str(jobs), url], cwd=ROOT, capture_output=True, text=True, check=False, timeout=900
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine(rabbit: str) -> str:
    """Return what was measured on what."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("leveret", "aio-pika", "msgspec", "uvloop"))
    processor = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return f"Python {platform.python_version()}, {packages}, {rabbit}, {platform.system()} {platform.machine()} {processor}"


def run(arguments: argparse.Namespace, rabbit_url: str | None, rabbit: str) -> dict[str, Any]:
    """Run all rounds, interleaved; return every figure."""
    names = [name for name in CONTESTANTS if arguments.only in name and (rabbit_url or "rabbitmq" not in name)]
    found: dict[str, dict[str, list[dict[str, float]]]] = {name: {one: [] for one in MEASURES} for name in names}
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for name in names:
                console.print(f"round {number + 1} of {arguments.rounds}: {name}", highlight=False)
                if "rabbitmq" in name:
                    url = str(rabbit_url)
                else:
                    url = f"sqlite:///{folder}/{number}.db" if "sqlite" in name else "memory://bench"
                for one, row in measure(name, arguments.jobs, url).items():
                    found[name][one].append(row)
    return {"machine": machine(rabbit), "jobs": arguments.jobs, "rounds": arguments.rounds, "found": found}


def show(result: dict[str, Any]) -> None:
    """Print medians with minimum and maximum."""
    table = Table(title=f"{result['jobs']} jobs, medians of {result['rounds']} interleaved rounds (minimum–maximum); CPU µs a job of the client")
    table.add_column("")
    for one in MEASURES:
        table.add_column(f"{one} /s", justify="right")
        table.add_column("CPU µs", justify="right")
    for name, measures in result["found"].items():
        cells: list[str] = []
        for one in MEASURES:
            rates = [row["per_s"] for row in measures[one]]
            cells.append(f"{statistics.median(rates):,.0f} ({min(rates):,.0f}–{max(rates):,.0f})")
            cells.append(f"{statistics.median(row['cpu_us'] for row in measures[one]):.1f}")
        table.add_row(name, *cells)
    console = Console(width=180)
    console.print(table)
    console.print(result["machine"], highlight=False)


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="contestants whose name contains this")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    node: Node | Rabbit | None = None
    rabbit = "no RabbitMQ"
    try:
        found = find_rabbit()
        if isinstance(found, Rabbit):
            node, rabbit = found, "a RabbitMQ that was given"
        else:
            node = Node(found)
            asyncio.run(node.start())
            rabbit = f"a private RabbitMQ node ({found})"
    except Unavailable as error:
        print(f"no RabbitMQ here, sqlite and memory only: {error}", file=sys.stderr)
    try:
        result = run(arguments, node.url if node is not None else None, rabbit)
    finally:
        if node is not None:
            asyncio.run(node.close())
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)


if __name__ == "__main__":
    main()
