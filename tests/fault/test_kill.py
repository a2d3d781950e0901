"""Workers that are killed in the middle of ten thousand jobs."""

import asyncio
from collections import Counter

import pytest

from leveret import Outgoing, Priority
from tests.fault.bench import Bench

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

JOBS = 10_000
SECONDS = 0.02
"""Of each job."""
HIT_S = 3.0
"""Of the jobs that are hit for certain, one by each kill. Those that are hit twice run one after another."""


async def test_ten_thousand_jobs_survive_five_kills_of_their_worker(any_bench: Bench) -> None:
    """The whole promise: what was confirmed runs at least once, and what runs twice can be told by its id."""
    bench, confirmed = any_bench, list[str]()

    async def publish() -> None:
        async with bench.app.publisher() as publisher:
            for _ in range(JOBS // 500):
                receipts = await publisher.publish_many(
                    [bench.recorder.Note(SECONDS) for _ in range(500)], timeout_s=60
                )
                confirmed.extend(receipt.job_id for receipt in receipts)

    worker = await bench.working()
    publishing = asyncio.create_task(publish())
    try:
        for kill in range(1, 6):
            await bench.until_lines("start", kill * JOBS // 7)
            [hit] = await bench.publish(Outgoing(bench.recorder.Note(HIT_S), priority=Priority.HIGH))
            confirmed.append(hit)
            await bench.until_started(hit)
            await asyncio.to_thread(worker.kill9)
            worker = bench.start()
        await publishing
    finally:
        publishing.cancel()
    await bench.until_ended(confirmed)
    await bench.until_empty()
    await worker.says("takes jobs from")  # the one before it may have run all that was left
    await worker.drained()

    assert len(set(confirmed)) == JOBS + 5
    runs = Counter(bench.recorder.ids("start"))
    assert set(runs) == set(confirmed), "an id that nobody published, or one that never ran"
    assert sum(runs.values()) >= JOBS + 10, "a job that was running at a kill wasn't run again"
    assert all(words[2] == "1" for words in bench.recorder.lines()), "a death costs no attempt"
    # a killed worker's slots, and what had ended in its last turns of the loop
    assert sum(runs.values()) - len(confirmed) <= 5 * 200, "far more was repeated than was running"
