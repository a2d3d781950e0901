"""streaq: concurrency 100, uvloop, no log line per task, results not kept (ttl=0); it publishes 1 000 at a time. Its client is coredis."""
# pyright: reportMissingImports=false
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from streaq import Worker

from benchmarks.peers.shape import KEPT_S, MODE, QUEUE, READ_S, RESULT, URL, WINDOW, Sender, fields, ran

worker: Any = Worker(
    redis_url=URL,
    queue_name=QUEUE,
    concurrency=100,  # beside those that run it holds as many: `prefetch` is the same by default
    anyio_kwargs={"use_uvloop": True},
)


@worker.task(name="invoice.send", ttl=KEPT_S if MODE == "results" else 0, silent=True)  # silent: no log line per task
async def send_invoice(at: int, order_id: int, email: str, text: str, tags: list[str]) -> dict[str, Any] | None:
    """Do nothing."""
    ran.one(at)
    return RESULT if MODE == "results" else None


@asynccontextmanager
async def sending() -> AsyncGenerator[Sender]:
    """Publish by awaiting a task, and by `enqueue_many`."""
    async with worker:

        async def one(at: int, delay_s: float | None) -> Any:
            return await send_invoice.enqueue(**fields(at))

        async def many(jobs: int) -> None:
            for begun in range(0, jobs, WINDOW):
                count = min(WINDOW, jobs - begun)
                await worker.enqueue_many([send_invoice.enqueue(**fields(0)) for _ in range(count)])

        async def read(tasks: list[Any]) -> list[Any]:
            return [found.result for found in await asyncio.gather(*(task.result(READ_S) for task in tasks))]

        yield Sender(one, many, read=read)
