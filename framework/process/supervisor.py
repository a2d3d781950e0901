"""`leveret work --processes N` or `--reload`: a parent that starts the workers and restarts one that dies, with back-off."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
import time
from contextlib import suppress

import msgspec

from ..backoff import full_jitter
from ..errors import ConfigurationError
from ..waits import first_of
from .options import WorkOptions
from .signals import HURRY_S, Stop

logger = logging.getLogger("leveret.supervisor")

STEADY_S = 60.0
"""A worker that ran so long before it died is restarted as if for the first time."""
REFUSED = 2
"""Exit code of a worker whose configuration is wrong; restarting it wouldn't help."""
_KILL_AFTER_S = 10.0


async def supervise(options: WorkOptions) -> int:
    """Run `options.processes` workers until a signal; return the worst exit code of the last ones.

    A worker that exits with 2 (something is configured wrong) ends all, and its reason is told once; with `--reload` it
    waits for a file to change. The workers hold one end of a pipe, and drain when the other goes with this process,
    however it died. A second signal cuts off what still runs.
    """
    workers = _Workers(options)
    watching = _watch(workers) if options.reload else None
    try:
        codes = await asyncio.gather(*(workers.keep(index) for index in range(options.processes)))
    finally:
        if watching is not None:
            watching.cancel()
        workers.close()
    return max(codes)


class _Workers:
    """The worker processes, and how they are to end."""

    def __init__(self, options: WorkOptions) -> None:
        self._options = options
        self._running: set[asyncio.subprocess.Process] = set()
        self._reloading: set[int] = set()
        self._stop = Stop(self._terminate, hurry=self._terminate)
        self._changed = asyncio.Event()
        self._refused = False
        self._lifeline, self._ours = os.pipe()
        self._reasons, self._reason = os.pipe()
        os.set_blocking(self._reasons, False)

    @property
    def stop(self) -> asyncio.Event:
        """Set once they are to end."""
        return self._stop.asked

    def reload(self) -> None:
        """Let all workers drain, and start them anew."""
        self._refused = False
        self._reloading.update(child.pid for child in self._running)
        self._terminate()
        self._changed.set()
        self._changed.clear()  # wakes who waits now

    def close(self) -> None:
        """Let go of the pipes: workers that are left drain."""
        for end in (self._lifeline, self._ours, self._reasons, self._reason):
            os.close(end)

    def _terminate(self) -> None:
        for child in self._running:
            with suppress(ProcessLookupError):
                child.terminate()

    async def keep(self, index: int) -> int:
        """Keep one worker running until the end; return its last exit code."""
        deaths = 0
        while True:
            began = time.monotonic()
            try:
                child = await self._start(index)
            except OSError as error:
                what = f"worker number {index} can't be started: {error}"
            else:
                code = await self._ended(child)
                reloaded = child.pid in self._reloading
                self._reloading.discard(child.pid)
                if self._stop.asked.is_set():
                    # a SIGTERM that came before its handler was there ended a worker that hadn't begun
                    return {0: 0, -signal.SIGTERM: 0, REFUSED: REFUSED}.get(code, 1)
                if code == REFUSED:
                    self._tell_reason(index)
                    if not self._options.reload:
                        self._stop.asked.set()
                        self._terminate()
                        return REFUSED
                    logger.info("waiting for a file to change")
                    await first_of(self._changed.wait(), self._stop.asked.wait())
                    if self._stop.asked.is_set():
                        return REFUSED
                    continue
                if reloaded:
                    continue
                what = f"worker {child.pid} (number {index}) died with {_death(code)}"
            deaths = 1 if time.monotonic() - began > STEADY_S else deaths + 1
            wait_s = full_jitter(deaths, base_s=0.5, cap_s=30.0, rng=random.Random())
            logger.error("%s; it is restarted in %.1f s", what, wait_s)
            await first_of(self._stop.asked.wait(), self._changed.wait(), timeout_s=wait_s)
            if self._stop.asked.is_set():
                return 1

    async def _start(self, index: int) -> asyncio.subprocess.Process:
        options = msgspec.structs.replace(
            self._options, lifeline=self._lifeline, report=self._reason, index=index, reload=False
        )
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "leveret.process.main",
            msgspec.json.encode(options).decode(),
            pass_fds=[self._lifeline, self._reason],
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # a ^C in the terminal reaches this process, which passes it on once
        )
        self._running.add(child)
        if self._stop.asked.is_set():
            self._terminate()
        return child

    async def _ended(self, child: asyncio.subprocess.Process) -> int:
        """Wait until `child` has ended, and see to it that it does; return its exit code."""
        waiting = asyncio.ensure_future(child.wait())
        await first_of(asyncio.shield(waiting), self._stop.asked.wait())
        if not waiting.done():
            await first_of(
                asyncio.shield(waiting), self._stop.hurried.wait(), timeout_s=self._options.grace_s + _KILL_AFTER_S
            )
        if not waiting.done() and self._stop.hurried.is_set():
            await first_of(asyncio.shield(waiting), timeout_s=HURRY_S)
        if not waiting.done():
            logger.error("worker %d doesn't end; it is killed", child.pid)
            with suppress(ProcessLookupError):
                child.kill()
        code = await waiting
        self._running.discard(child)
        return code

    def _tell_reason(self, index: int) -> None:
        """Say once why a worker refused: the others most likely say the same."""
        try:
            reason = os.read(self._reasons, 1 << 16).decode(errors="replace").rstrip("\n").rpartition("\n")[2]
        except BlockingIOError:
            reason = f"leveret: worker number {index} ended with exit code {REFUSED} and didn't say why"
        if not self._refused:
            print(reason, file=sys.stderr, flush=True)  # noqa: T201 - a terminal's line
        self._refused = True


def _watch(workers: _Workers) -> asyncio.Task[None]:
    """Reload the workers whenever a Python file below the working directory changes."""
    try:
        from watchfiles import PythonFilter, awatch  # pyright: ignore[reportUnknownVariableType] - it lists trio's types, if installed
    except ImportError:
        msg = "--reload needs watchfiles: pip install 'leveret[reload]'"
        raise ConfigurationError(msg) from None

    async def watch() -> None:
        async for changes in awatch(".", watch_filter=PythonFilter(), stop_event=workers.stop):
            logger.info("%s changed, reloading", ", ".join(sorted(path for _, path in changes)[:3]))
            workers.reload()

    def say(ended: asyncio.Task[None]) -> None:
        if not ended.cancelled() and (error := ended.exception()) is not None:
            logger.error("files aren't watched any more: %s; restart to get --reload back", error)

    task = asyncio.get_running_loop().create_task(watch())
    task.add_done_callback(say)
    return task


def _death(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
