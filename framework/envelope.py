"""The envelope: one job as it travels, with its payload, headers and history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from .headers import HeaderValue, check_headers
from .job import Priority

JSON = "application/json"
MSGPACK = "application/msgpack"
ALONE_FROM = 2
"""A job with so many crashes runs alone. After one it runs beside the others: a kill returns all its neighbours, too."""


class Envelope(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One job as it travels. Headers may hold any AMQP value, since foreign producers publish too."""

    job_id: str
    """A UUIDv7, or the id that the publisher gave; the same in every retry and replay."""
    job: str
    """The registered name; "" if a foreign producer sent none."""
    queue: str
    """The logical queue."""
    priority: Priority = Priority.NORMAL
    body: bytes = b""
    """The payload alone, still encoded."""
    content_type: str = JSON
    content_encoding: str | None = None
    """Never set by leveret, and kept. A worker decodes bodies with `utf-8`, `utf8`, `us-ascii` and `binary` only."""
    created_s: int = 0
    """When the job was published, Unix seconds, publisher's clock; 0 if a foreign producer sent no time."""
    app: str | None = None
    """Name of the publishing app."""
    correlation_id: str | None = None
    """Id of the first job in a line of jobs; a job published inside a handler inherits the id."""
    reply_to: str | None = None
    """Set only by foreign producers, and kept."""
    headers: Mapping[str, object] = {}
    """Users' headers and the trace context, without the broker's and leveret's own headers."""

    attempt: int = 1
    """Number of the coming run; only runs that count as attempts are counted."""
    passes: int = 0
    """How often leveret published the job again: retries, snoozes and replays."""
    crashes: int = 0
    """How many workers may have died while they ran this job; 0 again once a run has ended."""
    version: int = 1
    """Version of the contract that encoded the job."""
    publish: int = 0
    """64 random bits, signed, that tell this publish from others of the same id; 0 for a job of which no store keeps anything."""
    first_seen_ms: int | None = None
    """When the job was first delivered, Unix ms; None before that."""
    due_ms: int | None = None
    """The job runs at the earliest then, Unix ms; kept after the delay, so that lateness shows."""
    expires_at_ms: int | None = None
    """The job must have started by then, Unix ms."""
    unknown_since_ms: int | None = None
    """Since when the job has waited for a handler that knows its name and version, Unix ms."""
    strangers: str = ""
    """Which workers have met the job since then and don't know it: their short ids, with commas between."""
    bury_since_ms: int | None = None
    """Since when the job waits to be buried, Unix ms: no worker runs it. Its dead letters took nothing."""
    errors: str = ""
    """The failures so far: a JSON list of `Failure`, of which the newest are kept."""
    origin: str | None = None
    """In a dead-letter queue: the queue from which the job was buried."""

    cause: Literal["retry", "snooze", "bury", "crash"] | None = None
    """Why leveret publishes the job again; None for a publisher's publish. Not sent."""
    deadline: float = float("inf")
    """When the publish must have ended, `time.monotonic()` seconds. Not sent."""
    resend: bool = False
    """Whether the publish is repeated if its outcome is lost before the deadline. Not sent."""

    def due_in_s(self, now: float, /) -> float:
        """Return the seconds from `now` (Unix) until the job is due; 0 if the job may run at once."""
        return 0.0 if self.due_ms is None else max(0.0, self.due_ms / 1000 - now)

    def with_headers(self, headers: Mapping[str, HeaderValue], /) -> Envelope:
        """Return a copy with these headers added; ValueError for a name that starts with `lv-`."""
        return msgspec.structs.replace(self, headers={**self.headers, **check_headers(headers)})


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """The result of a publish: the job's id, and what is known of the job."""

    job_id: str
    state: Literal["confirmed", "uncommitted"] = "confirmed"
    """
    - confirmed: the broker has the job.
    - uncommitted: the job is in the transaction of `connection=`. Nothing is promised before that transaction is committed.
    """
