"""A server and the processes that it forks, to stop, kill and pause as one."""

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from tests.nodes import private_folder, spawn, tail, why_not_up
from tests.postgres.installation import Installation

_BOOT_S, _STOP_S = 90.0, 60.0
_REMOVE = 0  # IPC_RMID


class Process:
    """A server in a folder of its own. It is this thread's child and ends with it, even if the tests are killed (on Linux).

    `kill9` and `pause` need Linux's /proc.
    """

    def __init__(self, what: str, installation: Installation, *, stops_by: signal.Signals) -> None:
        self._what = what
        self._installation = installation
        self._stops_by = stops_by
        self._process: subprocess.Popen[bytes] | None = None
        self._paused: list[int] = []
        self._guard: subprocess.Popen[bytes] | None = None
        self.folder = private_folder("leveret-postgres-")

    @property
    def pid(self) -> int | None:
        """The process id of the server itself; None while it doesn't run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def log(self) -> Path:
        """All that the server has written."""
        return self.folder / "log"

    async def stop(self) -> None:
        """Stop the server as an administrator would; kill it after 60 s."""
        await self._end(self._stops_by, _STOP_S)

    async def kill9(self) -> None:
        """Stop the server as a power cut would: none of its code runs. Its data stays for the next `start`."""
        if self._process is None or self.pid is None:
            return
        pids = self._hold()
        for pid in pids:
            _send(pid, signal.SIGKILL)
        self._process.wait(10)
        await asyncio.to_thread(_until, lambda: not processes().keys() & set(pids), "dead")
        self._forget_pause()
        self._free_memory()

    def pause(self) -> None:
        """Hang the server with all that it forked: connections stay up, and nothing answers."""
        if self.pid is None or self._paused:
            return
        self._paused = self._hold()
        # Only the server itself ends with the tests. Where they are killed now, the guard reads the end of its pipe: what is
        # paused goes on, and ends.
        self._guard = subprocess.Popen(
            ["sh", "-c", 'read _; kill -CONT "$@"', "guard", *map(str, self._paused)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def resume(self) -> None:
        """End `pause`."""
        for pid in self._paused:
            _send(pid, signal.SIGCONT)
        self._forget_pause()

    async def close(self) -> None:
        """End the server at once, and remove its folder."""
        self.resume()
        await self._end(signal.Signals[f"SIG{self._installation.ends_by}"], 10)
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _run(self, command: Sequence[str], up: Callable[[], Awaitable[bool]]) -> None:
        """Start the server by `command`, and return once it is `up`."""
        argv = self._installation.argv(self.folder, *command)
        self._process = spawn(argv, env=self._installation.environ(self.folder), output=self.log)
        if failed := await why_not_up(self._process, up, _BOOT_S):
            log = tail(self.log)
            await self.close()
            raise RuntimeError(f"{self._what} {failed}: {log}")

    async def _end(self, number: signal.Signals, limit_s: float) -> None:
        if self._process is not None and self.pid is not None:
            self._process.send_signal(number)
            try:
                await asyncio.to_thread(self._process.wait, limit_s)
            except subprocess.TimeoutExpired:
                await self.kill9()

    def _hold(self) -> list[int]:
        """Stop the server, which then forks no more, and what it forked, and return them all, the server last."""
        assert self._process is not None
        server = self._process.pid
        _stop([server])
        forked = self._forked()
        _stop(forked)
        return [*forked, server]

    def _forked(self) -> list[int]:
        return [pid for pid, (_, parent) in processes().items() if self._process and parent == self._process.pid]

    def _forget_pause(self) -> None:
        self._paused.clear()
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None

    def _free_memory(self) -> None:
        """Free the 56 bytes of shared memory of a killed PostgreSQL, which outlive it; a power cut would have freed them too."""
        with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
            _, identifier = (self.folder / "data" / "postmaster.pid").read_text().splitlines()[6].split()
            ctypes.CDLL(None).shmctl(int(identifier), _REMOVE, None)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
        os.kill(pid, number)


def _stop(pids: Sequence[int]) -> None:
    for pid in pids:
        _send(pid, signal.SIGSTOP)
    _until(lambda: all(state == "T" for pid, (state, _) in processes().items() if pid in pids), "stopped")


def _until(true: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + 10
    while not true():
        if time.monotonic() > ends:
            raise RuntimeError(f"not {what} after 10 s")
        time.sleep(0.002)  # another's processes have no event


def processes() -> dict[int, tuple[str, int]]:
    """Return the state and the parent of each process that isn't dead."""
    found: dict[int, tuple[str, int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, parent = file.read_text().rpartition(")")[2].split()[:2]
            if state not in {"Z", "X"}:
                found[int(file.parent.name)] = state, int(parent)
    return found
