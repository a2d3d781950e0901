"""What the suite's tests write: the changes of one publish."""

from __future__ import annotations

import time
from random import getrandbits
from typing import TypedDict, Unpack

from leveret.ids import new_job_id
from leveret.store import Change, Key, Progress, State

HOUR_S = 3600.0


class Fields(TypedDict, total=False):
    """The fields that a test may give."""

    queue: str
    job: str
    passes: int
    attempt: int
    keep_s: float
    at_ms: int
    result: bytes | None
    content_type: str
    error: str
    reason: str
    body: bytes | None


class Publish:
    """One publish of a job, unlike any other."""

    def __init__(self, job_id: str = "", **usual: Unpack[Fields]) -> None:
        self.key = Key(job_id or new_job_id(), getrandbits(64) - (1 << 63) or 1)
        self._usual = usual

    def is_(self, state: State, **fields: Unpack[Fields]) -> Change:
        """Return the change to `state`."""
        usual: Fields = {
            "queue": "contract",
            "job": "contract.case",
            "passes": 0,
            "attempt": 1,
            "keep_s": HOUR_S,
            "at_ms": int(time.time() * 1000),
        }
        usual.update(self._usual)
        usual.update(fields)
        return Change(job_id=self.key.job_id, publish=self.key.publish, state=state, **usual)

    def at(self, fraction: float, note: str = "", *, passes: int = 0, attempt: int = 1) -> Progress:
        """Return progress of a run."""
        job_id, publish = self.key
        return Progress(job_id=job_id, publish=publish, passes=passes, attempt=attempt, fraction=fraction, note=note)
