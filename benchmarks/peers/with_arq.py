"""arq: 100 jobs at once, uvloop, no log line per job, results not kept. It has no batch API. Both its worker and its waits poll."""
# pyright: reportMissingImports=false
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import uvloop
from arq import create_pool
from arq.connections import RedisSettings
from arq.worker import func

from benchmarks.peers.shape import KEPT_S, MODE, QUEUE, READ_S, RESULT, URL, Sender, fields, ran

asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())  # `arq` has no option for it
POLL_S = 0.005
"""How often the worker asks for jobs and a waiter for its result: 0.5 s by default, which would be their latency."""
LOG = {"version": 1, "disable_existing_loggers": False, "loggers": {"arq": {"level": "ERROR"}}}


async def send_invoice(
    context: Any, *, at: int, order_id: int, email: str, text: str, tags: list[str]
) -> dict[str, Any] | None:
    """Do nothing."""
    ran.one(at)
    return RESULT if MODE == "results" else None


class Settings:
    """What `arq` runs."""

    functions = (func(send_invoice, name="invoice.send", keep_result=KEPT_S if MODE == "results" else 0),)
    redis_settings = RedisSettings.from_dsn(URL)
    queue_name = QUEUE
    max_jobs = 100
    poll_delay = POLL_S  # it reads up to 500 jobs each time: 5 times max_jobs by default


@asynccontextmanager
async def sending() -> AsyncGenerator[Sender]:
    """Publish by `enqueue_job`."""
    pool = await create_pool(RedisSettings.from_dsn(URL), default_queue_name=QUEUE)

    async def one(at: int, delay_s: float | None) -> Any:
        return await pool.enqueue_job("invoice.send", **fields(at))

    async def read(jobs: list[Any]) -> list[Any]:
        return await asyncio.gather(*(job.result(READ_S, poll_delay=POLL_S) for job in jobs))

    try:
        yield Sender(one, None, read=read)
    finally:
        await pool.aclose()
