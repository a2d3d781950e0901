"""PgQueuer on asyncpg: one connection, as its guide says for workers, batches of 200; orjson; it publishes 1 000 at a time."""
# pyright: reportMissingImports=false
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import asyncpg
import orjson
from pgqueuer import AsyncpgDriver, PgQueuer, Queries
from pgqueuer.models import Job

from benchmarks.peers.shape import URL, WINDOW, Sender, fields, ran

NAME = "invoice.send"


@asynccontextmanager
async def worker() -> AsyncGenerator[PgQueuer]:
    """Make what `pgq run` runs."""
    connection = await asyncpg.connect(URL)
    try:
        queuer = PgQueuer.from_asyncpg_connection(connection)

        @queuer.entrypoint(NAME)
        async def send_invoice(job: Job) -> None:
            """Do nothing."""
            ran.one(orjson.loads(job.payload)["at"])

        yield queuer
    finally:
        await connection.close()


@asynccontextmanager
async def sending() -> AsyncGenerator[Sender]:
    """Publish by `enqueue`, one or a list."""
    connection = await asyncpg.connect(URL)
    queries = Queries(AsyncpgDriver(connection))

    async def one(at: int, delay_s: float | None) -> None:
        await queries.enqueue(NAME, orjson.dumps(fields(at)))

    async def many(jobs: int) -> None:
        for begun in range(0, jobs, WINDOW):
            count = min(WINDOW, jobs - begun)
            await queries.enqueue([NAME] * count, [orjson.dumps(fields(0)) for _ in range(count)], [0] * count)

    try:
        yield Sender(one, many)
    finally:
        await connection.close()
