"""The waits between attempts, as pure functions."""

from __future__ import annotations

import random


def ceiling_s(attempt: int, *, base_s: float, cap_s: float) -> float:
    """Return the longest wait after attempt number `attempt`, in seconds: base_s × 2^(attempt − 1), at most cap_s."""
    if attempt < 1 or not 0 < base_s <= cap_s:
        msg = f"back-off needs attempt >= 1 and 0 < base_s <= cap_s, not {attempt}, {base_s}, {cap_s}"
        raise ValueError(msg)
    # 2.0 ** 1024 overflows; a cap is reached long before
    return min(cap_s, base_s * 2.0 ** min(attempt - 1, 1000)) if base_s < cap_s else cap_s


def full_jitter(attempt: int, *, base_s: float, cap_s: float, rng: random.Random) -> float:
    """Return a random wait after attempt number `attempt`, in seconds.

    The wait is uniform in [0, min(cap_s, base_s × 2^(attempt − 1))], so jobs that failed together don't return together.

    Args:
        attempt: The attempt that just failed; 1 is the first.
        base_s: Ceiling of the first wait, seconds, > 0.
        cap_s: Ceiling of every wait, seconds, >= base_s.
        rng: Source of randomness; a seeded source makes the waits repeatable.

    Raises:
        ValueError: `attempt` < 1, or not 0 < base_s <= cap_s.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015: "full jitter".
    """
    return rng.uniform(0.0, ceiling_s(attempt, base_s=base_s, cap_s=cap_s))
