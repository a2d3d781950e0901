"""The lab without `async`, for plain `def` tests such as Django's `TestCase`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, TypeVar, Unpack, final

from ..app import App
from ..handle import BlockingHandle, Handle, blocking
from ..job import Job
from ..options import PublishOptions
from ..status import Status
from ..store import Abort
from ..waits import first_of
from .callers import CallersThread
from .lab import IN_HANDLER, RESULT_S
from .memory import MemoryLab, memory_lab
from .records import Delayed, Records

_R = TypeVar("_R")
_T = TypeVar("_T")


@final
class SyncLab(Records):
    """The lab of `running_sync`: as `Lab`, but every method is a plain one."""

    def __init__(self, lab: MemoryLab, callers: CallersThread) -> None:
        self._lab = lab
        self._callers = callers
        self._published, self._runs = lab._published, lab._runs  # pyright: ignore[reportPrivateUsage]

    def __repr__(self) -> str:
        return repr(self._lab)

    @property
    def now(self) -> datetime:
        """As `Lab.now`."""
        return self._lab.now

    @property
    def delayed(self) -> Sequence[Delayed]:
        """As `Lab.delayed`."""
        return self._lab.delayed

    def publish(self, job: Job[_T], **options: Unpack[PublishOptions]) -> BlockingHandle[_T]:
        """As `Lab.publish`."""
        return blocking(self._callers.run(self._lab.publish(job, **options)), self._ask)

    def _ask(self, handle: Handle[_R], ask: Callable[[Handle[_R]], Coroutine[Any, Any, _T]], _timeout_s: float) -> _T:
        return self._callers.run(ask(handle))

    def status(self, job_id: str, /) -> Status:
        """As `Lab.status`."""
        return self._callers.run(self._lab.status(job_id))

    def result(self, handle: BlockingHandle[_T], /) -> _T:
        """As `Lab.result`."""
        self.drain()
        return handle.result(timeout_s=RESULT_S)

    def abort(self, job_id: str, /) -> Abort:
        """As `Lab.abort`."""
        return self._callers.run(self._lab.abort(job_id))

    def advance(self, by: float | timedelta, /) -> None:
        """As `Lab.advance`; cron functions run in the caller's thread."""
        self._lab.advance(by)

    def advance_to(self, moment: datetime, /) -> None:
        """As `Lab.advance_to`; cron functions run in the caller's thread."""
        self._lab.advance_to(moment)

    def run_due(self) -> None:
        """As `Lab.run_due`."""
        self._run_jobs(self._lab.run_due())

    def drain(self) -> None:
        """As `Lab.drain`."""
        self._run_jobs(self._lab.drain())

    def _run_jobs(self, work: Coroutine[Any, Any, None]) -> None:
        if self._callers.in_handler:
            work.close()
            raise RuntimeError(IN_HANDLER)
        self._callers.run(work)


async def _opened(
    app: App[Any], resources: Any, now: datetime | None, callers: CallersThread, *, cron: bool
) -> tuple[MemoryLab, Callable[[], Coroutine[Any, Any, None]]]:
    """Open a lab; return the lab and the function that closes it. One task does both, as task groups of a lifespan require."""
    ready: asyncio.Future[MemoryLab] = asyncio.get_running_loop().create_future()
    leave = asyncio.Event()

    async def host() -> None:
        async with memory_lab(app, resources, now, cron=cron, callers=callers) as lab:
            ready.set_result(lab)
            await leave.wait()

    async def close() -> None:
        leave.set()
        await hosting

    hosting = asyncio.create_task(host())
    await first_of(ready, asyncio.shield(hosting))
    return ready.result(), close


@contextmanager
def sync_lab(app: App[Any], resources: Any, now: datetime | None, *, cron: bool) -> Generator[SyncLab, None, None]:
    """Run `app` in a lab on a loop that the caller's thread drives."""
    if asyncio._get_running_loop() is not None:
        msg = "running_sync can't be used inside an event loop; in an `async def` test, write async with running(app)"
        raise RuntimeError(msg)
    callers = CallersThread()
    try:
        lab, close = callers.run(_opened(app, resources, now, callers, cron=cron))
        try:
            yield SyncLab(lab, callers)
        finally:
            callers.run(close())
    finally:
        callers.close()
