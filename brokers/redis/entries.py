"""An entry: one job or dead letter as Redis holds it, a MessagePack array.

It begins with the job's number, the number of its next delivery, the count of the workers that it crashed, and its level. These four have
fixed places, so that a script changes them without decoding the rest: `rows.COLUMNS` from the job's id on.

A foreign producer pushes an array of those ten columns to the list of a level, or a body alone; a script makes an entry of either.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec

from ..rows import Row
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


def tail_of(row: Row) -> bytes:
    """Return the entry of a new job without its number, which a script gives it. ValueError or OverflowError if a value can't be kept."""
    return _encode((_NO_NUMBER, 1, 0, LEVEL_NUMBERS[row[1]], *row[3:]))[_NUMBERED:]


def row_of(entry: bytes, queue: str) -> list[Any]:
    """Return the row of an entry: its number, deliveries and crashes, then `rows.COLUMNS`. ValueError if it can't be read."""
    row: list[Any] = _decode(entry)
    row[3:4] = (queue, LEVEL_NAMES.get(row[3], str(row[3])))
    return row


def unreadable(entry: bytes, queue: str, level: str) -> list[Any]:
    """Return the row of an entry that can't be read: its body is the whole entry."""
    seq: int = struct.unpack_from(">Q", entry, 2)[0]
    return [
        seq,
        1,
        0,
        queue,
        level,
        f"unreadable-{seq}",
        "",
        "application/octet-stream",
        None,
        entry,
        0,
        None,
        None,
        None,
        None,
    ]
