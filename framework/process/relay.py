"""The process of `leveret relay`."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ..app import App
from ..publishing.relay import Relay
from ..settings import redact_url
from ..waits import first_of
from .loop import run_loop
from .signals import Stop, exit_now

logger = logging.getLogger("leveret.relay")

FINISH_S = 10.0
"""How long the batches under way may take to end after a signal, seconds. None takes so long."""


async def run(app: App[Any]) -> int:
    """Relay until SIGTERM, SIGINT or SIGHUP; return the exit code.

    0: the batches under way at the signal have ended. 1: a second signal cut them off; their jobs are published again.
    """
    relay = Relay.of(app)
    running = asyncio.ensure_future(relay.run())
    stop = Stop(relay.stop)
    logger.info("relays from %s to %s", redact_url(app.outbox_url() or ""), redact_url(app.broker_url() or ""))
    try:
        await first_of(asyncio.shield(running), stop.asked.wait())
        await first_of(asyncio.shield(running), stop.hurried.wait(), timeout_s=FINISH_S)
        logger.info(
            "stopped%s: %s published, %s moved to the dead letters",
            "" if running.done() else ", cut off",
            relay.published,
            relay.buried,
        )
        return 0 if running.done() else 1
    finally:
        running.cancel()
        await asyncio.wait({running})
        await relay.close()


def main(app: App[Any]) -> int:
    """Relay on a new event loop; return the exit code."""
    code = run_loop(run(app))
    if code:
        exit_now(code)
    return code
