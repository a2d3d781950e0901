"""Procrastinate on psycopg: concurrency 100, finished jobs deleted, notices, batches of 1 000."""
# pyright: reportMissingImports=false
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from procrastinate import App, PsycopgConnector

from benchmarks.peers.shape import QUEUE, URL, WINDOW, Sender, fields, ran

logging.getLogger("procrastinate").setLevel(logging.ERROR)  # its command line logs each job
app = App(
    connector=PsycopgConnector(conninfo=URL, min_size=4, max_size=20),
    import_paths=["benchmarks.peers.with_procrastinate"],
)


@app.task(name="invoice.send", queue=QUEUE)
async def send_invoice(at: int, order_id: int, email: str, text: str, tags: list[str]) -> None:
    """Do nothing."""
    ran.one(at)


@asynccontextmanager
async def sending() -> AsyncGenerator[Sender]:
    """Publish by `defer_async` and `batch_defer_async`."""
    async with app.open_async():

        async def one(at: int, delay_s: float | None) -> None:
            await send_invoice.defer_async(**fields(at))

        async def many(jobs: int) -> None:
            for begun in range(0, jobs, WINDOW):
                await send_invoice.batch_defer_async(*[fields(0) for _ in range(min(WINDOW, jobs - begun))])

        yield Sender(one, many)
