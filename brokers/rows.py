"""A row: its columns, and the conversion between envelopes and rows. Every store keeps the same columns, each by its own statements."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, TypeAlias

from leveret.clock import Clock
from leveret.envelope import Envelope
from leveret.errors import InvalidJob
from leveret.headers import pack_headers, unpack_headers
from leveret.job import Priority

Row: TypeAlias = tuple[
    str, str, int | None, str, str, str, str | None, bytes, int, str | None, str | None, str | None, str | None
]  # fmt: skip
JOB_ID: Final = 3
BODY: Final = 7
"""The places of the id and the body in a `Row`."""
COLUMNS: Final = (
    "queue", "level", "job_id", "job", "content_type", "content_encoding", "body", "created_s", "app", "correlation_id", "reply_to", "headers",
)  # fmt: skip
"""The columns that `unpack` takes, in their order. A `Row` has one more, after the level: when the job is due, or when it was buried."""

_PRIORITIES: Final[Mapping[object, Priority]] = {priority.value: priority for priority in Priority}

# Types that a foreign producer's headers may hold and JSON doesn't have.
_NOT_JSON: dict[str, tuple[type, Callable[[Any], str], Callable[[str], object]]] = {
    "$bytes": (bytes, lambda value: base64.b64encode(value).decode(), base64.b64decode),
    "$datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "$decimal": (Decimal, str, Decimal),
}


def _to_json(value: object) -> object:
    if isinstance(value, bytearray):
        value = bytes(value)
    for name, (kind, write, _) in _NOT_JSON.items():
        if isinstance(value, kind):
            return {name: write(value)}
    msg = f"its headers hold {value!r:.80}, which can't be stored"
    raise TypeError(msg)


def _from_json(table: dict[str, Any]) -> Any:
    if len(table) == 1:
        [(name, value)] = table.items()
        if name in _NOT_JSON:
            return _NOT_JSON[name][2](value)
    return table


# The standard library's JSON, since it restores NaN and lone surrogates unchanged.
_encode = json.JSONEncoder(default=_to_json, separators=(",", ":")).encode
_decode = json.JSONDecoder(object_hook=_from_json).decode
# Most jobs whose class has `keep` have this header and no other: read so, it takes a sixth of the time.
_publish_alone = re.compile(r'\{"lv-publish":(-?[1-9][0-9]{0,18})\}').fullmatch


def headers_text(table: Mapping[str, object]) -> str | None:
    """Return the value of the column `headers` for a headers table of AMQP."""
    if not table:
        return None
    if len(table) == 1 and type(publish := table.get("lv-publish")) is int:
        return f'{{"lv-publish":{publish}}}'
    return _encode(dict(table))


def pack(queue: str, envelope: Envelope, when_ms: int | None) -> Row:
    """Return the row of `envelope`; TypeError if a header can't be stored."""
    return (
        queue, envelope.priority.value, when_ms, envelope.job_id, envelope.job, envelope.content_type, envelope.content_encoding,
        envelope.body, envelope.created_s, envelope.app, envelope.correlation_id, envelope.reply_to, headers_text(pack_headers(envelope)),
    )  # fmt: skip


def packed(queue: str, envelope: Envelope, when_ms: int | None) -> Row:
    """Return the row of `envelope`; InvalidJob if a header can't be stored."""
    try:
        return pack(queue, envelope, when_ms)
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"job {envelope.job_id} for queue {queue!r}: {error}"
        raise InvalidJob(msg, job_id=envelope.job_id) from error


def when_ms(envelope: Envelope, clock: Clock) -> int | None:
    """Return the time before which a job isn't claimed, Unix ms; None if the job may run at once."""
    return envelope.due_ms if envelope.due_in_s(clock.now()) else None


def delay_ms(due_ms: int, now_ms: float) -> int:
    """Return the delay after which a job is due at `due_ms` by a server whose clock may be another; rounded up, so that none is due early."""
    return max(0, math.ceil(due_ms - now_ms - 1e-3))  # as `moment_ms`


def unpack(row: Sequence[Any]) -> tuple[Envelope, str | None]:
    """Return the envelope in a row of `COLUMNS`, and its problem, if any. A store passes a text that isn't UTF-8 as bytes."""
    fields: dict[str, Any] = {}
    problem = None
    (
        queue, level, job_id, job, content_type, content_encoding, body, created_s, app, correlation_id, reply_to, headers,
    ) = row  # fmt: skip
    # written out, since every job passes here: a loop takes three times as long
    if (
        type(job_id) is bytes or type(job) is bytes or type(content_type) is bytes or type(content_encoding) is bytes or type(app) is bytes
        or type(correlation_id) is bytes or type(reply_to) is bytes or type(headers) is bytes or type(level) is bytes
    ):  # fmt: skip
        row, problem = _readable(row)
        (
            queue, level, job_id, job, content_type, content_encoding, body, created_s, app, correlation_id, reply_to, headers,
        ) = row  # fmt: skip
    if headers is None:
        pass
    elif (alone := _publish_alone(headers)) is not None:
        fields["publish"] = int(alone[1])
    else:
        try:
            fields, wrong = unpack_headers(_decode(headers))
            problem = problem or wrong
        except (ValueError, TypeError, AttributeError, RecursionError, ArithmeticError) as error:
            problem = problem or f"the headers can't be read: {error}"
    try:
        fields["priority"] = _PRIORITIES[level]  # the column decides, not a header
    except (KeyError, TypeError):
        problem = (
            problem
            or f"its level {level!r:.80} is unknown; the levels are {', '.join(known.value for known in Priority)}"
        )
    envelope = Envelope(
        job_id=job_id, job=job, queue=queue, body=body, content_type=content_type, content_encoding=content_encoding,
        created_s=created_s, app=app, correlation_id=correlation_id, reply_to=reply_to, **fields,
    )  # fmt: skip
    return envelope, problem


def _readable(row: Sequence[Any]) -> tuple[list[Any], str | None]:
    """Return a foreign producer's row with invalid UTF-8 replaced and the body unchanged, and the problem, if any."""
    problem = None
    texts = list(row)
    for place, (name, value) in enumerate(zip(COLUMNS, row, strict=True)):
        if isinstance(value, bytes) and name != "body":
            problem = problem or f"its column {name} isn't UTF-8 text: {value!r:.80}"
            texts[place] = value.decode(errors="replace")
    return texts, problem
