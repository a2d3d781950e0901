"""The runtime: settings, clock and randomness that a process hands to its brokers and middleware."""

from __future__ import annotations

import random

import msgspec

from .clock import Clock, SystemClock
from .settings import Settings


class Runtime(msgspec.Struct, frozen=True, kw_only=True):
    """What a process hands to its brokers and middleware: settings, clock and randomness."""

    app: str
    """The app's name; AMQP's `app_id`, and part of connection names."""
    settings: Settings = Settings()
    clock: Clock = msgspec.field(default_factory=SystemClock)
    rng: random.Random = msgspec.field(default_factory=random.Random)
    processes: int = 1
    """Worker processes of this `leveret work`, among which a rate limit is divided."""
