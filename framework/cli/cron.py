"""`leveret cron`: publish an app's recurring jobs."""

from __future__ import annotations

import os

import click

from ..process.loading import load_app
from ..process.logs import set_up_logs
from ..settings import environment
from .output import log_level_option
from .target import app_options, app_path, find_target


@click.command(short_help="Publish an app's recurring jobs when they are due.")
@app_options
@log_level_option
def cron(app: str | None, log_level: str | None) -> None:
    """Publish the recurring jobs of APP (module:attribute, default LEVERET_APP) when they are due.

    Run exactly one instance; two would publish every slot twice.

    The id of a slot's job consists of app, schedule and time, so a restart can't publish a slot under a second id. Slots that fall
    due while no cron process runs are skipped. SIGTERM, ^C or the loss of its terminal stops the process after the publish in
    progress. The exit code is then 0.

    \b
    Example:
      leveret cron shop:app
    """  # noqa: D301
    from ..process.cron import main  # imports croniter, which no other command needs

    path = app_path(app)
    set_up_logs(log_level or environment(os.environ).log_level)
    loaded = load_app(path)
    find_target(path, None, modules=False)
    main(loaded)
