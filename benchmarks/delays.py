"""What a crash of RabbitMQ does to delayed jobs: `python -m benchmarks.delays VERSION TYPE ENDING [KEY=VALUE]`.

Publishes jobs that wait 0.5 to 60 s to a private node of its own, ends the node three times while they travel (`kill`: SIGKILL; `stop`: in order;
`none`), and prints how many came, came twice, or came late. A job is late if it comes more than 10 % of its delay, and more than 0.5 s, after it
was due or after the worker was consuming again, whichever is later. KEY=VALUE is a line for the node's advanced.config.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from leveret import Outgoing
from tests.fault.bench import Bench
from tests.rabbit.node import Node, installation_of

JOBS = 2_000
LONGEST_S = 60.0
ENDS_AT_S = (8.0, 24.0, 40.0)
"""When the node is ended, after the last job was published."""
PATIENCE_S = 400.0
"""Longer than two rounds of RabbitMQ's dead-letter worker, which takes 180 s each."""


async def measure(version: str, kind: str, ending: str, advanced: dict[str, int]) -> str:
    """Run once; return a line of results."""
    rng = random.Random(7)
    node = Node(installation_of(version), advanced=advanced)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), node.url, kind, reconnect_cap_s=1.0)
        try:
            await node.start()
            worker = await bench.working()
            delays = [rng.uniform(0.5, LONGEST_S) for _ in range(JOBS)]
            due: dict[str, float] = {}
            async with bench.app.publisher() as publisher:
                await publisher.publish(bench.recorder.Note(), delay_s=0.5, timeout_s=30)
                await node.flush()
                for first in range(0, JOBS, 200):
                    some = delays[first : first + 200]
                    now = time.monotonic()
                    receipts = await publisher.publish_many(
                        [Outgoing(bench.recorder.Note(), delay_s=delay_s) for delay_s in some], timeout_s=30
                    )
                    due.update((receipt.job_id, now + delay_s) for receipt, delay_s in zip(receipts, some, strict=True))
            lasts = dict(zip(due, delays, strict=True))
            published = time.monotonic()
            outages: list[tuple[float, float]] = []
            for number, at_s in enumerate(ENDS_AT_S if ending != "none" else (), 1):
                await asyncio.sleep(published + at_s - time.monotonic())
                down = time.monotonic()
                await (node.kill9() if ending == "kill" else node.stop())
                await node.start()
                await worker.says("(?s)" + ".*".join(["consuming again"] * number))
                outages.append((down, time.monotonic()))
            ends = time.monotonic() + PATIENCE_S
            missing = set(due)
            while missing and time.monotonic() < ends:
                await asyncio.sleep(0.5)
                missing = set(due) - set(bench.recorder.ids("start"))
            await asyncio.sleep(2)  # for copies
            starts: dict[str, list[float]] = {}
            for words in bench.recorder.lines("start"):
                starts.setdefault(words[1], []).append(float(words[4]))
        finally:
            bench.close()
            await node.close()

    def late_s(job_id: str) -> float:
        """Return by how much the job came late, the time without a broker left out."""
        at, came_at = due[job_id], starts[job_id][0]
        for down, back in outages:
            if at <= back and came_at >= down:
                at = max(at, min(back, came_at))
        return came_at - at

    came = [job_id for job_id in due if job_id in starts]
    lates = {job_id: late_s(job_id) for job_id in came}
    over = sorted(late for job_id, late in lates.items() if late > max(0.5, lasts[job_id] / 10))
    row = sorted(lates.values())
    return (
        f"RabbitMQ {version} {kind} {ending} {advanced or ''}: {len(due)} published, {len(due) - len(came)} lost,"
        f" {sum(len(starts[job_id]) > 1 for job_id in came)} twice, {len(over)} late"
        f" (by {Counter(round(late, -1) for late in over)}); p50 {row[len(row) // 2]:.2f} s, p99 {row[len(row) * 99 // 100]:.2f} s,"
        f" worst {row[-1]:.2f} s; without a broker {', '.join(f'{b - d:.1f}' for d, b in outages) or '0'} s"
    )


if __name__ == "__main__":
    settings = {key: int(value) for key, value in (pair.split("=") for pair in sys.argv[4:])}
    print(asyncio.run(measure(sys.argv[1], sys.argv[2], sys.argv[3], settings)))
