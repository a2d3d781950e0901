"""What the schema's functions read: the rows that they are asked for, whatever the planner takes the tables for."""

from __future__ import annotations

import asyncpg
import pytest

GONE, JOBS = 5000, 50
PASSES = {"jobs": 2, "claims": 0, "delayed": 2, "outbox": 1}
"""How often the rows that are gone are passed, by looks from the start. A look-up passes none."""

_HELD = [
    "DELETE FROM leveret.jobs",
    "DELETE FROM leveret.claims",
    "DELETE FROM leveret.delayed",
    "DELETE FROM leveret.outbox",
    "VACUUM leveret.jobs, leveret.claims, leveret.delayed, leveret.outbox",
]
"""Afterwards the statistics say that there are no rows, and the indexes have all of them: somebody's snapshot may see them."""
_ANALYZED = ["ANALYZE leveret.jobs, leveret.claims, leveret.delayed, leveret.outbox"]


async def fill(connection: asyncpg.Connection, count: int) -> None:
    """Let so many jobs wait, be claimed, be delayed and be in the outbox."""
    await connection.execute(
        "INSERT INTO leveret.jobs (queue, body) SELECT 'jobs', '' FROM generate_series(1, $1)", count
    )
    await connection.execute(
        "INSERT INTO leveret.delayed (queue, body, due_ms) SELECT 'jobs', '', 0 FROM generate_series(1, $1)", count
    )
    await connection.execute("INSERT INTO leveret.claims (seq, worker) SELECT seq, NULL FROM leveret.jobs")
    await connection.execute(
        "INSERT INTO leveret.outbox (queue, body) SELECT 'jobs', '' FROM generate_series(1, $1)", count
    )


@pytest.mark.parametrize(
    "before",
    [
        pytest.param([], id="new"),
        pytest.param(["VACUUM leveret.jobs, leveret.claims, leveret.delayed, leveret.outbox"], id="emptied"),
        pytest.param(_HELD, id="a snapshot held"),
        pytest.param([*_HELD, *_ANALYZED], id="a snapshot held and analyzed"),
    ],
)
async def test_a_job_is_looked_up_and_not_searched_for(postgres_url: str, before: list[str]) -> None:
    """Where a join reads the whole index for each job, a worker takes seconds for a claim once some hundred thousand jobs are done."""
    one, reader, worker = [await asyncpg.connect(postgres_url) for _ in range(3)]
    if before and before[0].startswith("DELETE"):
        await fill(one, GONE)
        await reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM leveret.jobs")
    for statement in before:
        await one.execute(statement)
    await fill(one, JOBS)
    lease = await one.fetchval("INSERT INTO leveret.workers DEFAULT VALUES RETURNING id")

    async with worker.transaction():
        claim = "SELECT seq FROM leveret.claim($1, '{jobs}', '{3}', '{0}', ARRAY[$2::int], NULL)"
        claimed = [row["seq"] for row in await worker.fetch(claim, lease, JOBS)]
        await worker.execute("SELECT leveret.give_back($1, $2)", lease, claimed)
        assert [row["seq"] for row in await worker.fetch(claim, lease, JOBS)] == claimed
        settle = "SELECT leveret.settle($1, array_fill('jobs'::text, ARRAY[$2::int]), array_fill(3::smallint, ARRAY[$2::int]), $3)"
        await worker.execute(settle, lease, JOBS, claimed)
        await worker.execute("SELECT leveret.move_due($1)", JOBS)
        taken = [
            row["seq"]
            for row in await worker.fetch("SELECT seq FROM leveret.take_outbox($1, 1000000, NULL, '{}')", JOBS)
        ]
        await worker.execute("SELECT leveret.settle_outbox($1)", taken)
        read = {
            table: await worker.fetchval(f"SELECT pg_stat_get_xact_tuples_returned('leveret.{table}_pkey'::regclass)")
            for table in PASSES
        }

    assert (len(claimed), len(taken)) == (JOBS, JOBS)
    left = {table: await one.fetchval(f"SELECT count(*) FROM leveret.{table}") for table in PASSES}
    assert left == {"jobs": JOBS, "claims": 0, "delayed": 0, "outbox": 0}
    assert {table: count for table, count in read.items() if count > GONE * (PASSES[table] + 0.5)} == {}
    for connection in (one, reader, worker):
        await connection.close()
