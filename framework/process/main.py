"""One worker process: `leveret work` hands over to `python -m leveret.process.main`.

Stopping, in order: stop taking → give back what hasn't started → finish within the grace → flush what was settled →
close. Exit 0: drained. 1: the grace was over, what was cut off is delivered again. 2: something is configured wrong.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import traceback
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import msgspec

from ..app import App
from ..consuming.worker import working
from ..errors import ConfigurationError, LeveretError
from ..outcome import Kind
from ..settings import redact
from ..waits import first_of
from .loading import load_app
from .logs import report_error, set_up_logs
from .loop import run_loop
from .options import WorkOptions
from .signals import HURRY_S, Stop, exit_now

logger = logging.getLogger("leveret.worker")

_SAID = {
    Kind.RETRY: "retried",
    Kind.SNOOZE: "snoozed",
    Kind.BURY: "buried",
    Kind.UNDECODABLE: "buried as undecodable",
    Kind.UNKNOWN: "sent back as unknown",
    Kind.NOT_STARTED: "given back",
    Kind.LOST: "that the broker delivers again, since their channel or lease was gone",
}
"""How the last line of a worker names an ending; the others by their word."""


async def run(options: WorkOptions) -> int:
    """Run a worker process until a signal, its supervisor's end or a fault that waiting can't mend; return its exit code."""
    app = load_app(options.app)
    # a lifespan's end, or a connection's, that doesn't come isn't waited for
    stop = Stop(hurry=lambda: asyncio.get_running_loop().call_later(HURRY_S, _cut_off))
    if options.lifeline is not None:
        stop.ask_at_end_of(options.lifeline)
    try:
        async with working(
            app,
            queues=list(options.queues),
            limits=options.limits,
            runtime=app.runtime(options.processes),
            grace_s=options.grace_s,
            hurry=stop.hurried,
            lifespan=partial(_lifespan, app, stop),
        ) as work:
            names = ", ".join(f"{s.queue.name} (prefetch {s.prefetch})" for s in work.consumer.subscriptions)
            takes = "takes" if work.consumption.ready else "will take, once the broker is there,"
            logger.info(
                "worker %s of app %s %s from %s on %s",
                os.getpid(),
                app.name,
                takes,
                names,
                redact(app.broker_url() or ""),
            )
            await first_of(stop.asked.wait(), work.consumption.failed())
            logger.info(
                "stopping: %d running, %d held; up to %g s, a second signal cuts off",
                work.consumer.running,
                work.consumer.held,
                options.grace_s,
            )
    except asyncio.CancelledError:
        if not stop.interrupted:
            raise
        logger.info("stopped while its lifespan was starting")
        return 0
    counts = work.consumer.counts
    ended = (
        ", ".join(
            f"{counts[kind]} {_SAID.get(kind, kind.value)}" for kind in sorted(counts, key=lambda kind: kind.value)
        )
        or "nothing"
    )
    logger.info("stopped%s: %s", "" if work.drained else ", cut off", ended)
    if not work.drained:
        exit_now(1)  # here: the loop's end would wait for threads that were cut off, whose jobs run elsewhere by now
    return 0


@asynccontextmanager
async def _lifespan(app: App[Any], stop: Stop) -> AsyncGenerator[Any, None]:
    """Enter the app's own, unless a stop comes first."""
    async with AsyncExitStack() as stack:
        resources = None
        if app.lifespan is not None:
            with stop.interrupts():
                resources = await stack.enter_async_context(app.lifespan())
        # The collector needn't look through what was imported and opened, again and again: it stays.
        gc.collect()
        gc.freeze()
        yield resources


def _cut_off() -> None:
    logger.error("it still hasn't ended, so it is cut off; the broker delivers again what wasn't settled")
    exit_now(1)


def main(argv: Sequence[str]) -> int:
    """Run `python -m leveret.process.main OPTIONS`, OPTIONS being `WorkOptions` as JSON; return the exit code."""
    try:
        options = msgspec.json.decode(argv[0], type=WorkOptions)
    except (IndexError, msgspec.MsgspecError):
        return report_error(ConfigurationError("python -m leveret.process.main is started by `leveret work`; use that"))
    try:
        set_up_logs(options.log_level)
        if options.lifeline is None and (options.processes > 1 or options.reload):
            from .supervisor import supervise

            return run_loop(supervise(options))
        code = run_loop(run(options))
    except LeveretError as error:
        code = report_error(error, options.report)
    except KeyboardInterrupt:  # before the loop took the signal over: nothing was started
        code = 130
    except Exception:  # a lifespan's, for one: a user's code, whose traceback they need  # noqa: BLE001
        print(redact(traceback.format_exc()), end="", file=sys.stderr)  # noqa: T201 - as Python itself does
        code = 1
    if code:
        exit_now(code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
