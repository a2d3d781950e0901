"""Envelope ↔ AMQP properties. The body is the payload alone; the headers table is sent only if a field needs it.

An incoming message may come from any producer: a malformed one becomes an `Envelope` and the text of a problem, never an exception.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any, cast

import msgspec

from leveret.envelope import JSON, Envelope
from leveret.failure import Failure
from leveret.headers import is_brokers_own, pack_headers, unpack_headers
from leveret.ids import new_job_id
from leveret.job import Priority, Queue

from . import frames
from .topology import PRIORITY_PROPERTY, level_of

_LEVEL_OF_PROPERTY = {value: level for level, value in PRIORITY_PROPERTY.items()}
_LATEST_S = 253_402_300_799
"""The end of the year 9999: a foreign producer's later timestamp (one in milliseconds) can't be shown as a date."""


def encode_table(table: Mapping[str, Any]) -> bytearray:
    """Return the items of an AMQP table, without its length. TypeError for a value that AMQP has no type for."""
    out = bytearray()
    for name, value in table.items():
        key = name.encode()
        if len(key) > 255:
            msg = f"the header name {name!r:.80} has {len(key)} bytes; the limit is 255"
            raise TypeError(msg)
        out.append(len(key))
        out += key
        out += _encode_value(value)
    return out


def _encode_value(value: Any) -> bytes:
    match value:
        case bool():
            return b"t\x01" if value else b"t\x00"
        case int() if -(1 << 63) <= value < 1 << 63:
            return b"l" + value.to_bytes(8, "big", signed=True)
        case str():
            raw = value.encode()
            return b"S" + struct.pack(">I", len(raw)) + raw
        case float() if math.isfinite(value):  # Erlang has no infinity and no NaN: RabbitMQ would close the connection
            return b"d" + struct.pack(">d", value)
        case None:
            return b"V"
        case bytearray():
            return b"x" + struct.pack(">I", len(value)) + value
        case bytes():  # pamqp decodes a long string that isn't UTF-8 as bytes
            return b"S" + struct.pack(">I", len(value)) + value
        case datetime():
            return b"T" + struct.pack(">Q", int(value.timestamp()))
        case Decimal():
            sign, digits, exponent = value.as_tuple()
            if isinstance(exponent, int) and -255 <= exponent <= 0:
                mantissa = (-1 if sign else 1) * int("".join(map(str, digits)))
                if -(1 << 31) <= mantissa < 1 << 31:  # signed, as pamqp and RabbitMQ read it
                    return b"D" + struct.pack(">Bi", -exponent, mantissa)
        case dict():
            inner = encode_table(cast("dict[str, Any]", value))
            return b"F" + struct.pack(">I", len(inner)) + inner
        case list():
            values: list[Any] = value  # pyright: ignore[reportUnknownVariableType]
            items = b"".join(map(_encode_value, values))
            return b"A" + struct.pack(">I", len(items)) + items
        case _:
            pass
    msg = f"AMQP has no type for {value!r:.80}"
    raise TypeError(msg)


_shorts: dict[str, bytes] = {}
_flags = struct.Struct(">H").pack
_u64 = struct.Struct(">Q").pack
_unpack_u64 = struct.Struct(">Q").unpack_from


def _cached(text: str) -> bytes:
    """Return the shortstr of a name that is used often: of a job, an app or a content type."""
    known = _shorts.get(text)
    if known is None:
        if len(_shorts) > 1000:
            _shorts.clear()
        known = _shorts[text] = frames.short(text)
    return known


_plain: dict[tuple[str, str | None, int | None, str], tuple[bytes, bytes]] = {}


def _plain_ends(envelope: Envelope, priority: int | None) -> tuple[bytes, bytes]:
    """Return the bytes before the id and after the time, for an envelope without headers, correlation id and reply-to."""
    flags = frames.CONTENT_TYPE | frames.DELIVERY_MODE | frames.MESSAGE_ID | frames.TIMESTAMP | frames.TYPE
    mode, tail = b"\x02", frames.short(envelope.job)
    if priority is not None:
        flags |= frames.PRIORITY
        mode = bytes((2, priority))
    if envelope.app is not None:
        flags |= frames.APP_ID
        tail += frames.short(envelope.app)
    return _flags(flags) + frames.short(envelope.content_type) + mode, tail


def encode(envelope: Envelope, priority: int | None) -> bytes:
    """Return the flags and values of `envelope`'s properties; `priority` is for classic job queues, None leaves it unset.

    A priority of 0 isn't the same as none: on quorum queues of 4.3 it puts a job behind its peers.
    Never sent: `expiration` (lost on the first hop, and its dead-lettering would look like a failure), `user_id`.
    Raises TypeError or ValueError for a value that AMQP can't carry.
    """
    headers = pack_headers(envelope)
    if (
        not (headers or envelope.correlation_id or envelope.reply_to or envelope.content_encoding)
        and envelope.created_s
        and envelope.job
    ):
        # most envelopes: everything but id and time is the same for every job of a name
        key = (envelope.job, envelope.app, priority, envelope.content_type)
        ends = _plain.get(key)
        if ends is None:
            ends = _plain_ends(envelope, priority)
            if len(_plain) < 1000:
                _plain[key] = ends
        return b"".join((ends[0], frames.short(envelope.job_id), _u64(envelope.created_s), ends[1]))
    flags = frames.CONTENT_TYPE | frames.DELIVERY_MODE | frames.MESSAGE_ID
    out: list[bytes | bytearray] = [b"", _cached(envelope.content_type)]
    if envelope.content_encoding is not None:
        flags |= frames.CONTENT_ENCODING
        out.append(frames.short(envelope.content_encoding))
    if headers:
        flags |= frames.HEADERS
        table = encode_table(headers)
        out += (len(table).to_bytes(4, "big"), table)
    if priority is None:
        out.append(b"\x02")
    else:
        flags |= frames.PRIORITY
        out.append(bytes((2, priority)))
    if envelope.correlation_id is not None:
        flags |= frames.CORRELATION_ID
        out.append(frames.short(envelope.correlation_id))
    if envelope.reply_to is not None:
        flags |= frames.REPLY_TO
        out.append(frames.short(envelope.reply_to))
    out.append(frames.short(envelope.job_id))
    if envelope.created_s:
        flags |= frames.TIMESTAMP
        out.append(_u64(envelope.created_s))
    if envelope.job:
        flags |= frames.TYPE
        out.append(_cached(envelope.job))
    if envelope.app is not None:
        flags |= frames.APP_ID
        out.append(_cached(envelope.app))
    out[0] = _flags(flags)
    return b"".join(out)


def priority_property(queue: Queue, level: Priority) -> int | None:
    """Return AMQP's priority for a job of `queue`; None if each level has its own physical queue."""
    return PRIORITY_PROPERTY[level] if queue.type == "classic" and queue.priorities else None


def from_job_queue(properties: bytes, body: bytes, queue: str, level: Priority | None) -> tuple[Envelope, str | None]:
    """Return the envelope taken from job queue `queue`, and its problem, if any; with `level` None, the priority property is the level."""
    if (plain := _plain_envelope(properties, body, queue, level)) is not None:
        return plain, None
    found, fields, problem = _read(properties)
    if level is None:
        level = _level_of_property(found.get("priority"))
    fields["priority"] = level
    fields.pop("origin", None)  # a header of dead letters only: somebody moved one back by hand
    return _envelope(found, fields, queue, body), problem


_PLAIN = frames.CONTENT_TYPE | frames.DELIVERY_MODE | frames.MESSAGE_ID | frames.TIMESTAMP | frames.TYPE | frames.APP_ID
_PLAIN_PRIORITY = _PLAIN | frames.PRIORITY
# Everything but id and time is the same for every job of a name: the bytes before the id, and those after the time.
_heads: dict[bytes, tuple[str, Priority]] = {}
_tails: dict[bytes, tuple[str, str]] = {}


def _plain_envelope(raw: bytes, body: bytes, queue: str, level: Priority | None) -> Envelope | None:
    """Return the envelope of a first publish by leveret without headers, which most messages are; None for any other message."""
    try:
        flags = raw[0] << 8 | raw[1]
        if flags == _PLAIN:
            at = raw[2] + 4
        elif flags == _PLAIN_PRIORITY:
            at = raw[2] + 5
        else:
            return None
        end = at + 1 + raw[at]
        head, tail = raw[:at], raw[end + 8 :]
        known, ends = _heads.get(head), _tails.get(tail)
        if known is None:
            known = raw[3 : 3 + raw[2]].decode(), _level_of_property(raw[at - 1] if flags == _PLAIN_PRIORITY else None)
            if len(_heads) < 1000:
                _heads[head] = known
        if ends is None:
            middle = 1 + tail[0]
            ends = tail[1:middle].decode(), tail[middle + 1 :].decode()
            if middle + 1 + tail[middle] != len(tail):
                return None
            if len(_tails) < 1000:
                _tails[tail] = ends
        job_id = raw[at + 1 : end].decode()
        created_s = _unpack_u64(raw, end)[0]
    except (IndexError, ValueError, struct.error):
        return None
    if not job_id or not known[0] or created_s > _LATEST_S:
        return None
    return Envelope(
        job_id=job_id,
        job=ends[0],
        queue=queue,
        priority=level or known[1],
        body=body,
        content_type=known[0],
        created_s=created_s,
        app=ends[1],
    )


def max_delivered_bytes(frame_max: int) -> int:
    """Return the limit for the properties of a delivery: larger ones couldn't be published again with the headers that a retry adds."""
    return (frame_max - frames.PROPERTIES_OVERHEAD) * 3 // 4


def id_in(properties: bytes) -> str | None:
    """Return the id of a message that is too large to be decoded whole; None if it has none that can be read."""
    try:
        return frames.decode_properties(properties).get("message_id")
    except ValueError:
        return None


def excess(properties_bytes: int, max_properties_bytes: int, body_bytes: int, max_body_bytes: int) -> str | None:
    """Return which limit a message exceeds, and by which size; None if it exceeds none."""
    if body_bytes > max_body_bytes:
        return f"a body of {body_bytes} bytes, limit {max_body_bytes}"
    if properties_bytes > max_properties_bytes:
        return f"{properties_bytes} bytes of properties, limit {max_properties_bytes}"
    return None


def from_dead_queue(
    properties: bytes, body: bytes, queue: str, max_properties_bytes: int = 1 << 62, max_body_bytes: int = 1 << 62
) -> tuple[Envelope, str | None]:
    """Return the envelope taken from the dead letters of `queue`, buried by leveret or by the broker itself, and its problem, if any.

    RabbitMQ keeps no reason with a message that a worker rejected. A worker rejects only what exceeds the limits, so the reason is
    computed again here.
    """
    found, fields, problem = _read(properties)
    if not found.get("message_id"):
        import hashlib  # half a MB that a worker doesn't need

        # the same at every read, so that the letter can be shown and replayed by its id
        found["message_id"] = hashlib.blake2b(properties + body, digest_size=12).hexdigest()
    if fields.get("origin") is None:
        fields["origin"] = queue
        death = _death(found.get("table"), queue)
        if death is not None:
            level, reason = death
            if reason == "rejected":
                size = len(properties) - _added(found["table"])
                exceeds = excess(size, max_properties_bytes, len(body), max_body_bytes)
                reason = reason if exceeds is None else f"too large to be published again: {exceeds}"
            fields.setdefault("priority", level or _level_of_property(found.get("priority")))
            # so that `dead list` can say why
            failure = Failure(
                attempt=fields.get("attempt", 1),
                at_ms=0,
                host="",
                error="dead-lettered",
                message=f"by the broker: {reason}",
            )
            fields["errors"] = fields.get("errors") or msgspec.json.encode([failure]).decode()
    return _envelope(found, fields, fields["origin"], body), problem


def _added(table: Mapping[str, Any]) -> int:
    """Return the bytes of the headers that RabbitMQ itself added to a message."""
    return len(encode_table({name: value for name, value in table.items() if is_brokers_own(name)}))


def _level_of_property(priority: int | None) -> Priority:
    if priority is None:
        return Priority.NORMAL
    return _LEVEL_OF_PROPERTY[min(max(priority, 3), 6)]


def _read(properties: bytes) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """Return the properties, the fields of `Envelope` in the headers table, and the problem, if any."""
    found: dict[str, Any] = {}
    try:
        found = frames.decode_properties(properties)
        octets = found.get("headers")
        if not octets:
            return found, {}, None
        table = found["table"] = frames.table_of(octets)
    except ValueError as error:
        # a malformed headers table doesn't lose the other properties: they are kept when the job is buried
        return found, {}, f"the AMQP properties can't be read: {error}"[:300]
    fields, problem = unpack_headers(table)
    return found, fields, problem


def _envelope(found: Mapping[str, Any], fields: dict[str, Any], queue: str, body: bytes) -> Envelope:
    """Return the envelope; a property that a foreign producer left out gets its documented default."""
    get = found.get
    return Envelope(
        job_id=get("message_id") or new_job_id(),
        job=get("type") or "",
        queue=queue,
        body=body,
        content_type=get("content_type") or JSON,
        content_encoding=get("content_encoding") or None,
        created_s=min(get("timestamp") or 0, _LATEST_S),
        app=get("app_id"),
        correlation_id=get("correlation_id"),
        reply_to=get("reply_to"),
        **fields,
    )


def _death(headers: Mapping[str, Any] | None, queue: str) -> tuple[Priority | None, str] | None:
    """Return the level and the reason of a job that the broker itself dead-lettered out of `queue`.

    The newest entry of `queue` in `x-death` counts: for a job that was delayed, `x-first-death-queue` names a delay queue. None for a
    message that was published to the dead-letter queue by hand.
    """
    deaths = (headers or {}).get("x-death")
    if not isinstance(deaths, list):
        return None
    entries: list[Any] = deaths  # pyright: ignore[reportUnknownVariableType]
    for death in entries:
        if isinstance(death, dict):
            entry = cast("dict[str, Any]", death)
            level = level_of(queue, str(entry.get("queue")))
            if level is not None:
                # a classic queue has the name of the NORMAL sibling: the priority property has the level
                return (None if level is Priority.NORMAL else level), str(entry.get("reason"))
    return None
