"""Job ids: UUIDv7, so that they sort by the millisecond in which they were made."""

from __future__ import annotations

import os
import time

_POOL_BYTES = 10 * 400
_pool = b""
_used = 0


def _forget_pool() -> None:
    global _pool  # noqa: PLW0603
    _pool = b""


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # else parent and child would make the same ids


def new_job_id() -> str:
    """Return a new UUIDv7 as text. Source: RFC 9562, section 5.7."""
    global _pool, _used  # noqa: PLW0603 - one call of the system for 400 ids
    start = _used
    chance = _pool[start : start + 10]
    if len(chance) < 10:
        _pool, start = os.urandom(_POOL_BYTES), 0
        chance = _pool[:10]
    _used = start + 10
    text = f"{time.time_ns() // 1_000_000:012x}{chance.hex()}"
    # version 7 and variant 10 in front of 12 and 62 bits of chance
    return f"{text[:8]}-{text[8:12]}-7{text[13:16]}-{_VARIANT[text[16]]}{text[17:20]}-{text[20:]}"


_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}
