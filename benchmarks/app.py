"""The app that is measured: one job of about 200 bytes, the standard chain, a handler that does nothing."""

from __future__ import annotations

import asyncio

from leveret import App, Job, Queue
from leveret.middleware import RateLimit, Retries, Timeout, Tracing

TEXT = "x" * 120
quorum = Queue("bench.quorum")
classic = Queue("bench.classic", type="classic")


class Quorum(Job, name="invoice.send", queue=quorum):
    """About 200 bytes with its field names."""

    order_id: int
    email: str = "a@example.org"
    subject: str = "hello"
    text: str = TEXT
    tags: tuple[str, ...] = ("a", "b")


class Classic(Job, name="invoice.send", queue=classic):
    """The same, of a classic priority queue."""

    order_id: int
    email: str = "a@example.org"
    subject: str = "hello"
    text: str = TEXT
    tags: tuple[str, ...] = ("a", "b")


class Count:
    """Counts runs, and says when all are done."""

    def __init__(self) -> None:
        self.left = 0
        self.finished = asyncio.Event()

    def expect(self, jobs: int) -> None:
        """Wait for so many from now on."""
        self.left = jobs
        self.finished = asyncio.Event()

    def one(self) -> None:
        """One more is done."""
        self.left -= 1
        if not self.left:
            self.finished.set()


count = Count()
app = App("bench", middleware=[Tracing(), Retries(max_attempts=5), RateLimit(1e9, burst=1_000_000), Timeout(30)])


@app.handler
async def on_quorum(job: Quorum) -> None:
    """Do nothing."""
    count.one()


@app.handler
async def on_classic(job: Classic) -> None:
    """Do nothing."""
    count.one()
