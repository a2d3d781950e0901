"""`version=`: which worker runs a job whose contract has changed."""

from datetime import datetime, timezone

import pytest

from leveret import App, Attempt, Job, Queue, Retry
from leveret.cli.describe import text_of
from leveret.cli.description import describe
from leveret.middleware import Retries
from leveret.testing import running

QUEUE = Queue("orders")


class Old(Job, name="order", queue=QUEUE):
    cents: int


class New(Job, name="order", queue=QUEUE, version=2):
    """Since version 2 the price has a currency."""

    cents: int
    currency: str = ""


async def test_a_handler_sees_the_version_of_the_message_in_every_attempt() -> None:
    """The version of the class in its place would make version 1's cents count in the new currency."""
    app, seen = App("shop", middleware=[Retries()]), list[tuple[str, int, int]]()

    @app.handler
    async def handle(order: New, attempt: Attempt) -> Retry | None:
        seen.append((order.currency, attempt.envelope.version, attempt.number))
        return Retry() if attempt.number == 1 else None

    async with running(app) as lab:
        await lab.publish(Old(7))
        await lab.drain()
        await lab.publish(New(7, "EUR"))
        await lab.drain()
        assert [one.envelope.version for one in lab.published] == [1, 2]
    assert seen == [("", 1, 1), ("", 1, 2), ("EUR", 2, 1), ("EUR", 2, 2)]


async def test_an_older_worker_leaves_a_newer_job_to_others(caplog: pytest.LogCaptureFixture) -> None:
    """It would decode the job, since it ignores unknown fields, and charge the wrong currency."""
    app, seen = App("shop"), list[Old]()
    app.handler(job=Old)(seen.append)
    async with running(app) as lab:
        await lab.publish(New(7, "EUR"))
        await lab.drain()
    assert not seen
    assert "order has version 2, this worker's handler knows version 1" in caplog.text


async def test_describe_shows_the_version() -> None:
    """Which version a worker knows decides which jobs wait."""
    app = App("shop", broker="memory://")
    app.handler(job=New)(lambda _: None)
    assert "job order version 2 (" in text_of(await describe(app, datetime.now(timezone.utc)))
