"""How commands show a dead letter: as one line of a list, or in full."""

from __future__ import annotations

import base64

import msgspec

from ..envelope import MSGPACK, Envelope
from ..failure import Failure, failures_of
from ..process.logs import one_line
from ..settings import redact
from .output import counted, lines, moment

_HEAD_BYTES = 512


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `dead list`."""

    id: str
    job: str
    queue: str
    """The original queue."""
    priority: str
    attempt: int
    """The number of the last run."""
    passes: int
    buried_at_ms: int | None
    """Unix ms; None if the broker itself dead-lettered the job."""
    error: str
    """The class of the last error; "" if the job was buried without an error."""
    reason: str
    bytes: int


class LetterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter in full."""

    id: str
    job: str
    queue: str
    priority: str
    app: str | None
    created_s: int
    attempt: int
    passes: int
    version: int
    first_seen_ms: int | None
    expires_at_ms: int | None
    correlation_id: str | None
    reply_to: str | None
    content_type: str
    content_encoding: str | None
    headers: dict[str, object]
    failures: list[Failure]
    body: object
    """The decoded body if it is JSON or MessagePack; otherwise null, and `body_base64` holds the bytes."""
    body_base64: str | None
    bytes: int

    @classmethod
    def of(cls, envelope: Envelope) -> LetterRecord:
        """Return the record of `envelope`. Passwords of URLs are hidden in headers and failures; the body is unchanged."""
        body, readable = (None, False) if envelope.content_encoding else decoded(envelope.body, envelope.content_type)
        return cls(
            id=envelope.job_id,
            job=envelope.job,
            queue=envelope.queue,
            priority=envelope.priority.value,
            app=envelope.app,
            created_s=envelope.created_s,
            attempt=envelope.attempt,
            passes=envelope.passes,
            version=envelope.version,
            first_seen_ms=envelope.first_seen_ms,
            expires_at_ms=envelope.expires_at_ms,
            correlation_id=envelope.correlation_id,
            reply_to=envelope.reply_to,
            content_type=envelope.content_type,
            content_encoding=envelope.content_encoding,
            headers={name: _plain(value) for name, value in envelope.headers.items()},
            failures=[_redacted(failure) for failure in failures_of(envelope)],
            body=body,
            body_base64=None if readable else base64.b64encode(envelope.body).decode(),
            bytes=len(envelope.body),
        )


def summary_of(envelope: Envelope) -> Summary:
    """Return the list entry of `envelope`."""
    last = next(reversed(failures_of(envelope)), None)
    return Summary(
        id=envelope.job_id,
        job=envelope.job,
        queue=envelope.queue,
        priority=envelope.priority.value,
        attempt=envelope.attempt,
        passes=envelope.passes,
        buried_at_ms=None if last is None else last.at_ms or None,
        error="" if last is None else last.error,
        reason="" if last is None else redact(_reason(last)),
        bytes=len(envelope.body),
    )


def show_letter(record: LetterRecord) -> str:
    """Return a dead letter in full, as text."""
    facts: list[tuple[str, object]] = [
        ("id", record.id),
        ("job", f"{record.job or '(none)'}{f' version {record.version}' if record.version > 1 else ''}"),
        ("queue", f"{record.queue}, {record.priority}"),
        ("published", _joined(moment(record.created_s * 1000), record.app and f"by {record.app}")),
        ("first seen", moment(record.first_seen_ms)),
        ("expires", moment(record.expires_at_ms)),
        ("runs", f"{record.attempt}, republished {counted(record.passes, 'time')}"),
        ("correlation", record.correlation_id),
        ("reply to", record.reply_to),
    ]
    text = [f"{name:<12} {one_line(str(value))}" for name, value in facts if value]
    text += [f"header       {one_line(f'{name}: {value}')}" for name, value in record.headers.items()]
    before = ""
    for failure in record.failures:
        text += [
            "",
            f"run {failure.attempt}  {one_line(_joined(moment(failure.at_ms), failure.host and f'on {failure.host}', _reason(failure)))}",
        ]
        shown = "same traceback as above" if failure.traceback and failure.traceback == before else failure.traceback
        text += [f"  {line}" for line in lines(shown).rstrip().splitlines()]
        before = failure.traceback
    encoding = f", content encoding {record.content_encoding}" if record.content_encoding else ""
    text += ["", f"body         {record.bytes} bytes, {one_line(record.content_type + encoding)}"]
    return "\n".join([*text, *body_lines(record.body, record.body_base64)])


def body_lines(body: object, body_base64: str | None) -> list[str]:
    """Return the lines that show a decoded body, or the bytes of one that isn't decoded."""
    if body_base64 is None:
        return [f"  {line}" for line in lines(msgspec.json.format(msgspec.json.encode(body)).decode()).splitlines()]
    raw = base64.b64decode(body_base64)
    rows = [(offset, raw[offset : offset + 16]) for offset in range(0, min(len(raw), _HEAD_BYTES), 16)]
    shown = [f"  {offset:06x}  {row.hex(' '):<47}  {_ascii(row)}" for offset, row in rows]
    return [*shown, f"  … --json prints all {len(raw)} bytes in base64"] if len(raw) > _HEAD_BYTES else shown


def _ascii(raw: bytes) -> str:
    return "".join(chr(byte) if 32 <= byte < 127 else "." for byte in raw)


def decoded(body: bytes, content_type: str) -> tuple[object, bool]:
    """Return the decoded body, and whether it can be printed as JSON."""
    kind = content_type.partition(";")[0].strip().lower()
    try:
        value: object = (msgspec.msgpack if kind == MSGPACK else msgspec.json).decode(body)
        msgspec.json.encode(value)
    except (msgspec.MsgspecError, RecursionError, TypeError, ValueError, OverflowError):
        return None, False
    return value, True


def _plain(value: object) -> object:
    """Return a header's value in a form that JSON can hold; a header can have any AMQP type."""
    if isinstance(value, str):
        return redact(value)
    try:
        msgspec.json.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return redact(repr(value))
    return value


def _redacted(failure: Failure) -> Failure:
    return msgspec.structs.replace(
        failure, message=redact(failure.message), reason=redact(failure.reason), traceback=redact(failure.traceback)
    )


def _reason(failure: Failure) -> str:
    """Return the error, followed by the reason for the burial if that adds something."""
    error = ": ".join(part for part in (failure.error, failure.message) if part)
    if not failure.reason or failure.reason in error:
        return error
    return failure.reason if error in failure.reason else f"{error} ({failure.reason})"


def _joined(*parts: str | None) -> str:
    return " ".join(part for part in parts if part)
