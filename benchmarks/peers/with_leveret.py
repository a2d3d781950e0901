"""leveret: its standard chain, `leveret work`; the broker follows from the URL (RabbitMQ, PostgreSQL, Redis or SQLite)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from benchmarks.peers.shape import (
    KEPT_S,
    KIND,
    MODE,
    QUEUE,
    READ_S,
    RESULT,
    STORE,
    TEXT,
    URL,
    FailedOnceError,
    Sender,
    ran,
)
from leveret import App, Attempt, Job, Keep, Queue
from leveret.middleware import RateLimit, Retries, Timeout, Tracing

SHORTEST_DELAY_S = 0.25
queue = Queue(QUEUE, type="classic") if KIND == "classic" else Queue(QUEUE)


class Invoice(Job, name="invoice.send", queue=queue):
    """The job."""

    at: int
    order_id: int = 7
    email: str = "a@example.org"
    text: str = TEXT
    tags: tuple[str, ...] = ("a", "b")


class Sent(msgspec.Struct):
    """The result of a job that is kept: RESULT."""

    order_id: int
    number: str


class KeptInvoice(Job[Sent], name="invoice.kept", queue=queue, keep=Keep(result_s=KEPT_S)):
    """The same job with a result."""

    at: int
    order_id: int = 7
    email: str = "a@example.org"
    text: str = TEXT
    tags: tuple[str, ...] = ("a", "b")


retries = Retries(max_attempts=5, base_s=SHORTEST_DELAY_S) if MODE == "fails" else Retries(max_attempts=5)
app = App(
    "bench",
    broker=URL,
    store=STORE,  # where there is none beside the broker, the broker itself keeps results
    middleware=[Tracing(), retries, RateLimit(1e9, burst=1_000_000), Timeout(30)],
)
sent = Sent(**RESULT)

if MODE == "fails":

    @app.handler
    async def fail_once(job: Invoice, attempt: Attempt) -> None:
        """Fail the first time."""
        if attempt.number == 1:
            ran.begin()
            raise FailedOnceError
        ran.one(job.at)

elif MODE == "results":

    @app.handler
    async def send_kept_invoice(job: KeptInvoice) -> Sent:
        """Return the result."""
        ran.one(job.at)
        return sent

else:

    @app.handler
    async def send_invoice(job: Invoice) -> None:
        """Do nothing."""
        ran.one(job.at)


@asynccontextmanager
async def sending() -> AsyncGenerator[Sender]:
    """Open a publisher."""
    async with app.publisher() as publisher:

        async def one(at: int, delay_s: float | None) -> Any:
            job = KeptInvoice(at) if MODE == "results" else Invoice(at)
            return await publisher.publish(job, delay_s=delay_s, timeout_s=60)

        async def many(jobs: int) -> None:
            await publisher.publish_many((Invoice(0) for _ in range(jobs)), timeout_s=120)

        async def read(handles: list[Any]) -> list[Any]:
            results = await asyncio.gather(*(handle.result(timeout_s=READ_S) for handle in handles))
            return [msgspec.structs.asdict(result) for result in results]

        yield Sender(one, many, read=read)
