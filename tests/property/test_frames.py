"""Frames that nobody vouches for: noise, and real ones with damages."""

from tests.property.fuzz import fuzz


def test_a_million_octets_hang_and_crash_nothing() -> None:
    """R34. A hang here is a worker that is stuck, and a stray error one that dies; `make fuzz` feeds ten million of another seed."""
    heard = fuzz(1_000_000, seed=34)
    assert heard["deliver"] > 50
    assert heard["refused 501"] > 50
    assert heard["refused 505"] > 50
