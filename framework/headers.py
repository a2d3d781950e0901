"""The headers table: leveret's fields for which AMQP has no property, and users' headers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from .job import Priority

if TYPE_CHECKING:
    from .envelope import Envelope

HeaderValue: TypeAlias = str | int | float | bool
"""The types of a header's value; an integer has at most 64 bits."""
_BROKERS_OWN = frozenset({"x-death", "x-delivery-count", "x-acquired-count", "CC", "BCC"})
_BROKERS_PREFIXES = ("x-first-death-", "x-last-death-", "x-stream-")
_INT64 = 1 << 63
MOST = _INT64 - 1
"""The largest count: AMQP can't carry a larger one."""


def is_brokers_own(name: str) -> bool:
    """Whether header `name` belongs to RabbitMQ. Before 4.0, a copied `x-death` makes RabbitMQ drop the job on its second pass."""
    return name in _BROKERS_OWN or name.startswith(_BROKERS_PREFIXES)


def check_headers(headers: Mapping[str, HeaderValue]) -> dict[str, HeaderValue]:
    """Return a copy of `headers`, since the caller may change them after the publish; ValueError for a header that can't be sent."""
    if not isinstance(headers, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        msg = f"headers must be a mapping of names to values, not {headers!r:.80}"
        raise ValueError(msg)
    copy = dict(headers)
    for name, value in copy.items():
        if not isinstance(name, str) or not 0 < len(name.encode()) <= 128:  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"header {name!r}: the name must be a str of 1 to 128 bytes"
            raise ValueError(msg)
        if name.startswith("lv-") or is_brokers_own(name):
            msg = f"header {name!r}: names that start with lv- belong to leveret; x-death and similar names belong to the broker"
            raise ValueError(msg)
        if not isinstance(value, (str, int, float, bool)):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"header {name!r}: the value must be a str, int, float or bool, not {value!r}"
            raise ValueError(msg)
        if isinstance(value, int) and not -_INT64 <= value < _INT64:
            msg = f"header {name!r}: an integer must fit into 64 bits, {value} doesn't"
            raise ValueError(msg)
        if isinstance(value, float) and not math.isfinite(value):
            msg = f"header {name!r}: a number must be finite, not {value}; RabbitMQ closes a connection that sends such a number"
            raise ValueError(msg)
        if isinstance(value, str):
            value.encode()  # raises UnicodeEncodeError, a ValueError, for half a surrogate pair
    return copy


# The fields that are sent as headers: field, header, type.
_FIELDS: tuple[tuple[str, str, type], ...] = (
    ("attempt", "lv-attempt", int),
    ("passes", "lv-pass", int),
    ("crashes", "lv-crashes", int),
    ("version", "lv-version", int),
    ("publish", "lv-publish", int),
    ("first_seen_ms", "lv-first-seen", int),
    ("due_ms", "lv-due", int),
    ("expires_at_ms", "lv-expires-at", int),
    ("unknown_since_ms", "lv-unknown-since", int),
    ("strangers", "lv-strangers", str),
    ("bury_since_ms", "lv-bury-since", int),
    ("errors", "lv-errors", str),
    ("origin", "lv-origin", str),
)


_MOMENTS = ("lv-first-seen", "lv-due", "lv-expires-at", "lv-unknown-since", "lv-bury-since")
_RANGES = {
    "attempt": range(1, _INT64),
    "crashes": range(_INT64),
    "first_seen_ms": range(
        -62_135_596_800_000, 253_402_300_800_000
    ),  # the years 1 to 9999: `Attempt.first_seen` is a datetime
}


PRIORITY_HEADER = "lv-priority"


def pack_headers(envelope: Envelope) -> dict[str, object]:
    """Return the headers table of `envelope`: users' headers, and leveret's fields that differ from their defaults.

    Only a dead letter has `lv-priority`, because the dead-letter queue doesn't show the level.
    """
    table = dict(envelope.headers)
    # written out, since every publish calls this: a loop over `_FIELDS` takes ten times as long
    if envelope.attempt != 1:
        table["lv-attempt"] = envelope.attempt
    if envelope.passes:
        table["lv-pass"] = envelope.passes
    if envelope.crashes:
        table["lv-crashes"] = envelope.crashes
    if envelope.version != 1:
        table["lv-version"] = envelope.version
    if envelope.publish:
        table["lv-publish"] = envelope.publish
    if envelope.first_seen_ms is not None:
        table["lv-first-seen"] = envelope.first_seen_ms
    if envelope.due_ms is not None:
        table["lv-due"] = envelope.due_ms
    if envelope.expires_at_ms is not None:
        table["lv-expires-at"] = envelope.expires_at_ms
    if envelope.unknown_since_ms is not None:
        table["lv-unknown-since"] = envelope.unknown_since_ms
        if envelope.strangers:
            table["lv-strangers"] = envelope.strangers
    if envelope.bury_since_ms is not None:
        table["lv-bury-since"] = envelope.bury_since_ms
    if envelope.errors:
        table["lv-errors"] = envelope.errors
    if envelope.origin is not None:
        table["lv-origin"] = envelope.origin
        table[PRIORITY_HEADER] = envelope.priority.value
    return table


def unpack_headers(table: Mapping[str, object] | None) -> tuple[dict[str, Any], str | None]:
    """Return `Envelope`'s fields from a headers table, and what is wrong with the table, or None.

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
                or f"header {name} is {value!r:.80}, not {'a string' if kind is str else 'a time' if name in _MOMENTS else 'a count'}"
            )
    level = table.get(PRIORITY_HEADER)
    if level is not None:
        try:
            fields["priority"] = Priority(level)
        except ValueError:
            problem = problem or f"header {PRIORITY_HEADER} is {level!r:.80}, not a level"
    return fields, problem


def header_bytes(table: Mapping[str, object]) -> int:
    """Return the approximate size of a headers table on the wire, in bytes."""
    return sum(
        len(name.encode()) + (len(value.encode()) + 5 if isinstance(value, str) else 9) + 1
        for name, value in table.items()
    )
