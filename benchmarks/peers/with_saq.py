"""SAQ: concurrency 100, finished jobs deleted (ttl=-1), orjson; the server follows from the URL. Run it to make its tables."""
# pyright: reportMissingImports=false
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import orjson
from saq import Queue

from benchmarks.peers.shape import QUEUE, URL, Sender, fields, ran

NAME = "invoice.send"
queue = Queue.from_url(URL, name=QUEUE, dump=orjson.dumps, load=orjson.loads)


async def send_invoice(context: Any, *, at: int, order_id: int, email: str, text: str, tags: list[str]) -> None:
    """Do nothing."""
    ran.one(at)


settings = {"queue": queue, "functions": [(NAME, send_invoice)], "concurrency": 100}


@asynccontextmanager
async def sending() -> AsyncGenerator[Sender]:
    """Publish by `enqueue`."""
    await queue.connect()

    async def one(at: int, delay_s: float | None) -> None:
        await queue.enqueue(NAME, ttl=-1, **fields(at))

    try:
        yield Sender(one, None)
    finally:
        await queue.disconnect()


async def main() -> None:
    """Connect, which makes the tables."""
    await queue.connect()
    await queue.disconnect()


if __name__ == "__main__":
    asyncio.run(main())
