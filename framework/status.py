"""The status of a job: what its store knows, as a program asks for it by a handle."""

from __future__ import annotations

from typing import Literal, final

import msgspec

from .store import Record, State


@final
class Status(msgspec.Struct, frozen=True, kw_only=True):
    """How a job is, as far as the store knows."""

    job_id: str
    state: State | Literal["unknown"]
    """
    - queued: the broker has the job.
    - delayed: the broker holds the job back until it is due, or the handler snoozed it.
    - running: a worker runs the job, or died while it did.
    - retrying: an attempt failed, and the job waits for the next one.
    - done, failed, aborted, expired: it has ended. A failed job is in the dead letters of its queue.
    - unknown: the store has no record of it: it was published with `connection=` and hasn't started, the record's time is over, or
      the store was down.
    """
    attempt: int = 0
    """The number of the last attempt, or of the first one that is to come; 0 if that isn't known."""
    progress: float | None = None
    """The last `attempt.progress` of this attempt, 0 to 1; None before the first."""
    note: str = ""
    """The note beside it."""
    error: str = ""
    """The error of the last attempt that failed: class and message."""
    reason: str = ""
    """Why the job was buried, or why it has no result though it is done."""
    aborting: bool = False
    """Whether somebody asked to abort the job, and it hasn't ended."""


def status_of(job_id: str, record: Record | None) -> Status:
    """Return the status of a job by its record."""
    if record is None:
        return Status(job_id=job_id, state="unknown")
    return Status(
        job_id=job_id,
        state=record.state,
        attempt=record.attempt,
        progress=record.progress,
        note=record.note,
        error=record.error,
        reason=record.reason,
        aborting=record.asked,
    )
