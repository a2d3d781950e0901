"""`leveret work`: run a worker."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click
import msgspec

from ..process.options import WorkOptions
from ..settings import environment
from .output import log_level_option, number_of_seconds
from .target import app_path


@click.command(short_help="Run a worker: take jobs from queues and run their handlers.")
@click.argument("app", required=False, metavar="[APP]")
@click.option(
    "--queue",
    "-q",
    "queue_limits",
    multiple=True,
    metavar="NAME[=CONCURRENCY]",
    help="Take from this queue alone, with at most so many jobs of it at once in a process; may be repeated. None given: every queue of the app.",
)
@click.option(
    "--concurrency",
    "-c",
    metavar="N",
    type=click.IntRange(min=1),
    help="Jobs at once in a process, over all its queues.  [default: 100, of which 8 in threads]",
)
@click.option(
    "--processes",
    "-p",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Worker processes; one that dies is restarted.",
)
@click.option(
    "--grace",
    "grace_s",
    metavar="SECONDS",
    default="30",
    show_default=True,
    callback=number_of_seconds(zero=True),
    help="How long a stopping worker lets its jobs finish.",
)
@click.option(
    "--reload",
    is_flag=True,
    help="For development: restart when a Python file below this folder changes. Needs leveret[reload].",
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
    """Run a worker of APP (module:attribute, else LEVERET_APP): take jobs from its queues and run their handlers.

    It waits for a broker that is away. SIGTERM or ^C stops it: it takes nothing more, lets its jobs finish within the grace, and
    exits with 0; a second one, or the end of the grace, cuts them off: exit 1, and the broker delivers those again.

    \b
    Example:
      leveret work shop:app --queue emails=50 --queue pdf --processes 4
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
    # a new interpreter in this process: neither click nor rich stays in a worker's memory, and signals reach the worker itself
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "leveret.process.main", msgspec.json.encode(options).decode()])  # noqa: S606 - no shell is meant


def _queue_limits(given: Sequence[str]) -> dict[str, int | None]:
    limits: dict[str, int | None] = {}
    for text in given:
        name, equals, limit = text.partition("=")
        if not name or (equals and not (limit.isascii() and limit.isdecimal() and int(limit) > 0)):
            msg = f"--queue {text!r}: it is NAME or NAME=CONCURRENCY, CONCURRENCY a whole number from 1, such as emails=50"
            raise click.UsageError(msg)
        if name in limits:
            msg = f"--queue {name!r} is given twice"
            raise click.UsageError(msg)
        limits[name] = int(limit) if equals else None
    return limits
