"""The failures of a job so far: the entries of `Envelope.errors`."""

from __future__ import annotations

import msgspec

from .envelope import Envelope

CANCELLED = "the task of the run was cancelled, neither by a Timeout nor by a stop"
"""The argument of the CancelledError of a run that a handler cancelled. Middleware between may still claim it, as `asyncio.timeout` does."""


class Failure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One entry of `Envelope.errors`."""

    attempt: int
    at_ms: int
    host: str
    error: str
    """The exception's class; "Bury" for a burial without an exception."""
    message: str
    reason: str = ""
    """Why the job was buried, if that says more than the error."""
    traceback: str = ""


def failures_of(envelope: Envelope) -> list[Failure]:
    """Return the failures of `envelope` so far, oldest first; an unreadable list counts as empty."""
    if not envelope.errors:
        return []
    try:
        return msgspec.json.decode(envelope.errors, type=list[Failure])
    except msgspec.MsgspecError:
        return []


def shortened(envelope: Envelope) -> Envelope:
    """Return a copy that keeps only the newest error, shortened to about 1.5 KB at most."""
    newest = [
        msgspec.structs.replace(failure, message=failure.message[:100], reason=failure.reason[:100], traceback="")
        for failure in failures_of(envelope)[-1:]
    ]
    return msgspec.structs.replace(envelope, errors=msgspec.json.encode(newest).decode() if newest else "")
