"""Worker processes on a real broker: started, killed, waited for, and what their handlers wrote."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from leveret import Job, Outgoing
from leveret.admin import Admin, Depth
from leveret.runtime import Runtime
from leveret.schemes import broker_module
from tests.fault.apps.recorder import Plan, Recorder
from tests.rabbit.node import Rabbit
from tests.rabbit.proxy import FaultProxy

PATIENCE_S = 40.0
"""How long anything that must happen may take on a loaded machine; it never takes so long where all is well."""
_ROOT = Path(__file__).parents[2]
_LEVERET = str(Path(sys.executable).with_name("leveret"))


async def eventually(
    happened: Callable[[], bool],
    what: Callable[[], str] = lambda: "it didn't happen",
    timeout_s: float = PATIENCE_S,
    every_s: float = 0.02,
) -> None:
    """Wait until something outside this process has happened."""
    ends = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < ends, what()
        await asyncio.sleep(every_s)


class Worker:
    """A `leveret work` process."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def log(self) -> str:
        """What it said so far."""
        return self._log.read_text(errors="replace")

    async def says(self, pattern: str, timeout_s: float = PATIENCE_S) -> str:
        """Wait for `pattern` in its log; return what matches."""
        await eventually(
            lambda: re.search(pattern, self.log) is not None or self.process.poll() is not None,
            lambda: self.log,
            timeout_s,
        )
        found = re.search(pattern, self.log)
        assert found is not None, self.log
        return found[0]

    @property
    def peak_kib(self) -> int:
        """Most memory that it had so far."""
        return self._status("VmHWM")

    @property
    def resident_kib(self) -> int:
        """What it has in memory now."""
        return self._status("VmRSS")

    @property
    def cpu_s(self) -> float:
        """Processor time that it took so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _status(self, field: str) -> int:
        return int(Path(f"/proc/{self.process.pid}/status").read_text().partition(f"{field}:")[2].split()[0])

    def kill9(self) -> None:
        """End it as the kernel's out-of-memory killer does."""
        assert self.process.poll() is None, f"it ended by itself: {self.log}"
        self.process.kill()
        self.process.wait(10)

    def term(self) -> None:
        """Tell it to end."""
        self.process.send_signal(signal.SIGTERM)

    async def ended(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for its end; return its exit code."""
        await eventually(lambda: self.process.poll() is not None, lambda: f"it doesn't end: {self.log}", timeout_s)
        return self.process.returncode

    async def drained(self) -> None:
        """Tell it to end, and see that it does so in order."""
        self.term()
        assert await self.ended() == 0, self.log
        assert not stray_tracebacks(self.log), self.log


def stray_tracebacks(log: str) -> list[str]:
    """Return the lines of `log` with a traceback below that isn't one of a failed run, which every failure of a handler has."""
    stray, record = list[str](), ""
    for line in log.splitlines():
        if not line.startswith(" "):
            record = line
        if "Traceback" in line and " leveret.attempt " not in record:
            stray.append(record)
    return stray


class Bench:
    """One queue of one broker, the app that serves it, and the workers that a test starts."""

    def __init__(self, folder: Path, url: str, type: str = "quorum", **settings: float) -> None:
        name = f"fault-{uuid.uuid4().hex[:12]}"
        self._folder = folder
        self._workers: list[Worker] = []
        self.recorder = Recorder(Plan(name, type, url, str(folder / "wrote"), settings))
        self.queue = self.recorder.queue
        self.app = self.recorder.app

    def start(self, *arguments: str, url: str | None = None, app: str = "recorder") -> Worker:
        """Start a worker of a module of `apps`, with `arguments` of `leveret work`, on another URL if given."""
        plan = self.recorder.plan if url is None else msgspec.structs.replace(self.recorder.plan, url=url)
        log = self._folder / f"log-{len(self._workers)}"
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("LEVERET_", "PYTEST", "PYTHONPATH"))
        }
        environment = {**kept, "FAULT_PLAN": msgspec.json.encode(plan).decode()}
        with log.open("wb") as file:
            process = subprocess.Popen(
                [_LEVERET, "work", f"tests.fault.apps.{app}:app", *arguments],
                cwd=_ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        worker = Worker(process, log)
        self._workers.append(worker)
        return worker

    async def working(self, *arguments: str, url: str | None = None) -> Worker:
        """Start a worker, on another URL if given; return it once it takes jobs."""
        worker = self.start(*arguments, url=url)
        await worker.says("takes jobs from")
        return worker

    async def publish(self, *jobs: Job | Outgoing, timeout_s: float = 60) -> list[str]:
        """Publish `jobs`; return their ids once all are confirmed."""
        async with self.app.publisher() as publisher:
            return [receipt.job_id for receipt in await publisher.publish_many(jobs, timeout_s=timeout_s)]

    async def until_lines(self, verb: str, count: int) -> None:
        """Wait until handlers have written `count` lines of `verb`."""
        await eventually(lambda: len(self.recorder.ids(verb)) >= count, lambda: self.logs)

    async def until_started(self, job_id: str) -> None:
        """Wait until a handler has started with this job."""
        await eventually(lambda: job_id in self.recorder.ids("start"), lambda: self.logs)

    async def until_ended(self, ids: "list[str] | set[str]", timeout_s: float = PATIENCE_S) -> None:
        """Wait until a handler has ended for each of `ids`."""
        wanted = set(ids)

        def missing() -> set[str]:
            return wanted - set(self.recorder.ids("end"))

        await eventually(
            lambda: not missing(),
            lambda: f"{len(missing())} of {len(wanted)} didn't run; workers: {self.logs}",
            timeout_s,
        )

    @property
    def logs(self) -> str:
        """The last lines of what the workers said."""
        return "\n".join(worker.log[-3000:] for worker in self._workers)

    @asynccontextmanager
    async def admin(self) -> AsyncGenerator[Admin, None]:
        """Look into the broker."""
        url = self.recorder.plan.url
        admin = broker_module(url).open_admin(url, Runtime(app="fault"))
        try:
            yield admin
        finally:
            await admin.close()

    async def depth(self) -> Depth:
        """What its queue holds."""
        async with self.admin() as admin:
            return (await admin.depths([self.queue]))[0]

    async def until_empty(self, dead: int = 0) -> None:
        """Wait until nothing is ready, delayed or unsettled, and `dead` are buried."""
        ends = time.monotonic() + PATIENCE_S
        while True:
            depth = await self.depth()
            if depth.ready + (depth.delayed or 0) + (depth.unsettled or 0) == 0 and depth.dead == dead:
                return
            assert time.monotonic() < ends, (depth, self.logs)
            await asyncio.sleep(0.1)

    def close(self) -> None:
        """Kill what is left of its workers."""
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait(10)


@asynccontextmanager
async def link_to(rabbit: Rabbit) -> AsyncGenerator[FaultProxy, None]:
    """A link to the shared broker that can be spoilt."""
    host, _, port = rabbit.url.rpartition("@")[2].partition("/")[0].partition(":")
    if host not in ("127.0.0.1", "localhost") or "guest:guest@" not in rabbit.url:
        pytest.skip("RabbitMQ isn't on this machine, so its link can't be cut or frozen")
    async with FaultProxy(int(port or 5672)) as link:
        yield link
