"""`leveret relay`: publish the jobs of an app's outbox to its broker."""

from __future__ import annotations

import os

import click

from ..process.loading import load_app
from ..process.logs import set_up_logs
from ..process.relay import main
from ..settings import environment
from .output import log_level_option
from .target import app_options, app_path, find_target


@click.command(short_help="Publish the jobs of the app's outbox to its broker.")
@app_options
@log_level_option
def relay(app: str | None, log_level: str | None) -> None:
    """Publish the jobs that wait in the outbox of APP (module:attribute, default LEVERET_APP) to its broker.

    The outbox is the database of App(outbox=…) or LEVERET_OUTBOX. A job leaves it once the broker has confirmed the job, so no job is
    lost, wherever a relay, the broker or the database dies; a job that was under way is then published again, under its id. Run as
    many relays as you like; one keeps the order in which jobs were published, and several don't.

    Jobs that the broker will never take go to the outbox's dead letters: `leveret dead list --outbox`. SIGTERM or ^C stops the relay
    after the jobs under way. The exit code is then 0.

    \b
    Example:
      leveret relay shop:app
    """  # noqa: D301
    path = app_path(app)
    set_up_logs(log_level or environment(os.environ).log_level)
    loaded = load_app(path, modules=False)
    find_target(path, None, modules=False)
    main(loaded)
