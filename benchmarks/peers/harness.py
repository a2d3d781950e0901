"""Starts contestants, watches them run, and refuses a figure when a job is missing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from pamqp.commands import Basic

from benchmarks.peers.contestants import MADE, NODE, PACKAGE, ROOT, C, Contestant, environment, queue
from benchmarks.peers.shape import KEPT_S, Ran
from tests.rabbit.raw import connect

STALL_S = 60.0
"""A worker that runs nothing for so long has lost the rest."""
POLL_S = 0.004
ACKS_S = 0.5


class Refused(Exception):
    """There is no figure, and the message says why."""


def _run(command: Sequence[str], env: dict[str, str], timeout_s: float) -> dict[str, Any]:
    """Run a program that prints JSON as its last line."""
    return json.loads(_output(command, env, timeout_s).splitlines()[-1])


def _output(command: Sequence[str], env: dict[str, str], timeout_s: float) -> str:
    """Run a program, and return what it prints."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        msg = f"{' '.join(command[:4])} … took more than {timeout_s:.0f} s"
        raise Refused(msg) from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own session: what it started, and nothing else
        process.wait()
    if process.returncode:
        msg = f"{' '.join(command[:4])} … ended with {process.returncode}: {' '.join(err.split())[-400:]}"
        raise Refused(msg)
    return out


def prepare(contestant: Contestant, url: str, kind: str) -> None:
    """Make the contestant's tables in an empty database."""
    for command in contestant.prepare:
        _output(command, environment(contestant, url=url, kind=kind), 60)


def publish(
    contestant: Contestant,
    url: str,
    kind: str,
    how: str,
    jobs: int,
    seconds: float = 0.0,
    *,
    size: int = 200,
    mode: str = "plain",
) -> dict[str, Any]:
    """Publish by the contestant's own means, in a process of its own; see publish.py for `how`."""
    env = environment(contestant, url=url, kind=kind, size=size, mode=mode)
    if contestant.commands is None:
        return program(contestant, url, kind, how, jobs, seconds, size=size)
    return _run([*_publishing(contestant, how, jobs), str(seconds)], env, 900)


def _publishing(contestant: Contestant, how: str, jobs: int) -> list[str]:
    return [sys.executable, "-m", f"{PACKAGE}.publish", contestant.module, how, str(jobs)]


class Keeper:
    """A publishing process that keeps the handles of its jobs, and reads the results of all when it is asked to."""

    def __init__(self, contestant: Contestant, url: str, kind: str, jobs: int, store: str) -> None:
        env = environment(contestant, url=url, kind=kind, mode="results", store=store)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            _publishing(contestant, "kept", jobs),
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._log.close()

    def published(self) -> dict[str, float]:
        """Wait until it has published, and return what that took."""
        return self._line()

    def read(self) -> dict[str, float]:
        """Let it read the results of all its jobs, and return what that took."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> dict[str, float]:
        out = self._process.stdout
        assert out is not None
        ready, _, _ = select.select([out], [], [], KEPT_S)
        if line := out.readline() if ready else b"":
            found: dict[str, float] = json.loads(line)
            return found
        self._log.seek(0)
        said = " ".join(self._log.read().decode(errors="replace").split())[-400:]
        msg = f"its publisher {'ended' if ready else f'said nothing for {KEPT_S} s'}: {said}"
        raise Refused(msg)


def program(
    contestant: Contestant, url: str, kind: str, role: str, jobs: int, seconds: float = 0.0, *, size: int = 200
) -> dict[str, Any]:
    """Run one of those that measure themselves."""
    env = environment(contestant, url=url, kind=kind, size=size)
    if contestant is NODE:
        return _run(["node", str(Path(__file__).parent / NODE.file), role, str(jobs)], env, 300)
    assert contestant is C
    parts = urlsplit(url)
    address = [
        parts.hostname or "127.0.0.1",
        str(parts.port or 5672),
        unquote(parts.username or "guest"),
        unquote(parts.password or "guest"),
    ]
    told = [
        *address,
        unquote(parts.path[1:]) or "/",
        queue(contestant, kind),
        kind,
        str(size),
        role,
        str(jobs),
        str(seconds),
    ]
    return _run([str(MADE / "with_librabbitmq"), *told], env, 300)


def import_ms(contestant: Contestant, url: str, kind: str) -> float:
    """Return how long the imports of its app and its broker take, the interpreter's own start apart."""
    modules = ", ".join((contestant.module, *contestant.imports))
    code = f"import time; begun = time.perf_counter(); import {modules}; print((time.perf_counter() - begun) * 1e3)"
    return float(json.dumps(_run([sys.executable, "-c", code], environment(contestant, url=url, kind=kind), 60)))


def outbox(jobs: int, urls: dict[str, str]) -> dict[str, float]:
    """Run `benchmarks.outbox` once, on servers that run already."""
    command = [sys.executable, "-m", "benchmarks.outbox", "--jobs", str(jobs), "--rounds", "1", "--json"]
    return _run(command, {**os.environ, **urls}, 300)


class Worker:
    """A contestant's worker processes, and what they have run."""

    def __init__(
        self,
        contestant: Contestant,
        url: str,
        kind: str,
        *,
        processes: int = 1,
        mode: str = "plain",
        size: int = 200,
        store: str = "",
    ) -> None:
        assert contestant.commands is not None
        self._folder = Path(tempfile.mkdtemp(prefix="leveret-bench-"))
        slots = self._folder / "slots"
        slots.mkdir()
        self._slots, self._mode, self._maps = slots, mode, dict[int, memoryview]()
        self._wake, self._url = contestant.wake, url
        env = environment(
            contestant, url=url, kind=kind, mode=mode, size=size, processes=processes, slots=slots, store=store
        )
        self.begun_ns = time.monotonic_ns()
        with (self._folder / "log").open("ab") as log:
            self._processes = [
                subprocess.Popen(
                    command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
                for command in contestant.commands(processes)
            ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for words in self._maps.values():
            words.release()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _each(self) -> dict[int, memoryview]:
        for path in self._slots.iterdir():
            if path.name.isdecimal() and int(path.name) not in self._maps:
                with path.open("r+b") as file:
                    self._maps[int(path.name)] = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
        return self._maps

    @property
    def ran(self) -> int:
        """How many jobs ran."""
        return sum(words[0] for words in self._each().values())

    @property
    def first_ns(self) -> int:
        """When the first began, every process having one."""
        return max(words[1] for words in self._each().values())

    @property
    def last_ns(self) -> int:
        """When the last began."""
        return max(words[2] for words in self._each().values())

    @property
    def pids(self) -> list[int]:
        """The processes that ran jobs."""
        return list(self._each())

    def cpu_ns(self) -> int:
        """Return the CPU time of those processes since their first job."""
        return sum(
            time.clock_gettime_ns(((~pid) << 3) | 2) - words[3] for pid, words in self._each().items()
        )  # CPUCLOCK_SCHED of a process

    @property
    def allocations(self) -> int:
        """How many allocations those processes made from the first job to the last."""
        return sum(words[4] for words in self._each().values())

    def rss_mb(self) -> float:
        """Return the resident memory of the one process that ran jobs."""
        (pid,) = self.pids
        line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    def samples(self) -> list[int]:
        """Return how late each job ran, ns, in order of runs."""
        return [late for words in self._each().values() for late in words[Ran.HEAD : Ran.HEAD + words[0]]]

    def wait(self, jobs: int, stall_s: float = STALL_S) -> None:
        """Return once so many ran; refuse when nothing runs any more, or too many did."""
        seen, end = -1, time.monotonic() + stall_s
        while (ran := self.ran) < jobs:
            now = time.monotonic()
            if ran != seen:
                seen, end = ran, now + stall_s
            dead = [process for process in self._processes if process.poll() is not None]
            if now > end or dead:
                why = "its worker ended" if dead else f"nothing ran for {stall_s:.0f} s"
                msg = f"only {ran} of {jobs} jobs ran: {why}: {self._tail()}"
                raise Refused(msg)
            time.sleep(POLL_S)

    def finish(self, jobs: int) -> None:
        """Give it a moment for its last acks, then kill it: what it hadn't acked comes back. Refuse if more ran than there are."""
        for _ in range(4 if self._wake else 0):  # one wake-up may leave some
            self._poke()
            time.sleep(0.2)
        time.sleep(ACKS_S)
        self.stop()
        if (ran := self.ran) != jobs:
            msg = f"{ran} runs of {jobs} jobs"
            raise Refused(msg)

    def _poke(self) -> None:
        async def ping() -> None:
            properties = Basic.Properties(content_type="application/json", content_encoding="utf-8")
            async with connect(self._url) as raw:
                await raw.publish(
                    "", b'{"method": "ping", "arguments": {}}', exchange=self._wake, properties=properties
                )

        asyncio.run(ping())

    def stop(self) -> None:
        """Kill its processes: each is the leader of a session of its own, or says its id in a slot."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pid in self._each():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _tail(self) -> str:
        return " ".join((self._folder / "log").read_text(errors="replace").split())[-600:]


@contextlib.contextmanager
def embedded_file(folder: Path) -> Iterator[str]:
    """Make a place for a SQLite file; yields its URL."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=folder) as inner:
        yield f"sqlite:///{inner}/jobs.db"
