"""Job ids: UUIDv7, so that ids sort by the millisecond in which they were made."""

from __future__ import annotations

import os
import re
import time
from datetime import datetime, timezone

_IDS = 400
# Prepared ends of ids: one system call for many. list.pop is atomic, so two threads never get the same end.
_ends: list[str] = []
_stamp = (0, "")
"""A millisecond, and the first part of its ids."""


def _forget_ends() -> None:
    _ends.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_ends)  # otherwise parent and child would make the same ids


def new_job_id() -> str:
    """Return a new UUIDv7 as text. Source: RFC 9562, section 5.7."""
    global _stamp  # noqa: PLW0603 - one tuple, so that no thread sees half of an update
    now_ms = time.time_ns() // 1_000_000
    known_ms, begin = _stamp
    if known_ms != now_ms:
        text = f"{now_ms:012x}"
        begin = f"{text[:8]}-{text[8:]}-7"
        _stamp = now_ms, begin
    try:
        return begin + _ends.pop()
    except IndexError:
        chance = os.urandom(10 * _IDS).hex()
        # version 7 (above) before 12 random bits, variant 10 before 62 random bits
        fresh = [
            f"{chance[at : at + 3]}-{_VARIANT[chance[at + 3]]}{chance[at + 4 : at + 7]}-{chance[at + 7 : at + 19]}"
            for at in range(0, 20 * _IDS, 20)
        ]
        end = fresh.pop()  # taken before the list grows: other threads might take all of the new ends
        _ends.extend(fresh)
        return begin + end


def slot_job_id(app: str, schedule: str, slot: datetime) -> str:
    """Return the id of the job of a schedule's slot, which is the same on every replica and after a restart."""
    return f"{app}.{schedule}@{slot.astimezone(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


_SLOT = re.compile(r"\.[A-Za-z0-9_.-]+@\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)


def is_slot_job_id(job_id: str, app: str | None) -> bool:
    """Whether `job_id` is from `slot_job_id`, for a job that `app` published."""
    return app is not None and job_id.startswith(app) and _SLOT.fullmatch(job_id, len(app)) is not None


_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}
