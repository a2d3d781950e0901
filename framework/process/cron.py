"""The process of `leveret cron`."""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timezone
from typing import Any
from zoneinfo import ZoneInfo

from ..app import App
from ..cron.scheduler import FINISH_S, Scheduler
from ..errors import ConfigurationError
from ..waits import first_of
from .loop import run_loop
from .signals import Stop, exit_now

logger = logging.getLogger("leveret.cron")


async def run(app: App[Any]) -> int:
    """Run the app's schedules until SIGTERM, SIGINT or SIGHUP; return the exit code.

    0: every publish in progress at the signal has ended. 1: a publish didn't end within `FINISH_S`, or a second signal cut it off.
    """
    app.import_modules()
    enabled = [schedule for schedule in app.schedules if schedule.enabled]
    if not enabled:
        msg = f"app {app.name!r} has no enabled schedule; add one with @app.cron(…) and list its module in App(modules=[…])"
        raise ConfigurationError(msg)
    runtime = app.runtime()
    broker = app.open_broker(runtime)
    sender = app.sender(broker, runtime)
    scheduler = Scheduler(app.name, enabled, sender, runtime)
    running = asyncio.ensure_future(scheduler.run())
    stop = Stop(scheduler.stop)
    for schedule in enabled:
        first = schedule.next(datetime.now(timezone.utc))
        at = "never" if first is None else first.astimezone(ZoneInfo(schedule.tz)).isoformat()
        logger.info("schedule %s (%s in %s): next slot %s", schedule.name, schedule.expression, schedule.tz, at)
    try:
        await first_of(asyncio.shield(running), stop.asked.wait())
        await first_of(asyncio.shield(running), stop.hurried.wait(), timeout_s=FINISH_S)
        if running.done():
            logger.info("stopped")
            return 0
        logger.error("stopped, %d slots cut off: their jobs may or may not have been published", scheduler.emitting)
        return 1
    finally:
        running.cancel()
        await asyncio.wait({running})
        await sender.close()
        await broker.close()


def main(app: App[Any]) -> int:
    """Run the app's schedules on a new event loop; return the exit code."""
    code = run_loop(run(app))
    if code:
        exit_now(code)  # the interpreter's own exit would wait for a cron function that doesn't return
    return code
