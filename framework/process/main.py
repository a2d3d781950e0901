"""The process of one worker: `leveret work` hands over to `python -m leveret.process.main`.

The steps of a stop: take no more jobs → give back jobs that haven't started → finish running jobs within the grace → flush the
settlements → close. Exit code 0: drained. 1: the grace ended, and the broker delivers the jobs that were cut off again. 2: the
configuration is wrong.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import msgspec

from ..app import App
from ..consuming.worker import working
from ..errors import ConfigurationError, LeveretError
from ..outcome import Kind
from ..runtime import Shared
from ..settings import redact, redact_url
from ..waits import first_of
from .loading import load_app
from .logs import report_error, set_up_logs
from .loop import run_loop
from .options import WorkOptions
from .signals import HURRY_S, Stop, exit_now, exit_within
from .streams import open_closed_streams, tell

logger = logging.getLogger("leveret.worker")

_SAID = {
    Kind.RETRY: "retried",
    Kind.SNOOZE: "snoozed",
    Kind.BURY: "buried",
    Kind.UNDECODABLE: "buried as undecodable",
    Kind.UNKNOWN: "sent back as unknown",
    Kind.NOT_STARTED: "given back",
    Kind.LOST: "that the broker delivers again, since their channel or lease was lost",
    Kind.REMEMBERED: "redelivered and not run again",
    Kind.SUSPECTED: "published again, since a worker may have died of them",
    Kind.WORKER_LOST: "buried, since workers died of them",
}
"""How a worker's last log line names an ending; the other endings use `Kind.value`."""

_EXIT_S = 1.0
"""The least time that a worker gets to exit once its jobs are finished, within the grace or not."""


async def run(options: WorkOptions) -> int:
    """Run a worker until a signal, the end of its supervisor or a fault that waiting can't cure; return the exit code."""
    app = load_app(options.app)
    # after a second signal, don't wait for a lifespan or a connection that doesn't close
    stop = Stop(hurry=lambda: asyncio.get_running_loop().call_later(HURRY_S, _cut_off))
    if options.lifeline is not None:
        stop.ask_at_end_of(options.lifeline)
    try:
        async with working(
            app,
            queues=list(options.queues),
            concurrency=[*app.concurrency(), options.limits],
            runtime=app.runtime(options.processes, _shared(options)),
            grace_s=options.grace_s,
            hurry=stop.hurried,
            lifespan=partial(_lifespan, app, stop),
        ) as work:
            names = ", ".join(f"{queue} ({limit} at once)" for queue, limit in work.at_once.items())
            takes = "takes jobs" if work.worker.state().name == "ready" else "waits for the broker, then takes jobs"
            logger.info(
                "worker %s of app %s %s from %s on %s",
                os.getpid(),
                app.name,
                takes,
                names,
                redact_url(app.broker_url() or ""),
            )
            await first_of(stop.asked.wait(), work.consumption.failed())
            ends = time.monotonic() + options.grace_s
    except asyncio.CancelledError:
        if not stop.interrupted:
            raise
        logger.info("stopped while the app's lifespan was starting")
        return 0
    logger.info("stopped%s: %s", "" if work.drained else ", cut off", _told(work.consumer.counts))
    if not work.drained:
        # closing the loop would wait for threads that were cut off, whose jobs other workers run by now
        exit_now(1)
    exit_within(max(_EXIT_S, ends - time.monotonic()))
    return 0


def _shared(options: WorkOptions) -> Shared | None:
    if options.shared is None:
        return None
    from .shared import SharedMemory

    return SharedMemory(options.shared)


def _told(counts: Mapping[Kind, int]) -> str:
    """Return the endings of a worker in words, without those that never came."""
    kinds = sorted((kind for kind, count in counts.items() if count), key=lambda kind: kind.value)
    return ", ".join(f"{counts[kind]} {_SAID.get(kind, kind.value)}" for kind in kinds) or "nothing"


@asynccontextmanager
async def _lifespan(app: App[Any], stop: Stop) -> AsyncGenerator[Any, None]:
    """Enter the app's lifespan, unless a stop comes first."""
    async with AsyncExitStack() as stack:
        resources = None
        if app.lifespan is not None:
            with stop.interrupts():
                resources = await stack.enter_async_context(app.lifespan())
        # what was imported and opened stays: exempt it from every later garbage collection
        gc.collect()
        gc.freeze()
        yield resources


def _cut_off() -> None:
    logger.error(
        "the worker didn't end after the second signal and exits now; the broker delivers unsettled jobs again"
    )
    exit_now(1)


def main(argv: Sequence[str]) -> int:
    """Run `python -m leveret.process.main OPTIONS`, where OPTIONS is `WorkOptions` as JSON; return the exit code."""
    open_closed_streams()
    try:
        options = msgspec.json.decode(argv[0], type=WorkOptions)
    except (IndexError, msgspec.MsgspecError):
        return report_error(ConfigurationError("python -m leveret.process.main is internal; run `leveret work`"))
    try:
        set_up_logs(options.log_level, options.number)
        if options.ignore_hangups:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if options.lifeline is None and (options.processes > 1 or options.reload):
            from .supervisor import supervise

            return run_loop(supervise(options))
        code = run_loop(run(options))
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ^C ends the wait for what handlers left, without a traceback
    except LeveretError as error:
        code = report_error(error, options.report)
    except KeyboardInterrupt:  # the signal came before the loop handled signals: nothing has started
        code = 130
    except Exception:  # the user's code, such as a lifespan: the user needs its traceback  # noqa: BLE001
        tell(redact(traceback.format_exc().rstrip("\n")))
        code = 1
    if code:
        exit_now(code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
