"""A worker that the kernel kills between the confirm of a retry and the ack: `python -m tests.fault.apps.dying URL QUEUE TYPE`."""

import asyncio
import os
import signal
import sys

from leveret import App, Job, Queue, Retry
from leveret.brokers.rabbitmq.taker import RabbitDelivery


class Dying:
    """The app; its only job is retried."""

    def __init__(self, url: str, queue: str, type: str) -> None:
        self.queue = Queue(queue, type=type, priorities=False)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        self.app = App("dying", broker=url)

        class Work(Job, name="work", queue=self.queue):
            """A job to run."""

        async def run(job: Work) -> Retry:
            return Retry(0.5)  # not at once: the copy would be delivered to the same worker, perhaps before its confirm

        self.Work = Work
        self.app.handler(job=Work)(run)


async def main() -> None:
    async with Dying(*sys.argv[1:]).app.worker():
        await asyncio.sleep(60)


if __name__ == "__main__":
    RabbitDelivery.done = lambda self: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    asyncio.run(main())
