"""A retry whose publish is tried again until the broker takes it."""

import asyncio
import uuid

from leveret import App, Attempt, Job, Queue, Retry
from leveret.brokers.memory.store import memory_store
from leveret.clock import ManualClock
from leveret.consuming.worker import working
from tests.unit.runs import runtime


class Thing(Job, name="thing.do", queue=Queue("things")):
    """A job."""


async def turns() -> None:
    """Let the loop run until only the clock could start something."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_retry_that_must_be_published_again_keeps_its_due_time() -> None:
    """A retry after 60 s would come minutes late, by as long as the broker took no publishes."""
    url, clock, runs = f"memory://{uuid.uuid4().hex}", ManualClock(), list[int]()
    app, store = App("late", broker=url), memory_store(url)

    @app.handler
    async def handler(job: Thing, attempt: Attempt) -> Retry | None:
        runs.append(attempt.number)
        if attempt.number > 1:
            return None
        store.refuse()
        return Retry(60)

    async with app.publisher() as publisher, working(app, runtime=runtime(clock)) as work:
        await publisher.publish(Thing())
        await turns()
        for _ in range(20):
            clock.advance(1)
            await turns()
        assert work.consumer.unsettled == 1
        store.accept()
        while work.consumer.unsettled:
            clock.advance(1)
            await turns()
        passed_s = clock.monotonic()
        assert 20 < passed_s < 60
        assert store.state(clock).next_due_in_s == 60 - passed_s
        clock.advance(60 - passed_s)
        await turns()

    assert runs == [1, 2]
