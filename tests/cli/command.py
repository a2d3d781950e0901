"""The installed `leveret`, as a shell would run it, in a folder with an app of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LEVERET = str(Path(sys.executable).with_name("leveret"))
PATIENCE_S = 40.0
"""How long anything that must happen may take on a loaded machine; it never takes so long where all is well."""

APP = """
import asyncio, os
from contextlib import asynccontextmanager
from pathlib import Path

from leveret import App, Attempt, Bury, Job, Priority, Queue
from leveret.middleware import Retries, Rule, Timeout

emails = Queue("emails")
reports = Queue("reports", type="classic")
plain = Queue("plain", priorities=False)


class SendInvoice(Job, name="invoice.send", queue=emails):
    order_id: int
    email: str = "a@example.org"
    seconds: float = 0.0


class Report(Job, name="report.write", queue=reports, priority=Priority.HIGH):
    title: str


class Note(Job, name="note", queue=plain):
    text: str = ""


class Abstract(Job):
    n: int


app = App("shop", default_broker="sqlite:///shop.db", middleware=[Retries(Rule(ValueError, bury=True), max_attempts=4, base_s=1), Timeout(30)])


def said(line):
    with Path("said").open("a") as file:
        file.write(line + "\\n")


@app.handler(middleware=[Timeout(300)])
async def send_invoice(job: SendInvoice, attempt: Attempt) -> None:
    said(f"start {job.order_id} {os.getpid()} attempt={attempt.number} pass={attempt.envelope.passes}")
    if job.order_id < 0:
        raise ValueError(f"order {job.order_id}: no answer from postgresql://shop:hunter2@db/shop")
    await asyncio.sleep(job.seconds)
    said(f"end {job.order_id} {os.getpid()}")


@app.handler
def write_report(job: Report) -> Bury:
    return Bury(f"no paper for {job.title}")


@app.handler
async def note(job: Note) -> None: ...
"""


class Ran:
    """What a command did."""

    def __init__(self, done: "subprocess.CompletedProcess[bytes]") -> None:
        self.code = done.returncode
        self.out = done.stdout.decode(errors="replace")
        self.err = done.stderr.decode()

    @property
    def json(self) -> Any:
        """Its standard output, all of it, as one JSON document."""
        return json.loads(self.out)

    @property
    def line(self) -> str:
        """The one line that it said on standard error."""
        [line] = self.err.splitlines()
        return line

    def __repr__(self) -> str:
        return f"exit {self.code}\n--- out\n{self.out}\n--- err\n{self.err}"


class Running:
    """A command that runs beside the test."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def log(self) -> str:
        """Standard output and error so far."""
        return self._log.read_text(errors="replace")

    def wait_for(self, pattern: str, count: int = 1) -> list[str]:
        """Return what matches `pattern` in its log (group 1 where there is one), once it is there `count` times."""
        until(lambda: len(re.findall(pattern, self.log)) >= count or self.process.poll() is not None, lambda: self.log)
        found = re.findall(pattern, self.log)
        assert len(found) >= count, self.log
        return found

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        """Let it drain."""
        self.send(signal.SIGTERM)
        assert self.end() == 0, self.log

    def end(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for its end; return its exit code."""
        return self.process.wait(timeout_s)


def until(happened: Callable[[], bool], what: Callable[[], str] = lambda: "it didn't happen") -> None:
    """Wait until something outside this process has happened; fail after PATIENCE_S."""
    ends = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < ends, what()
        time.sleep(0.02)


class Project:
    """A folder with an app, in which commands are run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write("shop.py", APP)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    @property
    def said(self) -> list[str]:
        """What the handlers said, a line each."""
        path = self.folder / "said"
        return path.read_text().splitlines() if path.exists() else []

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("LEVERET_", "COLUMNS", "PYTHONPATH", "PYTEST"))
        }
        return {**kept, "LEVERET_APP": "shop:app", **given}

    def run(self, *arguments: str, stdin: str = "", **environment: str) -> Ran:
        """Run `leveret` with these arguments until it ends."""
        return Ran(
            subprocess.run(
                [LEVERET, *arguments],
                cwd=self.folder,
                env=self.environment(environment),
                input=stdin.encode(),
                capture_output=True,
                timeout=PATIENCE_S,
                check=False,
            )
        )

    def call(self, code: str) -> None:
        """Run `code` in Python, in the folder."""
        subprocess.run(
            [sys.executable, "-c", code], cwd=self.folder, env=self.environment({}), timeout=PATIENCE_S, check=True
        )

    def publish(self, job: str, payload: Mapping[str, object], *options: str, **environment: str) -> str:
        """Publish a job by the command; return its id."""
        ran = self.run("publish", f"shop:{job}", json.dumps(payload), *options, **environment)
        assert ran.code == 0, ran
        return ran.out.strip()

    @contextmanager
    def start(self, *arguments: str, **environment: str) -> Generator[Running, None, None]:
        """Run `leveret` beside the block, in a session of its own; whatever is left of it at the end is killed."""
        log = self.folder / f"log-{time.monotonic_ns()}"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [LEVERET, *arguments],
                cwd=self.folder,
                env=self.environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        running = Running(process, log)
        try:
            yield running
        finally:
            left = children_of(process.pid) | {int(pid) for pid in re.findall(r"worker (\d+) of app", running.log)} - {
                process.pid
            }
            if process.poll() is None:
                process.kill()
                process.wait()
            for pid in filter(alive, left):
                os.kill(pid, signal.SIGKILL)  # workers that this command started, by their ids


def children_of(pid: int) -> set[int]:
    """The processes that `pid` started and that it hasn't seen the end of."""
    try:
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except (FileNotFoundError, ProcessLookupError):
        return set()


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
