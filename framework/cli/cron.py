"""`leveret cron`: publish an app's recurring jobs."""

from __future__ import annotations

import os

import click

from ..process.loading import load_app
from ..process.logs import set_up_logs
from ..settings import environment
from .output import log_level_option
from .target import app_path, find_target


@click.command(short_help="Publish an app's recurring jobs at their times.")
@click.argument("app", required=False, metavar="[APP]")
@log_level_option
def cron(app: str | None, log_level: str | None) -> None:
    """Publish the recurring jobs of APP (module:attribute, else LEVERET_APP) at their times. Run one of it.

    A slot's job has an id made of app, schedule and time, so a restart can't publish another one for it. What fell due while no cron ran
    is skipped. SIGTERM or ^C stops it after the publish that is under way: exit 0.

    \b
    Example:
      leveret cron shop:app
    """  # noqa: D301
    from ..process.cron import main  # with croniter, which no other command needs

    path = app_path(app)
    set_up_logs(log_level or environment(os.environ).log_level)
    loaded = load_app(path)
    find_target(path, None, modules=False)
    main(loaded)
