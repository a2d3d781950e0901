"""An app inside the test's own process: some queues, one handler for each, and what it saw."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leveret import App, Attempt, Job, Outgoing, Publisher, Queue, Settings, Worker
from leveret.ids import new_job_id
from tests.fault.bench import PATIENCE_S, eventually
from tests.rabbit.node import Rabbit

_CENSUS = (
    'io:format("~w ~w ~w", [length(rabbit_networking:connections()), length(rabbit_channel:list()),'
    ' length(rabbit_amqqueue:consumers_all(<<"/">>))]).'
)


class Shop:
    """An app with `queues` queues; it counts the runs of each job, and keeps the texts of the jobs as they came."""

    def __init__(self, url: str, *, queues: int = 1, settings: Settings | None = None) -> None:
        name = uuid.uuid4().hex[:12]
        self.app = App("shop", broker=url, settings=settings)
        self.queues = [Queue(f"shop-{number}-{name}", priorities=False) for number in range(queues)]
        self.runs: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.texts: dict[str, str] = {}
        self._jobs = [self._serve(queue) for queue in self.queues]

    def _serve(self, queue: Queue) -> Any:
        class Work(Job, name="work", queue=queue):
            seconds: float = 0.0
            text: str = ""

        async def run(job: Work, attempt: Attempt[Any]) -> None:
            self.runs[attempt.job_id] += 1
            self.texts[attempt.job_id] = job.text
            await asyncio.sleep(job.seconds)
            self.ends[attempt.job_id] += 1

        self.app.handler(job=Work)(run)
        return Work

    @asynccontextmanager
    async def working(self) -> AsyncGenerator[tuple[Worker, Publisher]]:
        """Run a worker, which is ready, and a publisher."""
        async with self.app.worker() as worker, self.app.publisher() as publisher:
            await eventually(lambda: worker.state().name == "ready", lambda: worker.state().why)
            yield worker, publisher

    def job(self, number: int = 0, *, seconds: float = 0.0, text: str = "", resend: bool = False) -> Outgoing:
        """Make a job with an id; `number` says for which queue."""
        return Outgoing(self._jobs[number](seconds=seconds, text=text), job_id=new_job_id(), resend=resend)


def id_of(job: Outgoing) -> str:
    """Return the id of a job that `Shop.job` made."""
    job_id = job.options.get("job_id")
    assert job_id is not None
    return job_id


def open_files() -> int:
    """Return how many files and sockets this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@dataclass(frozen=True)
class Census:
    """What this program has of its broker and of its machine."""

    at_the_broker: str
    """Connections, channels and consumers of everybody."""
    tasks: int
    files: int


async def census(rabbit: Rabbit) -> Census:
    """Count what is open."""
    at_the_broker = (await rabbit.eval(_CENSUS)).removesuffix("ok")
    return Census(at_the_broker, len(asyncio.all_tasks()), open_files())


async def until_census(rabbit: Rabbit, expected: Census) -> None:
    """Wait until no more and no less is open than `expected`: what was closed ends a moment later."""
    ends = time.monotonic() + PATIENCE_S
    while (found := await census(rabbit)) != expected:
        assert time.monotonic() < ends, f"{found}, not {expected}"
