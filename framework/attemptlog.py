"""The log records of runs: one per ending on the logger `leveret.attempt`, by the consumer and by `Logs`; warnings on `leveret.consumer`."""

from __future__ import annotations

import logging
from typing import Any

from .attempt import Attempt
from .tracebacks import ExcInfo

logger = logging.getLogger("leveret.attempt")
_warnings = logging.getLogger("leveret.consumer")


def log_attempt(
    level: int,
    attempt: Attempt[Any],
    outcome: str,
    duration_s: float,
    said: str,
    exc_info: ExcInfo | None = None,
    **fields: object,
) -> None:
    """Log how a run ended: one line that ends with `said`. Every value is a field of the record, for a JSON formatter; never the payload."""
    envelope = attempt.envelope
    logger.log(
        level,
        "job %s %s attempt %d: %s",
        envelope.job,
        envelope.job_id,
        envelope.attempt,
        said,
        exc_info=exc_info,
        extra={
            "job": envelope.job,
            "job_id": envelope.job_id,
            "queue": envelope.queue,
            "attempt": envelope.attempt,
            "correlation_id": envelope.correlation_id,
            "redelivered": attempt.redelivered,
            "outcome": outcome,
            "duration_s": duration_s,
            **fields,
        },
    )


def warn_of(attempt: Attempt[Any], said: str, *args: object) -> None:
    """Log a warning of a run that goes on: one line that begins with the job and its id. The fields are those of `Attempt.log`."""
    envelope = attempt.envelope
    _warnings.warning("job %s %s " + said, envelope.job, envelope.job_id, *args, extra=attempt.log.extra)


def when(delay_s: float | None) -> str:
    """Return the text for a wait before the next run: "at once" without a delay."""
    return f"in {duration(delay_s)}" if delay_s else "at once"


def duration(seconds: float) -> str:
    """Return a short duration, such as 12.3 ms, 1.5 s, 2 min 5 s or 1 h."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.2f}".rstrip("0").rstrip(".") + " s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{n} {unit}" for n, unit in ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")) if n]
    return " ".join(parts[:2])
