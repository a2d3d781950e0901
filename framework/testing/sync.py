"""The lab without `async`, for plain `def` tests such as Django's `TestCase`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, Unpack, final

from ..app import App
from ..envelope import Receipt
from ..job import Job
from ..options import PublishOptions
from ..waits import first_of
from .callers import CallersThread
from .lab import IN_HANDLER
from .memory import MemoryLab, memory_lab
from .records import Delayed, Records


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

    def publish(self, job: Job, **options: Unpack[PublishOptions]) -> Receipt:
        """As `Lab.publish`."""
        return self._callers.run(self._lab.publish(job, **options))

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
