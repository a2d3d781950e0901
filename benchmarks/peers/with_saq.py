"""SAQ: concurrency 100, finished jobs deleted (ttl=-1), orjson; PostgreSQL or Redis follows from the URL. Run it to make its tables."""
# pyright: reportMissingImports=false
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import orjson
from saq import Queue

from benchmarks.peers.shape import KEPT_S, KIND, MODE, QUEUE, READ_S, RESULT, URL, Sender, fields, ran

if KIND == "redis":
    import uvloop

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())  # `saq` has no option for it
NAME = "invoice.send"
TTL_S = KEPT_S if MODE == "results" else -1
queue = Queue.from_url(URL, name=QUEUE, dump=orjson.dumps, load=orjson.loads)


async def send_invoice(
    context: Any, *, at: int, order_id: int, email: str, text: str, tags: list[str]
) -> dict[str, Any] | None:
    """Do nothing."""
    ran.one(at)
    return RESULT if MODE == "results" else None


settings = {"queue": queue, "functions": [(NAME, send_invoice)], "concurrency": 100}


@asynccontextmanager
async def sending() -> AsyncGenerator[Sender]:
    """Publish by `enqueue`."""
    await queue.connect()

    async def one(at: int, delay_s: float | None) -> Any:
        return await queue.enqueue(NAME, ttl=TTL_S, **fields(at))

    async def ended(job: Any) -> None:
        """Wait for the end. It asks and then listens, so what ends between the two it doesn't hear of: it asks again after a second."""
        while not job.completed:
            with suppress(TimeoutError):
                await job.refresh(until_complete=1)

    async def read(jobs: list[Any]) -> list[Any]:
        async with asyncio.timeout(READ_S):
            await asyncio.gather(*(ended(job) for job in jobs))
        return [job.result for job in jobs]

    # while one listens, it stays subscribed; else each wait would subscribe anew
    listening = asyncio.ensure_future(queue.listen(["nothing"], lambda *_: False, None)) if MODE == "results" else None
    try:
        yield Sender(one, None, read=read)
    finally:
        if listening is not None:
            listening.cancel()
            await asyncio.wait([listening])
        await queue.disconnect()


async def main() -> None:
    """Connect, which makes the tables."""
    await queue.connect()
    await queue.disconnect()


if __name__ == "__main__":
    asyncio.run(main())
