"""The order of levels under load. Nothing is broken here; each version of RabbitMQ has its own order of priorities, so it belongs to the matrix."""

import asyncio
import uuid
from typing import Literal

import pytest

from leveret import App, Attempt, Job, Outgoing, Priority, Queue
from leveret.consuming import slots
from tests.fault.bench import eventually
from tests.rabbit.node import Rabbit

pytestmark = [pytest.mark.fault, pytest.mark.versions, pytest.mark.timeout(60)]

CONCURRENCY = 4


class Kitchen:
    """An app with one queue; it notes the level of each job that starts."""

    def __init__(self, url: str, kind: Literal["quorum", "classic"]) -> None:
        self.app: App[None] = App("kitchen", broker=url, concurrency=CONCURRENCY)
        self.queue = Queue(f"dishes-{uuid.uuid4().hex[:12]}", type=kind)
        self.started: list[Priority] = []

        class Dish(Job, name="dish", queue=self.queue):
            seconds: float = 0.02

        self.Dish = Dish

        @self.app.handler
        async def cook(dish: Dish, attempt: Attempt[None]) -> None:
            self.started.append(attempt.envelope.priority)
            await asyncio.sleep(dish.seconds)


@pytest.mark.parametrize("kind", ["quorum", "classic"])
async def test_an_urgent_job_starts_within_eight_others_with_500_waiting(
    rabbit: Rabbit, kind: Literal["quorum", "classic"]
) -> None:
    """A password reset behind a night's newsletter."""
    kitchen = Kitchen(rabbit.url, kind)
    async with kitchen.app.publisher() as publisher:
        await publisher.publish_many([Outgoing(kitchen.Dish(), priority=Priority.LOW) for _ in range(500)])
        async with kitchen.app.worker():
            await eventually(lambda: len(kitchen.started) > 20)
            before: list[int] = []
            for urgent in range(1, 6):
                await publisher.publish(kitchen.Dish(), priority=Priority.URGENT)
                confirmed = len(kitchen.started)
                await eventually(lambda: kitchen.started.count(Priority.URGENT) == urgent, every_s=0.001)  # noqa: B023
                places = [place for place, level in enumerate(kitchen.started) if level is Priority.URGENT]
                before.append(places[-1] - confirmed)
            left = 500 - kitchen.started.count(Priority.LOW)

    assert max(before) <= 8, before
    assert left > 100, "nothing waited behind the last of them"


async def test_the_lowest_level_goes_on_under_a_stream_of_urgent_jobs(
    rabbit: Rabbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of the lowest level would wait for as long as somebody publishes urgent ones. Here 1 s of waiting counts as 10 s: a window per 3 s."""
    for level in slots._RANK_S:
        monkeypatch.setitem(slots._RANK_S, level, slots._RANK_S[level] / 10)
    kitchen = Kitchen(rabbit.url, "quorum")
    async with kitchen.app.publisher() as publisher:
        await publisher.publish_many([Outgoing(kitchen.Dish(), priority=Priority.LOW) for _ in range(100)])

        async def stream() -> None:
            sent = 0
            while True:
                waiting = sent - kitchen.started.count(Priority.URGENT)
                if waiting < 300:
                    await publisher.publish_many([Outgoing(kitchen.Dish(), priority=Priority.URGENT)] * 100)
                    sent += 100
                await asyncio.sleep(0.05)

        streaming = asyncio.create_task(stream())
        await asyncio.sleep(0)
        async with kitchen.app.worker(grace_s=0):
            window = 2 * CONCURRENCY
            await eventually(lambda: kitchen.started.count(Priority.LOW) >= window, timeout_s=6)
            await eventually(lambda: kitchen.started.count(Priority.LOW) >= 2 * window, timeout_s=6)
            streaming.cancel()
            urgent = kitchen.started.count(Priority.URGENT)

    assert urgent > 4 * window, "the stream was none"
