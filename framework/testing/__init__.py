"""Run an app in a test: memory broker, manual clock, no sleeping.

    async with running(app, resources=fakes) as lab:
        receipt = await lab.publish(SendInvoice(order_id=7, email="a@example.org"))
        await lab.drain()
        assert [run.number for run in lab.attempts(receipt.job_id)] == [1, 2, 3]

Jobs are really encoded, queued, delivered, retried and buried; only time and the broker are simulated. `running_sync` is the same
for tests without `async`. The pytest plugin has the fixtures `leveret_running` and `leveret_rabbitmq`; the latter runs the same
test on a real RabbitMQ.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, AbstractContextManager
from datetime import datetime
from typing import TypeVar, cast

from ..app import App
from ..blocks import AsyncBlock
from .attempt import MadeAttempt, attempt
from .lab import UNSET, Lab, LeveretRunning
from .memory import memory_lab
from .records import Delayed, Published, Run
from .sync import SyncLab, sync_lab

_R = TypeVar("_R")

_ADVICE = "write `async with running(app) as lab:` in an `async def`, or `with running_sync(app) as lab:` in a `def`"

__all__ = [
    "Delayed",
    "Lab",
    "LeveretRunning",
    "MadeAttempt",
    "Published",
    "Run",
    "SyncLab",
    "attempt",
    "running",
    "running_sync",
]


def running(
    app: App[_R], *, resources: _R = UNSET, now: datetime | None = None, cron: bool = True
) -> AbstractAsyncContextManager[Lab, None]:
    """Run `app` in a lab, with `resources` instead of those of its lifespan; without `resources`, the lifespan runs.

    The lab's clock begins at `now`, an aware datetime, or at the real time. With `cron=False`, `advance` leaves the cron
    schedules out. All publishers of `app`, including blocking ones, publish to the lab meanwhile. Leaving the block cuts off
    jobs that still run, after a grace of 1 s. An app without handlers only publishes.
    """
    return AsyncBlock[Lab](memory_lab(app, resources, now, cron=cron), "running(app)", _ADVICE)


def running_sync(
    app: App[_R], *, resources: _R = UNSET, now: datetime | None = None, cron: bool = True
) -> AbstractContextManager[SyncLab, None]:
    """Run `app` in a lab without `async`, for plain `def` tests; otherwise as `running`.

    `def` handlers and cron functions run in the caller's thread, one after another, so they see its thread-locals and the
    transaction of a `TestCase`. `async def` handlers run on the lab's loop, which the caller's thread drives inside the lab's
    methods. RuntimeError inside a running event loop.
    """
    return cast("AbstractContextManager[SyncLab, None]", sync_lab(app, resources, now, cron=cron))
