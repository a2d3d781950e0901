"""An entry: one job or dead letter as Redis holds it, a MessagePack array.

It begins with the job's number, the number of its next delivery, the count of the workers that it crashed, and its level. These four have
fixed places, so that a script changes them without decoding the rest: `rows.COLUMNS` from the job's id on.

A foreign producer pushes an array of those ten columns to the list of a level, or a body alone; a script makes an entry of either.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from ..rows import Row, delay_ms
from .keys import LEVEL_NAMES, LEVEL_NUMBERS

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(list[Any]).decode
_NO_NUMBER: Final = (1 << 64) - 1
_NUMBERED: Final = 10
"""How many bytes hold the array's length and the number."""
seq_bytes: Final = struct.Struct(">Q").pack
"""Return a job's number as an entry holds it, which is also its field in a hash."""


def seq_of(field: bytes) -> int:
    """Return the number of `seq_bytes`."""
    return int.from_bytes(field, "big")


class Unkeepable(ValueError):
    """A value of a job can't be kept."""


def tail_of(row: Row) -> bytes:
    """Return the entry of a new job without its number, which a script gives it; Unkeepable if a value can't be kept."""
    try:
        return _encode((_NO_NUMBER, 1, 0, LEVEL_NUMBERS[row[1]], *row[3:]))[_NUMBERED:]
    except (ValueError, OverflowError) as error:
        raise Unkeepable(str(error)) from error


def by_level(rows: Sequence[Row], now_ms: float) -> tuple[list[list[bytes]], list[tuple[int, bytes]]]:
    """Return the new jobs of each level, and those with a delay in ms: the server's clock may be another."""
    levels: list[list[bytes]] = [[] for _ in LEVEL_NUMBERS]
    later: list[tuple[int, bytes]] = []
    for row in rows:
        due_ms = row[2]
        if due_ms is None:
            levels[LEVEL_NUMBERS[row[1]] - 1].append(tail_of(row))
        else:
            later.append((delay_ms(due_ms, now_ms), tail_of(row)))
    return levels, later


def row_of(entry: bytes, queue: str) -> list[Any]:
    """Return the row of an entry: its number, deliveries and crashes, then `rows.COLUMNS`. ValueError if it can't be read."""
    row: list[Any] = _decode(entry)
    row[3:4] = (queue, LEVEL_NAMES.get(row[3], str(row[3])))
    return row


def read(entry: bytes, queue: str, level: str) -> tuple[list[Any], str | None]:
    """Return the row of any entry, and why it can't be read, if so: then its body is the whole entry."""
    try:
        return row_of(entry, queue), None
    except (ValueError, IndexError, TypeError) as error:
        seq: int = struct.unpack_from(">Q", entry, 2)[0]
        row = [
            seq, 1, 0, queue, level, f"unreadable-{seq}", "", "application/octet-stream", None, entry, 0, None, None, None, None,
        ]  # fmt: skip
        return row, f"its entry in Redis can't be read: {error}"
