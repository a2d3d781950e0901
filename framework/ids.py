"""Job ids: UUIDv7, so that they sort by the millisecond in which they were made."""

from __future__ import annotations

import os
import time

_IDS = 400
# Ready-made ends of ids: one call of the system for many. A list's pop is whole, so threads never get the same.
_ends: list[str] = []
_stamp = (0, "")
"""A millisecond, and how its ids begin."""


def _forget_ends() -> None:
    _ends.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_ends)  # else parent and child would make the same ids


def new_job_id() -> str:
    """Return a new UUIDv7 as text. Source: RFC 9562, section 5.7."""
    global _stamp  # noqa: PLW0603 - one value, so that no thread sees a half of it
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
        # version 7 (above) and variant 10 in front of 12 and 62 bits of chance
        fresh = [
            f"{chance[at : at + 3]}-{_VARIANT[chance[at + 3]]}{chance[at + 4 : at + 7]}-{chance[at + 7 : at + 19]}"
            for at in range(0, 20 * _IDS, 20)
        ]
        end = fresh.pop()  # before the others see them: another thread might take them all
        _ends.extend(fresh)
        return begin + end


_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}
