"""A file that processes append to, a line a write, and that tests read meanwhile: whole lines, whoever is killed.

The kernel ends a write of a killed process at a page's end, and half a line then stays in the file (measured on Linux 6.18, ext4 and tmpfs: 18 and 16
of 3 000 kills of a process that did nothing but append; none of 3 000 with lines of this width). So lines are as wide as fits a page without a rest.
"""

import os
from pathlib import Path

WIDTH = 128
"""Bytes of a line, with its end: a page is a multiple of it."""


def open_diary(path: "str | Path") -> int:
    """Open the file for `write`."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def write(diary: int, *words: object) -> None:
    """Append one line."""
    line = " ".join(map(str, words)).encode().ljust(WIDTH - 1) + b"\n"
    assert len(line) == WIDTH, f"a line of {len(line)} bytes may be torn by a kill: {line!r}"
    os.write(diary, line)


def read(path: "str | Path") -> list[list[str]]:
    """Return the words of each line so far; nothing if the file isn't there yet."""
    file = Path(path)
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []
