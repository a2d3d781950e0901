"""ending → envelope: what leveret publishes in a job's place after a run."""

from __future__ import annotations

import socket
import time
import traceback
from typing import Any

import msgspec

from ..broker import Delivery
from ..envelope import Envelope
from ..failure import Failure, failures_of
from ..headers import MOST
from ..texts import named, one_line, said_by
from ..tracebacks import exc_info

SETTLE_TIMEOUT_S = 5.0
"""Seconds per try to publish a retry or a burial; the tries go on until the delivery's channel or lease is gone."""
MAX_ERRORS_BYTES = 16 << 10
_TRACEBACK_CHARS = 2000
_MESSAGE_CHARS = 500
_SHORTEST_WAIT_S = 0.25
"""The unit of delays on RabbitMQ."""


def entered(envelope: Envelope, failure: Failure) -> Envelope:
    """Return `envelope` with another entry in its errors; the oldest entries are dropped above `MAX_ERRORS_BYTES`."""
    failures = [*failures_of(envelope), failure]
    text = msgspec.json.encode(failures)
    while len(text) > MAX_ERRORS_BYTES and len(failures) > 1:
        failures = failures[1:]
        text = msgspec.json.encode(failures)
    return msgspec.structs.replace(envelope, errors=text.decode())


def following(envelope: Envelope, **changes: Any) -> Envelope:
    """Return `envelope` for its next publish: the same id, one more pass."""
    # the count of a foreign producer may be at its maximum
    fresh = {"crashes": 0, "unknown_since_ms": None, "strangers": ""}
    counted = {"passes": min(envelope.passes + 1, MOST), **fresh, **changes}
    return msgspec.structs.replace(envelope, **counted)


def uncounted(delivery: Delivery, *, began: bool) -> Envelope:
    """Return the envelope of `delivery` for a publish without a count.

    A job that `began`, here or before, has a count of 1 at least, so that `Attempt.redelivered` says so and a worker that runs it
    knows it. The passes stay: by them, such a worker knows it.
    """
    envelope = delivery.envelope
    crashes = max(envelope.crashes, int(began or delivery.redelivered))
    return msgspec.structs.replace(envelope, crashes=crashes, due_ms=None)


def with_deadline(envelope: Envelope) -> Envelope:
    """Return `envelope` for one try of its publish, which ends within `SETTLE_TIMEOUT_S`."""
    return msgspec.structs.replace(envelope, deadline=time.monotonic() + SETTLE_TIMEOUT_S)


def unknown_wait_s(waited_s: float, grace_s: float) -> float:
    """Return how long a job waits for the next worker that may know it, seconds: a quarter of its wait so far.

    At least 40 waits fit into the grace, so that a job meets a worker that knows it even where most workers of its queue don't.
    """
    return max(_SHORTEST_WAIT_S, min(grace_s / 40, max(0.5, waited_s / 4)))


def met(strangers: str, worker: str) -> str:
    """Return the ids `strangers` with that of `worker` among them."""
    if worker in strangers:
        return strangers
    return f"{strangers},{worker}" if strangers else worker


def failure_of(envelope: Envelope, error: BaseException | None, reason: str, now: float) -> Failure:
    """Return the entry of a run that ended at `now`, Unix seconds, for the errors of `envelope`."""
    reason = reason or ("a retry was requested" if error is None else "")
    return Failure(
        attempt=envelope.attempt,
        at_ms=int(now * 1000),
        host=socket.gethostname(),
        error="" if error is None else one_line(type(error).__qualname__),
        message=(one_line(reason) if error is None else said_by(error))[:_MESSAGE_CHARS],
        reason=one_line(reason)[:_MESSAGE_CHARS],
        traceback="" if error is None else _trimmed(error),
    )


def waited(since_ms: int | None, now: float) -> tuple[int, float]:
    """Return since when a job waits, Unix ms, and for how long, seconds; from `now`, Unix seconds, on if it didn't wait before."""
    now_ms = int(now * 1000)
    # A time in the future, from a wrong clock, would make the job wait until then.
    since_ms = min(since_ms or now_ms, now_ms)
    return since_ms, (now_ms - since_ms) / 1000


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _trimmed(error: BaseException) -> str:
    try:
        text = _encodable("".join(traceback.format_exception(*exc_info(error))))
    except Exception as refused:  # noqa: BLE001 - a class of the user may refuse anything, and the job must still be settled
        return f"the traceback can't be shown: {named(refused)}"
    return text if len(text) <= _TRACEBACK_CHARS else "…" + text[-_TRACEBACK_CHARS:]
