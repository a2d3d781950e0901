"""`leveret queues`: show the depths of queues, and purge a queue."""

from __future__ import annotations

from typing import Any

import click

from ..admin import Depth, OutboxDepth
from ..errors import ConfigurationError
from ..settings import redact_url
from .output import ask, counted, json_option, print_json, print_table, print_text, seconds
from .target import Target, run, target_options

_COLUMNS = """\b
Columns:
  ready      jobs that wait for a worker
  unsettled  jobs that workers hold
  delayed    jobs that wait for their time, retries too
  dead       jobs that were buried
  consumers  worker processes of the queue
  levels     the ready jobs of each level that has any
Below the table: the app's outbox, if it has one.
A dash: the broker can't count it. RabbitMQ counts the
delayed jobs of all queues together, below the table.
"""


class _Names(click.Group):
    """A group whose first argument may be a queue's name instead of a subcommand: `leveret queues emails`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the subcommand `show` if the first argument isn't a subcommand."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=_Names,
    subcommand_metavar="[NAME]... | purge NAME",
    short_help="Show how many jobs wait in each queue; purge one.",
    epilog=_COLUMNS,
)
def queues() -> None:
    """Show how many jobs wait in each queue, by level, or `purge` a queue.

    \b
    Examples:
      leveret queues shop:app
      leveret queues emails pdf --broker sqlite:///shop.db
      leveret queues purge shop:app emails

    `leveret queues show --help` lists the options.
    """  # noqa: D301


@queues.command(short_help="Show the depths of queues.", epilog=_COLUMNS)
@target_options
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--outbox", is_flag=True, help="Show what waits in the app's outbox instead, and since when.")
@json_option
def show(names: tuple[str, ...], target: Target, outbox: bool, as_json: bool) -> None:
    """Show the depths of the queues NAME…, or of all queues for which the app has handlers. The word `show` is optional.

    \b
    Example:
      leveret queues shop:app emails
    """  # noqa: D301
    if not names and target.app is None and not outbox:
        msg = "name the queues, or the app with --app module:app"
        raise click.UsageError(msg)

    if outbox:
        _show_outbox(target, names, as_json=as_json)
        return

    async def read() -> tuple[list[Depth], int | None, list[str]]:
        async with target.admin() as admin:
            depths = [await target.depth_of(admin, name) for name in names or target.queues]
            return depths, None if as_json else await admin.delayed(), [] if as_json else await admin.notes()

    depths, delayed, notes = run(read())
    if as_json:
        print_json(depths)
        return
    if not depths:
        print_text("no queues: the app has no handlers")
        return
    print_table(
        ["queue", ">ready", ">unsettled", ">delayed", ">dead", ">consumers", "levels"],
        [
            [
                depth.queue,
                depth.ready,
                depth.unsettled,
                depth.delayed,
                depth.dead,
                depth.consumers,
                _levels(depth) if depth.exists else "not declared yet",
            ]
            for depth in depths
        ],
    )
    if delayed is not None:
        print_text(f"delayed jobs of all queues on this broker: {delayed}")
    for note in notes:
        print_text(note)
    if target.outbox is not None:
        print_text(_outbox_line(target.outbox, run(_outbox(target))))


async def _outbox(target: Target) -> list[OutboxDepth]:
    async with target.outbox_admin() as admin:
        return await admin.depths()


def _outbox_line(url: str, rows: list[OutboxDepth]) -> str:
    waiting, dead = sum(row.waiting for row in rows), sum(row.dead for row in rows)
    oldest_s = max((row.oldest_s for row in rows if row.oldest_s is not None), default=None)
    waits = f"{counted(waiting, 'job')} wait{'s' if waiting == 1 else ''} for a relay"
    since = "" if oldest_s is None else f", the oldest for {seconds(round(oldest_s, 1))}"
    return f"outbox {redact_url(url)}: {waits}{since}; {counted(dead, 'dead letter')}"


def _show_outbox(target: Target, names: tuple[str, ...], *, as_json: bool) -> None:
    rows = [row for row in run(_outbox(target)) if not names or row.queue in names]
    if as_json:
        print_json(rows)
        return
    if rows:
        print_table(
            ["queue", ">waiting", ">oldest", ">dead"],
            [
                [row.queue, row.waiting, None if row.oldest_s is None else seconds(round(row.oldest_s, 1)), row.dead]
                for row in rows
            ],
        )
    print_text(_outbox_line(target.outbox or "", rows))


def _levels(depth: Depth) -> str:
    return " ".join(f"{level}={count}" for level, count in depth.levels.items() if count)


@queues.command(short_help="Delete all waiting jobs of a queue.")
@target_options
@click.argument("name")
@click.option("--yes", is_flag=True, help="Don't ask for confirmation.")
@json_option
def purge(name: str, target: Target, yes: bool, as_json: bool) -> None:
    """Delete all waiting jobs of queue NAME, on all levels. Running, delayed and dead jobs stay.

    \b
    Example:
      leveret queues purge shop:app emails
    """  # noqa: D301

    async def count() -> Depth:
        async with target.admin() as admin:
            return await target.depth_of(admin, name)

    async def delete() -> int:
        async with target.admin() as admin:
            return await admin.purge(target.queue(name))

    depth = run(count())
    if not depth.exists:
        msg = f"queue {name!r} isn't declared on {redact_url(target.url)}, so no job waits there"
        raise ConfigurationError(msg)
    ask(f"Delete {counted(depth.ready, 'waiting job')} of queue {name} on {redact_url(target.url)} for good?", yes=yes)
    purged = run(delete())
    if as_json:
        answer: dict[str, Any] = {"queue": name, "purged": purged}
        print_json(answer)
    else:
        print_text(f"purged {counted(purged, 'job')} of queue {name}")
