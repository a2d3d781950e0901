"""The app, the job and the handler that these tests share, and what they wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from leveret import App, Attempt, Job, Outcome, Queue, Settings
from leveret.admin import DeadLetter
from leveret.envelope import Envelope
from tests.contract.harness import PATIENCE_S, Harness, depth

Say = Callable[[Any, Attempt[Any]], Any]
"""What a handler does with (job, attempt)."""


def job_class(queue: Queue) -> Any:
    """The job that all these tests send: a number, and a text that may be left out."""

    class Work(Job, name="contract.work", queue=queue):
        n: int
        text: str = ""

        def __post_init__(self) -> None:
            if self.n < 0:
                msg = "n is a count"
                raise ValueError(msg)

    return Work


class Runs:
    """A handler that keeps each of its attempts, for a test to wait for, and then does as it is told."""

    def __init__(self, say: Say | None = None) -> None:
        self._say = say
        self._arrived: asyncio.Queue[Attempt[Any]] = asyncio.Queue()
        self.count = 0

    async def __call__(self, job: Any, attempt: Attempt[Any]) -> Any:
        self.count += 1
        self._arrived.put_nowait(attempt)
        said = self._say(job, attempt) if self._say is not None else None
        return await said if asyncio.iscoroutine(said) else said

    async def next(self) -> Attempt[Any]:
        """Return the next attempt that started."""
        return await asyncio.wait_for(self._arrived.get(), PATIENCE_S)


def make_app(harness: Harness, work: Any, runs: Runs, settings: Settings | None = None) -> App[Any]:
    """An app on this broker with one handler."""
    app: App[Any] = App("contract", broker=harness.url, settings=settings)

    @app.handler(job=work)
    async def handle(job: Any, attempt: Attempt[Any]) -> Outcome | None:
        return await runs(job, attempt)

    return app


async def publish(app: App[Any], *jobs: Job, **options: Any) -> list[str]:
    """Publish in order; return the ids."""
    async with app.publisher() as publisher:
        return [(await publisher.publish(job, timeout_s=PATIENCE_S, **options)).job_id for job in jobs]


async def until(true: Callable[[], bool]) -> None:
    """Wait for what has no event to wait on."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.01)


async def letters_of(harness: Harness, queue: Queue, count: int) -> list[Envelope]:
    """Return the dead letters of `queue` once there are `count`."""
    admin = harness.admin()
    async with asyncio.timeout(PATIENCE_S):
        while (await depth(admin, queue)).dead < count:
            await asyncio.sleep(0.02)
    async with admin.dead(queue) as letters:
        found: list[DeadLetter] = [letter async for letter in letters]
    return [letter.envelope for letter in found]


async def assert_empty(harness: Harness, queue: Queue) -> None:
    """Nothing waits in `queue`, and nobody holds any of it."""
    row = await depth(harness.admin(), queue)
    assert (row.ready, row.unsettled or 0, row.delayed or 0) == (0, 0, 0)
