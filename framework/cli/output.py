"""How commands print: tables and JSON to standard output; progress and questions to standard error."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone

import click
import msgspec

from ..errors import ConfigurationError
from ..process.logs import LEVELS, one_line

_WIDE = 1000
"""Columns when the output isn't a terminal: a pipe or a file gets whole lines, for grep and cut."""

_UNITS = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
_NUMBER = r"(\d+(?:\.\d+)?)"
_DURATION = re.compile(f"{_NUMBER}|" + "".join(f"(?:{_NUMBER}{unit})?" for unit in _UNITS), re.ASCII)
_PADDING = re.compile(r" +((?:\x1b\[[\d;]*m)*)$")
"""The spaces at the end of a line, before the codes that end its colours."""

log_level_option = click.option(
    "--log-level", type=click.Choice(LEVELS, case_sensitive=False), help="Log level.  [default: LEVERET_LOG, else info]"
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document to standard output, and nothing else."
)


def print_json(document: object) -> None:
    """Print one JSON document."""
    click.echo(msgspec.json.format(msgspec.json.encode(document)))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table. A column whose name begins with > holds numbers and is right-aligned."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # capture what rich makes of it, since rich pads each line to the width of the table
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(
            column.removeprefix(">"),
            justify="right" if column.startswith(">") else "left",
            overflow="fold",
            header_style="bold",
        )
    for row in rows:
        # Text, not str: a job's error may contain what rich reads as markup
        table.add_row(*(Text(one_line("-" if cell is None else str(cell))) for cell in row))
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        click.echo(_PADDING.sub(r"\1", line))


def lines(text: str) -> str:
    """Return `text` with control characters replaced, except line breaks and tabs."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def moment(at_ms: float | None) -> str:
    """Return Unix milliseconds as a readable UTC time; "" for None, 0 or a value outside the calendar."""
    if not at_ms:
        return ""
    try:
        return datetime.fromtimestamp(at_ms / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return ""


def seconds(value: float) -> str:
    """Return a readable duration, such as 90 s or 1.5 s."""
    return f"{value:g} s"


def counted(count: int, what: str) -> str:
    """Return a count and its noun: 1 job, 2 jobs."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def ask(question: str, *, yes: bool) -> None:
    """Return after a yes. Without a terminal, require --yes."""
    if yes:
        return
    if not sys.stdin.isatty():
        msg = f"{question} stdin is not a terminal; confirm with --yes"
        raise ConfigurationError(msg)
    if not click.confirm(question, err=True):
        click.echo("nothing was changed", err=True)
        raise SystemExit(1)


@contextmanager
def progress(what: str, total: int) -> Generator[Callable[[], None], None, None]:
    """Show a progress bar on standard error if that is a terminal. Call the yielded function once per step."""
    if total < 2 or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def duration(*, zero: bool) -> Callable[[click.Context, click.Parameter, str | None], float | None]:
    """Return a callback for an option that takes a duration, above 0 or with `zero` at least 0. The command receives seconds."""

    def convert(_: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
        if value is None:
            return None
        number = _seconds_in(value)
        if number is None or not (number >= 0 if zero else number > 0) or number == float("inf"):
            msg = f"expected a duration {'of at least 0' if zero else 'above 0'}, such as 90, 90s, 15m, 1h30m or 2d, not {value!r}"
            raise click.BadParameter(msg, param=parameter)
        return number

    return convert


def _seconds_in(text: str) -> float | None:
    """Return the seconds of `90`, `90s` or `1h30m`; None for another text, such as `1h30`, whose 30 may be meant as minutes."""
    match = _DURATION.fullmatch(text)
    if match is None or not text:
        return None
    plain, *counts = match.groups()
    return float(plain) if plain else sum(float(n or 0) * unit for n, unit in zip(counts, _UNITS.values(), strict=True))
