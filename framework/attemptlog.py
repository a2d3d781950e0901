"""The log records of runs, on the logger `leveret.attempt`. The consumer and the middleware `Logs` write them, one per ending."""

from __future__ import annotations

import logging
from typing import Any

from .attempt import Attempt
from .tracebacks import ExcInfo

logger = logging.getLogger("leveret.attempt")


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


def again_in(delay_s: float | None) -> str:
    """Return the text for a job that runs again after `delay_s`; "" without a delay."""
    return "" if delay_s is None else f", again in {duration(delay_s)}"


def duration(seconds: float) -> str:
    """Return a short duration, such as 12.3 ms or 1.50 s."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
