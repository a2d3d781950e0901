"""What job stores share: a row, its columns, and the conversion between changes, rows and records; and the publishes that are watched.

Each store writes rows by its own statements.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

from leveret.store import STAGES, Change, Key, Record, Verdict

Entry: TypeAlias = tuple[
    str, int, str, str, str, int, int, int, int, int, str, str, str, bytes | None, bytes | None
]  # fmt: skip
ENTERED: Final = (
    "job_id", "publish", "queue", "job", "state", "stage", "passes", "attempt", "at_ms", "keep_until_ms", "content_type", "error", "reason",
    "result", "body",
)  # fmt: skip
"""The columns that a change brings, in the order of an `Entry`."""
COLUMNS: Final = (
    "job_id", "publish", "queue", "job", "state", "passes", "attempt", "created_ms", "started_ms", "at_ms", "keep_until_ms",
    "progress", "note", "asked", "content_type", "error", "reason", "result", "body",
)  # fmt: skip
"""The columns that `record_of` takes, in their order. The large ones are the last: a row is read up to the last that is asked for."""
ABRIDGED: Final = COLUMNS[:-2]
"""The same without the result and the body."""


def storable(text: str) -> str:
    """Return `text` as every store can keep it: a null character and half a surrogate pair become escapes."""
    if "\0" in text or not text.isascii():
        return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()
    return text


def entry_of(change: Change, keep_ms: int) -> Entry:
    """Return what a change brings. `keep_ms` is a moment or a time, as the store's statements take it."""
    return (
        change.job_id,
        change.publish,
        change.queue,
        change.job,
        change.state,
        STAGES[change.state],
        change.passes,
        change.attempt,
        change.at_ms,
        keep_ms,
        storable(change.content_type),
        storable(change.error),
        storable(change.reason),
        change.result,
        change.body,
    )


def record_of(row: Sequence[Any]) -> Record:
    """Return the record of a row of `COLUMNS`, or of `ABRIDGED`."""
    fields: dict[str, Any] = dict(zip(COLUMNS, row, strict=False))
    fields["asked"] = bool(fields["asked"])  # SQLite has numbers only
    return Record(**fields)


_WATCHED_S = 5.0
"""How long a publish is watched that nobody asks for any more, seconds."""


class Watched:
    """The publishes for whose ends a store asks the database to tell it, by their numbers."""

    def __init__(self) -> None:
        self._keys: dict[int, tuple[Key, float]] = {}
        """By publish: its key, and when it was last asked for."""
        self._forget_at = 0.0

    def add(self, keys: Iterable[Key]) -> None:
        """Watch these for some seconds more; forget those that nobody asks for any more."""
        now = time.monotonic()
        if now > self._forget_at:
            self._keys = {number: each for number, each in self._keys.items() if each[1] > now - _WATCHED_S}
            self._forget_at = now + _WATCHED_S
        self._keys.update({key.publish: (key, now) for key in keys})

    def take(self, ended: Iterable[int] | None = None) -> list[Key]:
        """Stop watching those of these publishes that are watched, or all, and return them."""
        numbers = list(self._keys) if ended is None else ended
        return [each[0] for number in numbers if (each := self._keys.pop(number, None)) is not None]


def in_order(keys: Iterable[Key], records: Iterable[Record]) -> list[Record | None]:
    """Return the records of `keys`, in order; None for one that isn't there."""
    found = {record.key: record for record in records}
    return [found.get(key) for key in keys]


def verdict_of(change: Change, passes: int, stage: int, state: str) -> Verdict:
    """Return whether the run of `change` may go on, by what its record is after it was entered."""
    if passes > change.passes or (passes == change.passes and stage == STAGES["done"]):
        return "aborted" if state == "aborted" else "ended"
    return "go"
