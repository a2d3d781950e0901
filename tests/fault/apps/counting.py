"""An app whose handler counts its runs in a file that another process maps: no system call for a job.

A worker imports `app`, made out of the environment; who publishes makes the same with `Counting`.
"""

import mmap
import os
import time
from pathlib import Path

import msgspec

from leveret import App, Job, Queue
from tests.fault.apps.recorder import Plan

_WORDS = 2  # the runs, and the slowest way from publish to handler in microseconds


class Counting:
    """The app and its job, and the counts of its one worker process."""

    def __init__(self, plan: Plan) -> None:
        self._file = Path(plan.file)
        if not self._file.exists():
            self._file.write_bytes(bytes(8 * _WORDS))
        with self._file.open("r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
        self.app = App("scale", broker=plan.url)

        class Mail(Job, name="mail", queue=Queue(plan.queue)):
            """About 200 bytes."""

            sent_s: float
            text: str = "x" * 150

        async def mail(job: Mail) -> None:
            self._words[0] += 1
            self._words[1] = max(self._words[1], int((time.monotonic() - job.sent_s) * 1e6))

        self.Mail = Mail
        self.app.handler(job=Mail)(mail)

    @property
    def runs(self) -> int:
        """How many jobs ran so far."""
        return self._words[0]

    def slowest_s(self) -> float:
        """Return the slowest way from publish to handler since the last call, seconds."""
        slowest, self._words[1] = self._words[1], 0
        return slowest / 1e6


if "FAULT_PLAN" in os.environ:
    app = Counting(msgspec.json.decode(os.environ["FAULT_PLAN"], type=Plan)).app
