"""What the statements of `file` and `admin` share: how the rows of jobs and dead letters are written and read."""

from __future__ import annotations

from typing import Final

from ..rows import COLUMNS

READ: Final = ", ".join(COLUMNS).replace("body", "CAST(body AS BLOB)")
"""The columns that `unpack` takes; a body that a foreign producer wrote as text is read as bytes."""


def text_or_bytes(value: bytes) -> str | bytes:
    """Return a text column's value, or its bytes if it isn't UTF-8: Python would raise, and one such row would stop the whole file."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _inserts(table: str, when: str) -> tuple[tuple[int, str], ...]:
    # One statement for many rows: between two statements the thread would wait for the interpreter's lock.
    columns = (*COLUMNS[:2], when, *COLUMNS[2:])
    row = f"({', '.join('?' * len(columns))})"
    start = f"INSERT INTO {table} ({', '.join(columns)}) VALUES "  # noqa: S608 - columns of ours
    return tuple((count, start + ", ".join([row] * count)) for count in (64, 8, 1))


INSERTS: Final = {"jobs": _inserts("jobs", "due_ms"), "dead": _inserts("dead", "buried_ms")}
"""By table: the number of rows and the statement that inserts them, the largest number first."""
