"""leveret: its standard chain, `leveret work`; the broker follows from the URL (RabbitMQ, PostgreSQL or SQLite)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from benchmarks.peers.shape import KIND, MODE, QUEUE, TEXT, URL, FailedOnceError, Sender, ran
from leveret import App, Attempt, Job, Queue
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


retries = Retries(max_attempts=5, base_s=SHORTEST_DELAY_S) if MODE == "fails" else Retries(max_attempts=5)
app = App("bench", broker=URL, middleware=[Tracing(), retries, RateLimit(1e9, burst=1_000_000), Timeout(30)])

if MODE == "fails":

    @app.handler
    async def fail_once(job: Invoice, attempt: Attempt) -> None:
        """Fail the first time."""
        if attempt.number == 1:
            ran.begin()
            raise FailedOnceError
        ran.one(job.at)

else:

    @app.handler
    async def send_invoice(job: Invoice) -> None:
        """Do nothing."""
        ran.one(job.at)


@asynccontextmanager
async def sending() -> AsyncGenerator[Sender]:
    """Open a publisher."""
    async with app.publisher() as publisher:

        async def one(at: int, delay_s: float | None) -> None:
            await publisher.publish(Invoice(at), delay_s=delay_s, timeout_s=60)

        async def many(jobs: int) -> None:
            await publisher.publish_many((Invoice(0) for _ in range(jobs)), timeout_s=120)

        yield Sender(one, many)
