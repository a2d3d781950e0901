"""One job on its way, and the table of headers that carries what AMQP has no property for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import msgspec

from .headers import HeaderValue, check_headers
from .job import Priority

JSON = "application/json"
MSGPACK = "application/msgpack"


class Envelope(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One job on its way; `job` is the registered name. Headers may hold anything that AMQP can, since others publish too."""

    job_id: str
    """UUIDv7, or what the publisher chose; kept by every retry and replay."""
    job: str
    """The registered name; "" where a foreign producer sent none."""
    queue: str
    """The logical queue."""
    priority: Priority = Priority.NORMAL
    body: bytes = b""
    """The payload alone, still encoded."""
    content_type: str = JSON
    content_encoding: str | None = None
    """Never set by leveret; a body that has one can't be decoded."""
    created_s: int = 0
    """Published at, Unix seconds, publisher's clock; 0 where a foreign producer didn't say."""
    app: str | None = None
    """Name of the publishing app."""
    correlation_id: str | None = None
    """Id of the first job of the line; a job published inside a handler inherits it."""
    reply_to: str | None = None
    """A foreign producer's; kept."""
    headers: Mapping[str, object] = {}
    """Users' headers and the trace context; none of the broker's own, none of leveret's."""

    attempt: int = 1
    """Runs that count, the coming one included."""
    passes: int = 0
    """How often leveret published it anew: retry, snooze, replay."""
    version: int = 1
    """Version of the contract that encoded it."""
    first_seen_ms: int | None = None
    """First delivered at, Unix ms; None until it was."""
    due_ms: int | None = None
    """Not before, Unix ms; kept after the delay, so that lateness can be seen."""
    expires_at_ms: int | None = None
    """Not after, Unix ms."""
    unknown_since_ms: int | None = None
    """Waiting since then for a handler that knows it, Unix ms."""
    errors: str = ""
    """What went wrong so far: a JSON list of `Failure`, the newest kept."""
    origin: str | None = None
    """In a dead-letter queue: the queue that it was buried from."""

    cause: Literal["retry", "snooze", "bury"] | None = None
    """Why leveret publishes it anew; None on a publisher's own publish. Not on the wire."""
    deadline: float = float("inf")
    """The publish must have ended by then, `time.monotonic()` seconds. Not on the wire."""

    def due_in_s(self, now: float, /) -> float:
        """Return the seconds from `now` (Unix) until the job is due; 0 where it may run at once."""
        return 0.0 if self.due_ms is None else max(0.0, self.due_ms / 1000 - now)

    def with_headers(self, headers: Mapping[str, HeaderValue], /) -> Envelope:
        """A copy with these headers added; ValueError for a name that starts with `lv-`."""
        return msgspec.structs.replace(self, headers={**self.headers, **check_headers(headers)})


@final
class Receipt(msgspec.Struct, frozen=True, gc=False):
    """What a publish gives back: the job's id, and that the broker has confirmed it."""

    job_id: str
    state: Literal["confirmed"] = "confirmed"
