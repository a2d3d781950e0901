"""A worker of jobs with results that dies when its job says so: `python -m tests.fault.apps.kept BROKER STORE QUEUE DIARY`."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, cast

from leveret import App, Attempt, Job, Keep, Queue
from leveret.runtime import Runtime
from leveret.store import Change, Progress, Store
from tests.fault.apps import diary


def work_of(queue: str) -> Any:
    """Return the job class of a queue."""

    class Work(Job[int], name="work", queue=Queue(queue), keep=Keep()):
        n: int
        dies: str = ""
        """When its first worker dies: "running", or "written", between the store and the acknowledgement."""

    return Work


class Deadly:
    """A store that kills the process once it has the end of a job in `fatal`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.fatal = set[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def write(self, changes: Sequence[Change | Progress]) -> None:
        """As `Store.write`."""
        await self._store.write(changes)
        if any(isinstance(each, Change) and each.state == "done" and each.job_id in self.fatal for each in changes):
            os.kill(os.getpid(), signal.SIGKILL)


class Kept(App[None]):
    """An app with a deadly store."""

    store: Deadly

    def open_store(self, runtime: Runtime) -> Store | None:
        self.store = Deadly(cast("Store", super().open_store(runtime)))
        return cast("Store", self.store)


async def main() -> None:
    broker, store, queue, path = sys.argv[1:]
    log, app = diary.open_diary(path), Kept("kept", broker=broker, store=store)

    @app.handler(job=work_of(queue))
    async def work(job: Any, attempt: Attempt[Any]) -> int:
        diary.write(log, "start", os.getpid(), job.n, attempt.number)
        if job.dies == "running" and not attempt.redelivered:
            await asyncio.sleep(600)
        if job.dies == "written":
            app.store.fatal.add(attempt.job_id)
        n: int = job.n
        return n

    async with app.worker():
        await asyncio.sleep(600)


if __name__ == "__main__":
    asyncio.run(main())
