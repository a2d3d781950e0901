"""`leveret work`: run a worker."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click
import msgspec

from ..consuming.limits import MOST, limit_in
from ..process.options import WorkOptions
from ..settings import environment
from .output import Count, at_least_1, duration, log_level_option
from .target import app_options, app_path


@click.command(short_help="Run a worker: take jobs from queues and run their handlers.")
@app_options
@click.option(
    "--queue",
    "-q",
    "queue_limits",
    multiple=True,
    metavar="NAME[=CONCURRENCY]",
    help="Take jobs from this queue only, at most CONCURRENCY at once per process. Repeatable.  [default: every queue of the app]",
)
@click.option(
    "--concurrency",
    "-c",
    metavar="N",
    type=Count(min=1, max=MOST),
    help="Jobs at once per process, over all its queues.  [default: LEVERET_CONCURRENCY, App(concurrency=…), or 100, of which 8 in threads]",
)
@click.option(
    "--processes",
    "-p",
    metavar="N",
    type=at_least_1,
    default=1,
    show_default=True,
    help="Number of worker processes. A process that dies is restarted.",
)
@click.option(
    "--grace",
    "grace_s",
    metavar="DURATION",
    default="30s",
    show_default=True,
    callback=duration(zero=True),
    help="Time for running jobs to finish when the worker stops, such as 90s, 15m or 1h30m.",
)
@click.option(
    "--reload",
    is_flag=True,
    help="For development: restart when a Python file in this folder or below changes. Needs the package watchfiles.",
)
@log_level_option
def work(
    app: str | None,
    queue_limits: tuple[str, ...],
    concurrency: int | None,
    processes: int,
    grace_s: float,
    reload: bool,
    log_level: str | None,
) -> None:
    """Run a worker of APP (module:attribute, default LEVERET_APP): take jobs from its queues and run their handlers.

    The worker waits for a broker that is down. SIGTERM, ^C or the loss of its terminal stops the worker: it takes no more jobs,
    lets running jobs finish within the grace, and exits with 0. A second signal, or the end of the grace, cuts the jobs off. The
    exit code is then 1, and the broker delivers those jobs again.

    \b
    Example:
      leveret work shop:app --queue emails=50 --processes 4
    """  # noqa: D301
    options = WorkOptions(
        app=app_path(app),
        queues=_queue_limits(queue_limits),
        concurrency=concurrency,
        processes=processes,
        grace_s=grace_s,
        log_level=(log_level or environment(os.environ).log_level).lower(),
        reload=reload,
    )
    # exec a new interpreter: click and rich don't stay in a worker's memory, and signals reach the worker directly
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "leveret.process.main", msgspec.json.encode(options).decode()])  # noqa: S606 - no shell needed


def _queue_limits(given: Sequence[str]) -> dict[str, int | None]:
    limits: dict[str, int | None] = {}
    for text in given:
        name, equals, number = text.partition("=")
        limit = limit_in(number)
        if not name or (equals and limit is None):
            msg = f"--queue {text!r:.200}: expected NAME or NAME=CONCURRENCY with a whole number from 1 to {MOST}, such as emails=50"
            raise click.UsageError(msg)
        if name in limits:
            msg = f"--queue {name!r} is given twice"
            raise click.UsageError(msg)
        limits[name] = limit
    return limits
