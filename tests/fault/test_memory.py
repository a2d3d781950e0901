"""A worker that has done many jobs, failures and reconnects is no larger than one that has done a few."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from leveret import Job
from tests.fault.bench import Bench, eventually, link_to
from tests.rabbit.node import Rabbit

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]

JOBS = 100_000
STAGE = 10_000
"""Jobs between two losses of the connection."""
GROWTH_KIB = 5 << 10


class Progress:
    """Counts the runs that have ended, by what was added to a recorder's file."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._read = 0
        self.ended = 0

    def reached(self, count: int) -> bool:
        """Whether at least so many have ended."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
            whole = new.rfind(b"\n") + 1
            self._read += whole
            self.ended += sum(line.startswith(b"end ") for line in new[:whole].splitlines())
        return self.ended >= count


async def test_a_hundred_thousand_jobs_with_failures_and_reconnects_leave_no_memory_behind(
    rabbit: Rabbit, bench: Callable[..., Bench]
) -> None:
    """What grows a byte a job is killed by the kernel within days, at night, with a hundred jobs in hand."""
    served = bench(rabbit.url)
    recorder, progress = served.recorder, Progress(served.recorder.plan.file)
    published = 0

    async def publish_to(count: int) -> None:
        nonlocal published
        async with served.app.publisher() as publisher:
            while published < min(JOBS, count):
                jobs: list[Job] = [recorder.Flaky(1) if n % 10 == 0 else recorder.Note() for n in range(5000)]
                await publisher.publish_many(jobs, timeout_s=60)
                published += len(jobs)

    async with link_to(rabbit) as link:
        worker = served.start(url=link.url)
        await worker.says("takes jobs from")
        resident: list[int] = []
        for stage in range(STAGE, JOBS + 1, STAGE):
            await publish_to(stage + STAGE)
            reached = partial(progress.reached, stage)
            await eventually(reached, lambda: f"{progress.ended} ran: {served.logs}", 60)
            resident.append(worker.resident_kib)
            if stage < JOBS:
                link.reset()
        await served.until_empty()
        resident.append(worker.resident_kib)
        await worker.drained()

    assert worker.log.count("consuming again") >= JOBS // STAGE - 1, (
        "the connection wasn't lost each time: it proves nothing"
    )
    assert resident[-1] < resident[1] + GROWTH_KIB, f"resident KiB, each {STAGE} jobs: {resident}"
