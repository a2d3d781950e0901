"""How commands print: tables and JSON to standard output; progress and questions to standard error."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone

import click
import msgspec

from ..errors import ConfigurationError
from ..process.logs import LEVELS, one_line, printable
from ..process.streams import fitted, width_of

_GAP, _INDENT = 2, 2
_ROOM = 40
"""The text at the end of a row goes below the row rather than into fewer columns."""
_TEXT_LINES = 3

_UNITS = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
_NUMBER = r"(\d+(?:\.\d+)?)"
_DURATION = re.compile(f"{_NUMBER}|" + "".join(f"(?:{_NUMBER}{unit})?" for unit in _UNITS), re.ASCII)


class Count(click.IntRange):
    """A whole number within bounds."""

    name = "whole number"  # "integer range" is what click calls it: 'x' is not a valid integer range


at_least_1 = Count(min=1, max=1_000_000_000)
log_level_option = click.option(
    "--log-level", type=click.Choice(LEVELS, case_sensitive=False), help="Log level.  [default: LEVERET_LOG, else info]"
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document to standard output, and nothing else."
)


def print_json(document: object) -> None:
    """Print one JSON document."""
    click.echo(msgspec.json.format(msgspec.json.encode(document)))


def print_text(text: str, *, err: bool = False) -> None:
    """Print `text`; on a terminal, folded at words."""
    click.echo(fitted(text, sys.stderr if err else sys.stdout), err=err)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table that fits the terminal; see `table`. Its headings are bold there."""
    heads, *others = table(columns, rows, width_of(sys.stdout) or sys.maxsize)
    click.echo(heads if os.environ.get("TERM") == "dumb" else click.style(heads, bold=True))
    for row in others:
        click.echo(row)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], width: int) -> list[str]:
    """Return the headings and the rows of a table, each in lines of at most `width` characters, not padded at their ends.

    A column whose name begins with > holds numbers and is right-aligned. The last column holds text: a long text is folded at
    words, and shortened with … after three lines. Columns that don't fit beside the others continue below, indented. No other
    cell is broken or shortened, so that a name or an id can always be copied.
    """
    heads = [column.removeprefix(">") for column in columns]
    cells = [heads, *([lines(one_line("-" if cell is None else str(cell))) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    last = len(columns) - 1
    layout: list[list[tuple[int, int]]] = [[]]  # per line of a row: the columns, and where each begins
    start = 0
    for index, wide in enumerate(widths):
        if layout[-1] and start + (wide if index < last else min(wide, _ROOM)) > width:
            layout.append([])
            start = _INDENT
        layout[-1].append((index, start))
        start += wide + _GAP

    def drawn(row: Sequence[str]) -> str:
        drawn_lines: list[str] = []
        for line in layout:
            text = ""
            for index, start in line:
                cell = row[index]
                if index == last:
                    cell = f"\n{' ' * start}".join(_text_lines(cell, width - start))
                elif columns[index].startswith(">"):
                    cell = cell.rjust(widths[index])
                text = text.ljust(start) + cell
            drawn_lines.append(text.rstrip())
        return "\n".join(filter(None, drawn_lines))

    return [drawn(row) for row in cells]


def _text_lines(text: str, width: int) -> list[str]:
    words = [word if len(word) <= width else f"{word[: width - 1]}…" for word in text.split()]
    return textwrap.wrap(" ".join(words), width, max_lines=_TEXT_LINES, placeholder=" …", break_on_hyphens=False)


def lines(text: str) -> str:
    """Return `text` with control characters replaced, except line breaks and tabs."""
    return printable(text, "\n\t")


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
    if not click.confirm(fitted(f"{question} [y/N]:", sys.stderr), show_default=False, prompt_suffix=" ", err=True):
        print_text("nothing was changed", err=True)
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
