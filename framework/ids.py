"""Job ids: UUIDv7, so that they sort by the millisecond in which they were made."""

from __future__ import annotations

import os
import time


def new_job_id() -> str:
    """Return a new UUIDv7 as text. Source: RFC 9562, section 5.7."""
    raw = bytearray((time.time_ns() // 1_000_000).to_bytes(6, "big") + os.urandom(10))
    raw[6] = 0x70 | raw[6] & 0x0F
    raw[8] = 0x80 | raw[8] & 0x3F
    text = raw.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
