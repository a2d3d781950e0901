"""What the conformance suite needs of a broker beyond the contract; one file per broker.

A lever causes a real fault, not a mocked one: the memory broker's own switch, another connection's exclusive lock on the SQLite
file, a link to RabbitMQ on which nothing moves any more.
"""

from tests.contract.harness.base import (
    PATIENCE_S,
    Harness,
    Recorder,
    consume,
    depth,
    make_envelope,
    ready,
    received,
    soon,
    soonest_s,
    timed,
)

__all__ = [
    "PATIENCE_S",
    "Harness",
    "Recorder",
    "consume",
    "depth",
    "make_envelope",
    "ready",
    "received",
    "soon",
    "soonest_s",
    "timed",
]
