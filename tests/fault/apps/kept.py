"""A worker of jobs with results that dies when its job says so: `python -m tests.fault.apps.kept BROKER STORE QUEUE DIARY`."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, cast

from leveret import App, Attempt, Bury, Envelope, Job, Keep, Queue, Receipt, Retry
from leveret.layer import Publish
from leveret.runtime import Runtime
from leveret.store import Change, Progress, Store
from tests.fault.apps import diary


def work_of(queue: str) -> Any:
    """Return the job class of a queue."""

    class Work(Job[int], name="work", queue=Queue(queue), keep=Keep()):
        n: int
        dies: str = ""
        """When its first worker dies: "running"; "written", between the store and the acknowledgement; or "retry" or "bury", once the
        publish of that has been confirmed."""

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
    """An app with a deadly store, unless the store is beside the broker's jobs."""

    store: Deadly

    def open_store(self, runtime: Runtime) -> Store | None:
        store = super().open_store(runtime)
        if self.store_url() == self.broker_url():
            return store
        self.store = Deadly(cast("Store", store))
        return cast("Store", self.store)


class Dies:
    """Middleware that kills the process once the broker has confirmed what a job in `fatal` waits for."""

    def __init__(self) -> None:
        self.fatal = set[tuple[str, str | None]]()

    async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
        """Kill the process before anybody hears of the confirm."""
        receipt = await proceed(envelope)
        if (envelope.job_id, envelope.cause) in self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return receipt


async def main() -> None:
    broker, store, queue, path = sys.argv[1:]
    log, dies = diary.open_diary(path), Dies()
    app = Kept("kept", broker=broker, store=store, middleware=[dies])

    @app.handler(job=work_of(queue))
    async def work(job: Any, attempt: Attempt[Any]) -> int:
        diary.write(log, "start", os.getpid(), job.n, attempt.number)
        if job.dies == "running" and not attempt.redelivered:
            await asyncio.sleep(600)
        if job.dies == "written":
            app.store.fatal.add(attempt.job_id)
        if job.dies in ("retry", "bury") and attempt.number == 1:
            dies.fatal.add((attempt.job_id, job.dies))
            raise Retry(600) if job.dies == "retry" else Bury("no paper")
        n: int = job.n
        return n

    async with app.worker():
        await asyncio.sleep(600)


if __name__ == "__main__":
    asyncio.run(main())
