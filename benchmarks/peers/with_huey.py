"""huey's SqliteHuey with fsync=True (its WAL journal is the default), results off, one worker thread. It pops a job before it runs."""
# pyright: reportMissingImports=false
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from huey import SqliteHuey

from benchmarks.peers.shape import URL, Sender, fields, ran

huey = SqliteHuey("bench", filename=URL.removeprefix("sqlite:///"), fsync=True, results=False)


@huey.task(name="invoice.send")
def send_invoice(at: int, order_id: int, email: str, text: str, tags: list[str]) -> None:
    """Do nothing."""
    ran.one_of_threads(at)


@asynccontextmanager
async def sending() -> AsyncGenerator[Sender]:
    """Publish by calling the task, which blocks; one thread, since SQLite has one writer."""

    async def one(at: int, delay_s: float | None) -> None:
        send_invoice(**fields(at))

    async def many(jobs: int) -> None:
        for _ in range(jobs):
            send_invoice(**fields(0))

    yield Sender(one, many, blocking=True)
    huey.storage.close()
