"""The parent process of `leveret work --processes N` or `--reload`: starts the workers and restarts one that dies, with back-off."""

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
from .shared import make_shared
from .signals import HURRY_S, Stop, ignores_hangups
from .streams import tell

logger = logging.getLogger("leveret.supervisor")

STEADY_S = 60.0
"""After a worker has run longer than this, its back-off starts from the beginning."""
REFUSED = 2
"""Exit code of a worker with a wrong configuration; a restart wouldn't help."""
_KILL_AFTER_S = 10.0


async def supervise(options: WorkOptions) -> int:
    """Run `options.processes` workers until a signal; return the highest of their last exit codes.

    A worker that exits with 2 (wrong configuration) ends all workers, and its reason is printed once. With `--reload`, the
    supervisor waits for a file to change instead. The workers hold one end of a pipe and drain when the other end closes, which
    it does however this process ends. A second signal cuts off the jobs that still run.
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
    """Starts the worker processes, restarts them and ends them."""

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
        self._shared = self._make_shared()

    @property
    def stop(self) -> asyncio.Event:
        """Set when the workers are asked to stop."""
        return self._stop.asked

    def _make_shared(self) -> int | None:
        return make_shared() if self._options.processes > 1 else None

    def _close_shared(self) -> None:
        if self._shared is not None:
            os.close(self._shared)

    def reload(self) -> None:
        """Let all workers drain, and start them again."""
        self._refused = False
        self._close_shared()
        self._shared = self._make_shared()  # the new code may have other rate limits in the same places
        self._reloading.update(child.pid for child in self._running)
        self._terminate()
        self._changed.set()
        self._changed.clear()  # wakes only those who wait now

    def close(self) -> None:
        """Close the pipes: workers that still run then drain."""
        for end in (self._lifeline, self._ours, self._reasons, self._reason):
            os.close(end)
        self._close_shared()

    def _terminate(self) -> None:
        for child in self._running:
            with suppress(ProcessLookupError):
                child.terminate()

    async def keep(self, index: int) -> int:
        """Keep one worker running until the stop; return its last exit code."""
        deaths = 0
        while True:
            began = time.monotonic()
            try:
                child = await self._start(index)
            except OSError as error:
                what = f"worker number {index} couldn't be started: {error}"
            else:
                code = await self._ended(child)
                reloaded = child.pid in self._reloading
                self._reloading.discard(child.pid)
                if self._stop.asked.is_set():
                    # SIGTERM ends a worker that hasn't installed its handler yet, and so has no job
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
            logger.error("%s; restarting it in %.1f s", what, wait_s)
            await first_of(self._stop.asked.wait(), self._changed.wait(), timeout_s=wait_s)
            if self._stop.asked.is_set():
                return 1

    async def _start(self, index: int) -> asyncio.subprocess.Process:
        options = msgspec.structs.replace(
            self._options,
            lifeline=self._lifeline,
            shared=self._shared,
            report=self._reason,
            ignore_hangups=ignores_hangups(),
            index=index,
            reload=False,
        )
        fds = [fd for fd in (self._lifeline, self._shared, self._reason) if fd is not None]
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "leveret.process.main",
            msgspec.json.encode(options).decode(),
            pass_fds=fds,
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # ^C in the terminal reaches only this process, which passes it on once
        )
        self._running.add(child)
        if self._stop.asked.is_set():
            self._terminate()
        return child

    async def _ended(self, child: asyncio.subprocess.Process) -> int:
        """Wait for `child`, and kill it if it doesn't end in time; return its exit code."""
        waiting = asyncio.ensure_future(child.wait())
        await first_of(asyncio.shield(waiting), self._stop.asked.wait())
        if not waiting.done():
            await first_of(
                asyncio.shield(waiting), self._stop.hurried.wait(), timeout_s=self._options.grace_s + _KILL_AFTER_S
            )
        if not waiting.done() and self._stop.hurried.is_set():
            await first_of(asyncio.shield(waiting), timeout_s=HURRY_S)
        if not waiting.done():
            logger.error("worker %d didn't end in time; killing it", child.pid)
            with suppress(ProcessLookupError):
                child.kill()
        code = await waiting
        self._running.discard(child)
        return code

    def _tell_reason(self, index: int) -> None:
        """Print once why a worker refused to start: the others most likely have the same reason."""
        try:
            reason = os.read(self._reasons, 1 << 16).decode(errors="replace").rstrip("\n").rpartition("\n")[2]
        except BlockingIOError:
            reason = f"leveret: worker number {index} ended with exit code {REFUSED} and gave no reason"
        if not self._refused:
            tell(reason)
        self._refused = True


def _watch(workers: _Workers) -> asyncio.Task[None]:
    """Reload the workers when a Python file in the working directory or below changes."""
    try:
        from watchfiles import PythonFilter, awatch  # pyright: ignore[reportUnknownVariableType] - its annotations need trio, which may be missing
    except ImportError:
        msg = "--reload needs the package watchfiles: pip install watchfiles"
        raise ConfigurationError(msg) from None

    async def watch() -> None:
        async for changes in awatch(".", watch_filter=PythonFilter(), stop_event=workers.stop):
            logger.info("%s changed, reloading", ", ".join(sorted(path for _, path in changes)[:3]))
            workers.reload()

    def report(ended: asyncio.Task[None]) -> None:
        if not ended.cancelled() and (error := ended.exception()) is not None:
            logger.error("--reload stopped watching files: %s; restart `leveret work`", error)

    task = asyncio.get_running_loop().create_task(watch())
    task.add_done_callback(report)
    return task


def _death(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
