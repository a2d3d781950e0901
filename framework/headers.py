"""The table of headers that carries what AMQP has no property for, and what users may put beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from .job import Priority

if TYPE_CHECKING:
    from .envelope import Envelope

HeaderValue: TypeAlias = str | int | float | bool
"""What a publisher may put into a header; integers are 64-bit."""
_BROKERS_OWN = frozenset({"x-death", "x-delivery-count", "x-acquired-count", "CC", "BCC"})
_BROKERS_PREFIXES = ("x-first-death-", "x-last-death-", "x-stream-")
_INT64 = 1 << 63
MOST = _INT64 - 1
"""No count goes above it: one that AMQP can't carry would never be published."""


def is_brokers_own(name: str) -> bool:
    """Whether header `name` belongs to RabbitMQ: a copied `x-death` makes it drop the job on the second pass (before 4.0)."""
    return name in _BROKERS_OWN or name.startswith(_BROKERS_PREFIXES)


def check_headers(headers: Mapping[str, HeaderValue]) -> dict[str, HeaderValue]:
    """Return a copy of `headers`, which its owner may change as soon as it is published; ValueError for the first that can't be sent."""
    if not isinstance(headers, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        msg = f"headers are a mapping of names to values, not {headers!r:.80}"
        raise ValueError(msg)
    copy = dict(headers)
    for name, value in copy.items():
        if not isinstance(name, str) or not 0 < len(name.encode()) <= 128:  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"header {name!r}: a name is a text of 1 to 128 bytes"
            raise ValueError(msg)
        if name.startswith("lv-") or is_brokers_own(name):
            msg = f"header {name!r}: names that start with lv- are leveret's own, x-death and its kin are the broker's"
            raise ValueError(msg)
        if not isinstance(value, (str, int, float, bool)):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"header {name!r}: a value is a str, int, float or bool, not {value!r}"
            raise ValueError(msg)
        if isinstance(value, int) and not -_INT64 <= value < _INT64:
            msg = f"header {name!r}: an integer has 64 bits, {value} has more"
            raise ValueError(msg)
        if isinstance(value, float) and not math.isfinite(value):
            msg = f"header {name!r}: a number is finite, not {value}; RabbitMQ closes the connection that sends another"
            raise ValueError(msg)
        if isinstance(value, str):
            value.encode()  # UnicodeEncodeError, a ValueError, for half of a surrogate pair
    return copy


# What travels as a header: field, name on the wire, type.
_FIELDS: tuple[tuple[str, str, type], ...] = (
    ("attempt", "lv-attempt", int),
    ("passes", "lv-pass", int),
    ("version", "lv-version", int),
    ("first_seen_ms", "lv-first-seen", int),
    ("due_ms", "lv-due", int),
    ("expires_at_ms", "lv-expires-at", int),
    ("unknown_since_ms", "lv-unknown-since", int),
    ("errors", "lv-errors", str),
    ("origin", "lv-origin", str),
)


_MOMENTS = ("lv-first-seen", "lv-due", "lv-expires-at", "lv-unknown-since")
_RANGES = {
    "attempt": range(1, _INT64),
    "first_seen_ms": range(
        -62_135_596_800_000, 253_402_300_800_000
    ),  # the years 1 to 9999: `Attempt.first_seen` is a datetime
}


PRIORITY_HEADER = "lv-priority"


def pack_headers(envelope: Envelope) -> dict[str, object]:
    """Return the headers table of `envelope`: users' headers, and each of leveret's that isn't at its default.

    `lv-priority` is there in a dead-letter queue only, where the level can't be told from the queue.
    """
    table = dict(envelope.headers)
    # written out, since each publish comes here: a loop over `_FIELDS` takes ten times as long
    if envelope.attempt != 1:
        table["lv-attempt"] = envelope.attempt
    if envelope.passes:
        table["lv-pass"] = envelope.passes
    if envelope.version != 1:
        table["lv-version"] = envelope.version
    if envelope.first_seen_ms is not None:
        table["lv-first-seen"] = envelope.first_seen_ms
    if envelope.due_ms is not None:
        table["lv-due"] = envelope.due_ms
    if envelope.expires_at_ms is not None:
        table["lv-expires-at"] = envelope.expires_at_ms
    if envelope.unknown_since_ms is not None:
        table["lv-unknown-since"] = envelope.unknown_since_ms
    if envelope.errors:
        table["lv-errors"] = envelope.errors
    if envelope.origin is not None:
        table["lv-origin"] = envelope.origin
        table[PRIORITY_HEADER] = envelope.priority.value
    return table


def unpack_headers(table: Mapping[str, object] | None) -> tuple[dict[str, Any], str | None]:
    """Return `Envelope`'s fields out of a headers table, and what is wrong with it, if anything.

    A field of the wrong type keeps its default, so that the job can still be shown and buried.
    """
    fields: dict[str, Any] = {}
    if not table:
        return fields, None
    problem: str | None = None
    users = {name: value for name, value in table.items() if not name.startswith("lv-") and not is_brokers_own(name)}
    if users:
        fields["headers"] = users
    for field, name, kind in _FIELDS:
        value = table.get(name)
        if value is None:
            continue
        if type(value) is kind and (field not in _RANGES or value in _RANGES[field]):
            fields[field] = value
        else:
            problem = (
                problem
                or f"header {name} is {value!r:.80}, not {'a text' if kind is str else 'a moment' if name in _MOMENTS else 'a count'}"
            )
    level = table.get(PRIORITY_HEADER)
    if level is not None:
        try:
            fields["priority"] = Priority(level)
        except ValueError:
            problem = problem or f"header {PRIORITY_HEADER} is {level!r:.80}, not a level"
    return fields, problem


def header_bytes(table: Mapping[str, object]) -> int:
    """Return about how many bytes a headers table takes on the wire."""
    return sum(
        len(name.encode()) + (len(value.encode()) + 5 if isinstance(value, str) else 9) + 1
        for name, value in table.items()
    )
