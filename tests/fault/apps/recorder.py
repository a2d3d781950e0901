"""An app whose handlers write down what they do. Run by workers, published to by tests.

A worker imports `app`, made out of the environment; a test makes the same with `Recorder`.
"""

import asyncio
import os
import signal
import time

import msgspec

from leveret import App, Attempt, Job, Queue, Settings
from leveret.middleware import Retries
from tests.fault.apps import diary


class Plan(msgspec.Struct, frozen=True):
    """What a worker process is told."""

    queue: str
    type: str
    url: str
    file: str
    settings: dict[str, float] = {}


class Recorder:
    """The app and its jobs. Each line of the file: verb, job id, attempt, process, the machine's monotonic clock, what the job says."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.queue = queue = Queue(plan.queue, type=plan.type)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        settings = Settings(**plan.settings)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        self.app = App("fault", broker=plan.url, middleware=[Retries(base_s=0.2, cap_s=0.4)], settings=settings)

        class Note(Job, name="note", queue=queue):
            seconds: float = 0.0

        class Chore(Job, name="chore", queue=queue):
            seconds: float = 0.0

        class Flaky(Job, name="flaky", queue=queue):
            fails: int

        class Picky(Job, name="picky", queue=queue):
            n: int

            def __post_init__(self) -> None:
                if self.n == 13:
                    raise KeyError("thirteen brings bad luck")

        class Fatal(Job, name="fatal", queue=queue):
            """Ends its process, as a C library may."""

        self.Note, self.Chore, self.Flaky, self.Picky, self.Fatal = Note, Chore, Flaky, Picky, Fatal
        self._file: int | None = None

        async def note(job: Note, attempt: Attempt) -> None:
            self.say("start", attempt)
            await asyncio.sleep(job.seconds)
            self.say("end", attempt)

        def chore(job: Chore, attempt: Attempt) -> None:
            self.say("start", attempt)
            time.sleep(job.seconds)
            self.say("end", attempt)

        async def flaky(job: Flaky, attempt: Attempt) -> None:
            self.say("start", attempt, attempt.envelope.headers.get("x-tenant-id"))
            if attempt.number <= job.fails:
                raise ConnectionError("not yet")
            self.say("end", attempt)

        async def picky(job: Picky, attempt: Attempt) -> None:
            self.say("end", attempt)

        async def fatal(job: Fatal, attempt: Attempt) -> None:
            self.say("start", attempt)
            await asyncio.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)

        for function, job_class in ((note, Note), (chore, Chore), (flaky, Flaky), (picky, Picky), (fatal, Fatal)):
            self.app.handler(job=job_class)(function)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]

    def say(self, verb: str, attempt: Attempt, *words: object) -> None:
        """Append one line."""
        if self._file is None:
            self._file = diary.open_diary(self.plan.file)
        diary.write(self._file, verb, attempt.job_id, attempt.number, os.getpid(), time.monotonic(), *words)

    def lines(self, verb: str = "") -> list[list[str]]:
        """What the handlers wrote so far, of one verb or all of it."""
        return [words for words in diary.read(self.plan.file) if not verb or words[0] == verb]

    def ids(self, verb: str) -> list[str]:
        """The jobs of `verb`, in order, each as often as it is there."""
        return [words[1] for words in self.lines(verb)]


if "FAULT_PLAN" in os.environ:
    app = Recorder(msgspec.json.decode(os.environ["FAULT_PLAN"], type=Plan)).app
