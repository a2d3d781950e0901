"""Jobs as the columns of a statement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from leveret.clock import Clock
from leveret.envelope import Envelope
from leveret.errors import InvalidJob
from leveret.job import Queue

from ...rows import JOB_ID, packed, when_ms
from ..statements import columns

Jobs: TypeAlias = Sequence[tuple[Queue, Envelope]]


def rows_of(jobs: Jobs, clock: Clock) -> Sequence[Any]:
    """Return the columns of jobs, with delays; InvalidJob for what PostgreSQL doesn't take."""
    rows = [packed(queue.name, envelope, when_ms(envelope, clock)) for queue, envelope in jobs]
    for row in rows:
        for value in row:
            if isinstance(value, str):
                check_text(value, row[JOB_ID])
    return [list(column) for column in columns(rows, clock.now() * 1000)]


def check_text(value: str, job_id: str) -> None:
    """Raise InvalidJob for a text that PostgreSQL doesn't take."""
    try:
        refused = b"\0" in value.encode()
    except UnicodeEncodeError:
        refused = True
    if refused:
        msg = f"job {job_id!r:.80}: PostgreSQL takes no text with a NUL or half a surrogate pair, such as {value!r:.80}"
        raise InvalidJob(msg, job_id=job_id)
