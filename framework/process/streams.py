"""The standard streams of leveret's own processes."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

from ..texts import folded

_NARROWEST = 40
"""No text is folded to fewer columns than this."""


def open_closed_streams() -> None:
    """Open each closed one of the file descriptors 0, 1 and 2 on /dev/null, for this process and its children.

    Otherwise the next pipe or socket gets the number, and whatever reads or writes a standard stream reads or writes that.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            stream = open(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115 - until the process ends
            setattr(sys, name, stream)


def width_of(stream: TextIO) -> int | None:
    """Return the columns of the terminal `stream`; None for a pipe or a file, which gets whole lines for grep and cut."""
    if not stream.isatty():
        return None
    given = os.environ.get("COLUMNS", "")
    width = int(given) if given.isdecimal() else 0
    if not width:
        with suppress(OSError):  # a terminal that doesn't know its size
            width = os.get_terminal_size(stream.fileno()).columns
    return max(width or 80, _NARROWEST)


def fitted(text: str, stream: TextIO) -> str:
    """Return `text` as it is printed to `stream`: on a terminal, folded at words."""
    width = width_of(stream)
    return text if width is None else folded(text, width)


def tell(text: str) -> None:
    """Print a text to standard error, if that can be written: the exit code must not depend on it."""
    try:
        print(fitted(text, sys.stderr), file=sys.stderr, flush=True)  # noqa: T201 - output of a command
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Send what `stream` holds, and what follows, to /dev/null: the interpreter's exit would fail on it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
