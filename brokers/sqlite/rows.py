"""A row: its columns, and how an envelope becomes a row and a row an envelope."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, TypeAlias

from leveret.envelope import Envelope
from leveret.errors import InvalidJob
from leveret.headers import pack_headers, unpack_headers
from leveret.job import Priority

_COLUMNS = "queue, level, {}, job_id, job, content_type, content_encoding, body, created_s, app, correlation_id, reply_to, headers"
Row: TypeAlias = tuple[
    str, str, int | None, str, str, str, str | None, bytes, int, str | None, str | None, str | None, str | None
]  # fmt: skip
JOB_ID: Final = 3
BODY: Final = 7
"""Where the id and the body stand in a `Row`."""
READ: Final = "queue, level, job_id, job, content_type, content_encoding, CAST(body AS BLOB), created_s, app, correlation_id, reply_to, headers"
"""What `unpack` reads; a body that a foreign producer wrote as text comes as its bytes."""


def text_or_bytes(value: bytes) -> str | bytes:
    """Return a text column's value, as its bytes where it isn't UTF-8: Python would raise, and one such row stop the whole file."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _inserts(table: str, when: str) -> tuple[tuple[int, str], ...]:
    # One statement for many rows: between two statements the thread would have to wait for the interpreter's lock each time.
    row = f"({', '.join('?' * (_COLUMNS.count(',') + 1))})"
    start = f"INSERT INTO {table} ({_COLUMNS.format(when)}) VALUES "  # noqa: S608 - columns of ours
    return tuple((count, start + ", ".join([row] * count)) for count in (64, 8, 1))


INSERTS: Final = {"jobs": _inserts("jobs", "due_ms"), "dead": _inserts("dead", "buried_ms")}
"""By table: statements that insert so many rows, most first."""


_NOT_JSON: dict[str, tuple[type, Callable[[Any], str], Callable[[str], object]]] = {
    "$bytes": (bytes, lambda value: base64.b64encode(value).decode(), base64.b64decode),
    "$datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "$decimal": (Decimal, str, Decimal),
}  # what a foreign producer's headers may hold beside what JSON has


def _to_json(value: object) -> object:
    if isinstance(value, bytearray):
        value = bytes(value)
    for name, (kind, write, _) in _NOT_JSON.items():
        if isinstance(value, kind):
            return {name: write(value)}
    msg = f"a header holds {value!r:.80}, which can't be stored"
    raise TypeError(msg)


def _from_json(table: dict[str, Any]) -> Any:
    if len(table) == 1:
        [(name, value)] = table.items()
        if name in _NOT_JSON:
            return _NOT_JSON[name][2](value)
    return table


# The standard library's JSON, since it brings back NaN and lone surrogates as they were.
_encode = json.JSONEncoder(default=_to_json, separators=(",", ":")).encode
_decode = json.JSONDecoder(object_hook=_from_json).decode


def headers_text(table: Mapping[str, object]) -> str | None:
    """Return what stands in the column `headers` for a headers table as AMQP has it."""
    return _encode(dict(table)) if table else None


def pack(queue: str, envelope: Envelope, when_ms: int | None) -> Row:
    """Return the row of `envelope`; TypeError for a header that can't be stored."""
    return (
        queue, envelope.priority.value, when_ms, envelope.job_id, envelope.job, envelope.content_type, envelope.content_encoding,
        envelope.body, envelope.created_s, envelope.app, envelope.correlation_id, envelope.reply_to, headers_text(pack_headers(envelope)),
    )  # fmt: skip


def packed(queue: str, envelope: Envelope, when_ms: int | None) -> Row:
    """Return the row of `envelope`, or raise InvalidJob where a header can't be stored."""
    try:
        return pack(queue, envelope, when_ms)
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"job {envelope.job_id} for queue {queue!r}: {error}"
        raise InvalidJob(msg, job_id=envelope.job_id) from error


def unpack(row: Sequence[Any]) -> tuple[Envelope, str | None]:
    """Return the envelope in a row of `READ`, and what is wrong with it, if anything."""
    fields: dict[str, Any] = {}
    problem = None
    (
        queue,
        level,
        job_id,
        job,
        content_type,
        content_encoding,
        body,
        created_s,
        app,
        correlation_id,
        reply_to,
        headers,
    ) = row
    # written out, since each job comes here: a loop takes three times as long
    if (
        type(job_id) is bytes or type(job) is bytes or type(content_type) is bytes or type(content_encoding) is bytes or type(app) is bytes
        or type(correlation_id) is bytes or type(reply_to) is bytes or type(headers) is bytes or type(level) is bytes
    ):  # fmt: skip
        row, problem = _readable(row)
        (
            queue,
            level,
            job_id,
            job,
            content_type,
            content_encoding,
            body,
            created_s,
            app,
            correlation_id,
            reply_to,
            headers,
        ) = row
    if headers is not None:
        try:
            fields, wrong = unpack_headers(_decode(headers))
            problem = problem or wrong
        except (ValueError, TypeError, AttributeError, RecursionError, ArithmeticError) as error:
            problem = problem or f"the headers can't be read: {error}"
    try:
        fields["priority"] = Priority(level)  # where it stands says more than a header
    except ValueError:
        problem = problem or f"its level {level!r:.80} is none of {', '.join(known.value for known in Priority)}"
    envelope = Envelope(
        job_id=job_id, job=job, queue=queue, body=body, content_type=content_type, content_encoding=content_encoding,
        created_s=created_s, app=app, correlation_id=correlation_id, reply_to=reply_to, **fields,
    )  # fmt: skip
    return envelope, problem


def _readable(row: Sequence[Any]) -> tuple[list[Any], str | None]:
    """Return a foreign producer's row with what isn't UTF-8 replaced, the body as it came; and what is wrong with it."""
    problem = None
    texts = list(row)
    for place, (name, value) in enumerate(zip(READ.split(", "), row, strict=True)):
        if isinstance(value, bytes) and "body" not in name:
            problem = problem or f"its column {name} is no UTF-8 text: {value!r:.80}"
            texts[place] = value.decode(errors="replace")
    return texts, problem
