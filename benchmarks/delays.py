"""What a crash of RabbitMQ does to delayed jobs: `python -m benchmarks.delays VERSION TYPE ENDING LONGEST_S [KEY=VALUE]`.

Publishes jobs that wait 0.25 s to LONGEST_S to a private node of its own, ends the node while they travel (`kill`: SIGKILL; `stop`: in order;
`none`), and prints how many came, came twice, or came late. With 60 s there are 2 000 jobs and three ends; below 8 s, 7 000 jobs and one end.
A job is late if it comes more than 10 % of its delay, and more than 0.5 s, after it was due or after the worker was consuming again, whichever is
later. KEY=VALUE is a line for the node's advanced.config.

After each return it also prints the jobs that RabbitMQ's dead-letter workers hold without a target: they took them out of a delay queue when the
exchanges of the vhost weren't there yet, and look for a target again after `dead_letter_worker_publisher_confirm_timeout`, 180 s by default.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from leveret import Outgoing, Publisher
from tests.fault.bench import Bench, Worker
from tests.rabbit.node import Node, installation_of

ENDS_AT_S = (8.0, 24.0, 40.0)
"""When the node is ended, after the last job was published."""
PATIENCE_S = 400.0
"""Longer than two rounds of RabbitMQ's dead-letter worker, which takes 180 s each."""
HELD = """[{element(4, Queue), map_size(Held)} || {_, Worker, _, _} <- supervisor:which_children(rabbit_fifo_dlx_sup),
    {status, _, _, [_, _, _, _, Status]} <- [sys:get_status(Worker)],
    {data, [{"State", #{queue_ref := Queue, pendings := All}}]} <- Status,
    Held <- [maps:filter(fun(_, #{publish_count := Tries}) -> Tries =:= 0 end, All)], map_size(Held) > 0]."""
"""Erlang: the queues whose dead-letter worker holds messages that it could send nowhere, and how many."""


async def publish(bench: Bench, delays: Sequence[float], publisher: Publisher) -> dict[str, float]:
    """Publish a job per delay; return when each is due, by its id."""
    due: dict[str, float] = {}
    for first in range(0, len(delays), 200):
        some = delays[first : first + 200]
        now = time.monotonic()
        receipts = await publisher.publish_many(
            [Outgoing(bench.recorder.Note(), delay_s=delay_s) for delay_s in some], timeout_s=30
        )
        due.update((receipt.job_id, now + delay_s) for receipt, delay_s in zip(receipts, some, strict=True))
    return due


async def end(node: Node, worker: Worker, ending: str, number: int) -> tuple[float, float]:
    """End the node for the `number`th time and start it again; return when it went and when the worker consumed again."""
    down = time.monotonic()
    await (node.kill9() if ending == "kill" else node.stop())
    await node.start()
    await worker.says("(?s)" + ".*".join(["consuming again"] * number))
    return down, time.monotonic()


async def starts_of(bench: Bench, due: Iterable[str]) -> dict[str, list[float]]:
    """Wait for each job, at most `PATIENCE_S`; return when each that came was started."""
    ends, missing = time.monotonic() + PATIENCE_S, set(due)
    while missing and time.monotonic() < ends:
        await asyncio.sleep(0.5)
        missing -= set(bench.recorder.ids("start"))
    await asyncio.sleep(2)  # for copies
    starts: dict[str, list[float]] = {}
    for words in bench.recorder.lines("start"):
        starts.setdefault(words[1], []).append(float(words[4]))
    return starts


def late_s(at: float, came_at: float, outages: Sequence[tuple[float, float]]) -> float:
    """Return by how much a job came late that was due `at`, the time without a broker left out."""
    for down, back in outages:
        if at <= back and came_at >= down:
            at = max(at, min(back, came_at))
    return came_at - at


async def measure(version: str, kind: str, ending: str, longest_s: float, advanced: dict[str, int]) -> str:
    """Run once; return a line of results."""
    jobs, ends_at_s = (2_000, ENDS_AT_S) if longest_s > ENDS_AT_S[0] else (7_000, (0.0,))
    rng = random.Random(7)
    node = Node(installation_of(version), advanced=advanced)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), node.url, kind, reconnect_cap_s=1.0)
        try:
            await node.start()
            worker = await bench.working()
            delays = [rng.uniform(0.25, longest_s) for _ in range(jobs)]
            async with bench.app.publisher() as publisher:
                await publish(bench, [longest_s], publisher)  # declares the ladder
                await node.flush()
                due = await publish(bench, delays, publisher)
            published = time.monotonic()
            outages: list[tuple[float, float]] = []
            for number, at_s in enumerate(ends_at_s if ending != "none" else (), 1):
                await asyncio.sleep(published + at_s - time.monotonic())
                outages.append(await end(node, worker, ending, number))
                await asyncio.sleep(2)
                print(f"held by dead-letter workers without a target: {await node.eval(HELD)}", flush=True)
            starts = await starts_of(bench, due)
        finally:
            bench.close()
            await node.close()
    lates = {job_id: late_s(at, starts[job_id][0], outages) for job_id, at in due.items() if job_id in starts}
    allowed_s = {job_id: max(0.5, delay_s / 10) for job_id, delay_s in zip(due, delays, strict=True)}
    over = sorted(late for job_id, late in lates.items() if late > allowed_s[job_id])
    row = sorted(lates.values())
    return (
        f"RabbitMQ {version} {kind} {ending} {longest_s:g} s {advanced or ''}: {len(due)} published, {len(due) - len(lates)} lost,"
        f" {sum(len(starts[job_id]) > 1 for job_id in lates)} twice, {len(over)} late"
        f" (by {Counter(round(late, -1) for late in over)}); p50 {row[len(row) // 2]:.2f} s, p99 {row[len(row) * 99 // 100]:.2f} s,"
        f" worst {row[-1]:.2f} s; without a broker {', '.join(f'{b - d:.1f}' for d, b in outages) or '0'} s"
    )


if __name__ == "__main__":
    settings = {key: int(value) for key, value in (pair.split("=") for pair in sys.argv[5:])}
    print(asyncio.run(measure(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]), settings)))
