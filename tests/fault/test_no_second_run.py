"""A worker that loses its connection or its lease, and lives: nothing that it ran is run again."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from leveret import App, Attempt, Job, Queue
from leveret.brokers import leases
from leveret.consuming.worker import working
from leveret.middleware import Retries
from leveret.outcome import Kind
from tests.fault.bench import eventually
from tests.rabbit.node import Rabbit

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

JOBS, RUN_S = 100, 3.0


async def run_through(url: str, type: Any, lose: Callable[[], Awaitable[object]], *, fails: bool) -> Counter[Kind]:
    """Run `JOBS` jobs that all run when `lose` is called; see that each attempt ran once, and return how deliveries ended."""
    app, queue = (
        App("fault", broker=url, middleware=[Retries(base_s=0.2, cap_s=0.4)]),
        Queue(f"once-{uuid.uuid4().hex[:12]}", type=type),
    )
    starts, ends = Counter[tuple[str, int]](), Counter[str]()

    class Order(Job, name="order", queue=queue):
        """A job to run."""

    async def run(job: Any, attempt: Attempt[Any]) -> None:
        starts[attempt.job_id, attempt.number] += 1
        if attempt.number == 1:
            await asyncio.sleep(RUN_S)
            if fails:
                raise ConnectionError("not yet")
        ends[attempt.job_id] += 1

    app.handler(job=Order)(run)
    async with app.publisher() as publisher:
        ids = [receipt.job_id for receipt in await publisher.publish_many([Order()] * JOBS, timeout_s=30)]
    async with working(app, queues=[queue.name]) as work:
        await eventually(lambda: len(starts) == JOBS)
        await lose()
        await eventually(lambda: len(ends) == JOBS)
        await eventually(lambda: work.consumer.counts[Kind.REMEMBERED] == JOBS)  # each came again, and wasn't run
    assert starts == Counter({(job_id, number): 1 for job_id in ids for number in range(1, 3 if fails else 2)})
    return work.consumer.counts


@pytest.mark.parametrize("type", ["quorum", "classic"])
@pytest.mark.parametrize("fails", [False, True], ids=["done", "fails"])
async def test_a_hundred_jobs_whose_connection_is_closed_run_once(
    rabbit: Rabbit, caplog: pytest.LogCaptureFixture, type: str, fails: bool
) -> None:
    """A firewall that drops a connection would have each hundred cards charged twice."""
    caplog.set_level(logging.INFO, "leveret")

    counts = await run_through(rabbit.url, type, rabbit.close_connections, fails=fails)

    assert counts[Kind.DONE] == JOBS
    assert counts[Kind.RETRY] == (JOBS if fails else 0)
    said = [record for record in caplog.records if record.name != "leveret.attempt"]
    assert len(said) < 15, caplog.text
    assert "aren't run again, since this process ran them or runs them" in caplog.text


@pytest.mark.parametrize("fails", [False, True], ids=["done", "fails"])
async def test_a_hundred_jobs_whose_lease_is_lost_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """A laptop that slept for longer than its lease finishes what it ran."""
    monkeypatch.setattr(leases, "BEAT_S", 0.1)
    monkeypatch.setattr(leases, "LEASE_S", 0.3)

    async def lose() -> None:
        # what another worker does to one that it takes for dead
        with closing(sqlite3.connect(tmp_path / "jobs.db")) as file, file:
            file.execute("UPDATE jobs SET claimed_by = NULL")
            file.execute("DELETE FROM workers")

    counts = await run_through(f"sqlite:///{tmp_path}/jobs.db", "quorum", lose, fails=fails)

    assert counts[Kind.RETRY] == (JOBS if fails else 0)
