"""1 000 jobs a second while their job store is broken: `.venv/bin/python -m benchmarks.broken_store [killed frozen full slow]`.

One process publishes and works, on a broker in memory; each job has a result. Its store is a PostgreSQL of its own, which after a
while is killed (-9), frozen (stopped by a signal), full (each write ends as on a full disk) or slow (each write takes 2 s). The program
prints how many jobs were published and done in each second, and what the process kept in memory. It exits with 1 if, after the first
2 s of a fault, fewer than 90 % were done, if more was kept than the limits allow, or if the process took long to end.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import resource
import statistics
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from leveret import App, Job, Keep, Queue
from leveret.broker import Broker
from leveret.consuming.worker import working
from leveret.outcome import Kind
from leveret.publishing.sender import Sender
from leveret.results.recorder import MOST_KEPT, MOST_KEPT_BYTES, Recorder
from leveret.runtime import Runtime
from tests.postgres import node as postgresql

_TICK_S = 0.02
_FREE_S = 2
"""The first seconds of a fault, which don't count."""
_LEAST = 0.9
_END_S = 10.0
"""How long the process may take to end while its store is broken, seconds."""

_TRIGGER = """
CREATE FUNCTION leveret.breaks() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {} RETURN NULL; END $$;
CREATE TRIGGER breaks BEFORE INSERT OR UPDATE ON leveret.records FOR EACH STATEMENT EXECUTE FUNCTION leveret.breaks();
"""
_FULL = _TRIGGER.format("RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full';")
_SLOW = _TRIGGER.format("PERFORM pg_sleep(2);")
_WHOLE = "DROP FUNCTION IF EXISTS leveret.breaks CASCADE"


class Resize(Job[str], name="resize", queue=Queue("images", priorities=False), keep=Keep()):
    n: int
    text: str = "x" * 150


class Faults:
    """A PostgreSQL, and what may happen to it."""

    def __init__(self, node: postgresql.Node) -> None:
        self.node = node
        self.break_: dict[str, Callable[[], Awaitable[object]]] = {
            "killed": node.kill9,
            "frozen": lambda: asyncio.to_thread(node.pause),
            "full": lambda: self._run(_FULL),
            "slow": lambda: self._run(_SLOW),
        }

    async def heal(self, fault: str) -> None:
        """Undo a fault."""
        if fault == "frozen":
            self.node.resume()
        elif fault == "killed":
            await self.node.start()
        else:
            await self._run(_WHOLE)

    async def _run(self, sql: str) -> None:
        for statement in sql.split(";\n"):
            if statement.strip():
                await self.node.query(statement)


class Watched(App[None]):
    """An app whose recorders are counted: its publisher's, and its worker's."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self._senders: list[Sender] = []

    def sender(self, broker: Broker, runtime: Runtime) -> Sender:
        self._senders.append(super().sender(broker, runtime))
        return self._senders[-1]

    @property
    def recorders(self) -> list[Recorder]:
        """The recorders so far."""
        return [results.recorder for sender in self._senders if (results := sender.results) is not None]


class Second(msgspec.Struct):
    """What happened in one second."""

    published: int
    done: int
    kept: int
    mib: float


async def measure(faults: Faults, fault: str, rate: int, before_s: int, broken_s: int) -> list[str]:
    """Measure one fault, print it, and return what is wrong."""
    app = Watched("benchmark", broker=f"memory://{uuid.uuid4().hex}", store=faults.node.url, concurrency=200)

    @app.handler
    async def resize(job: Resize) -> str:
        return job.text

    seconds: list[Second] = []
    try:
        async with app.publisher() as publisher, working(app) as worker:
            for second in range(before_s + broken_s):
                if second == before_s:
                    await faults.break_[fault]()
                published, done, began = 0, worker.consumer.counts[Kind.DONE], time.monotonic()
                while (passed_s := time.monotonic() - began) < 1:
                    jobs = [Resize(n) for n in range(published, int(rate * passed_s))]
                    published += len(jobs)
                    await publisher.publish_many(jobs, timeout_s=60)
                    await asyncio.sleep(_TICK_S)
                done = worker.consumer.counts[Kind.DONE] - done
                seconds.append(Second(published, done, sum(one.kept for one in app.recorders), _mib()))
            ends = time.monotonic()
        ended_s = time.monotonic() - ends
    finally:
        await faults.heal(fault)
    return _judge(fault, seconds[:before_s], seconds[before_s:], app.recorders, ended_s)


def _judge(
    fault: str, before: list[Second], broken: list[Second], recorders: list[Recorder], ended_s: float
) -> list[str]:
    whole, counted = before[1:], broken[_FREE_S:]
    # medians: the jobs that waited for the store are all done in one second
    share = statistics.median(each.done / each.published for each in counted)
    normal = statistics.median(each.done for each in whole)
    now = statistics.median(each.done for each in counted)
    most, grown = max(each.kept for each in broken), broken[-1].mib - before[-1].mib
    print(f"{fault}: done before {normal:.0f}/s, during the fault {now:.0f}/s ({share:.1%} of what was published)")
    print(f"  published/done a second: {' '.join(f'{each.published}/{each.done}' for each in broken)}")
    print(
        f"  kept at most {most} changes, dropped {sum(one.dropped for one in recorders)}; memory {grown:+.1f} MiB; ended in {ended_s:.1f} s"
    )
    bounds = len(recorders) * (MOST_KEPT_BYTES >> 20)
    wrong = {
        f"only {share:.1%} were done": share < _LEAST,
        f"only {now:.0f}/s instead of {normal:.0f}/s": now < _LEAST * normal,
        f"{most} changes were kept": most > len(recorders) * MOST_KEPT,
        f"memory grew by {grown:.0f} MiB": grown > 2 * bounds,
        f"the process ended after {ended_s:.1f} s": ended_s > _END_S,
    }
    return [f"{fault}: {text}" for text, is_wrong in wrong.items() if is_wrong]


def _mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="killed, frozen, full or slow; default: all")
    parser.add_argument("--rate", type=int, default=1000, help="jobs a second (default: 1000)")
    parser.add_argument("--before", type=int, default=5, help="seconds before the fault (default: 5)")
    parser.add_argument("--broken", type=int, default=15, help="seconds of the fault (default: 15)")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="  %(message)s", stream=sys.stdout)
    found = postgresql.find_postgres()
    if isinstance(found, postgresql.Postgres):
        print(f"the program kills its server: {found.why_no_levers}")
        return 2
    node, wrong = postgresql.Node(found), list[str]()
    try:
        await node.start()
        await postgresql.migrate(node.url)
        faults = Faults(node)
        for fault in given.faults or faults.break_:
            wrong += await measure(faults, fault, given.rate, given.before, given.broken)
    finally:
        await node.close()
    print("\n".join(wrong) or "all held")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
