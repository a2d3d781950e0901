"""What a process hands to its brokers and layers: its settings, and time and chance."""

from __future__ import annotations

import random

import msgspec

from .clock import Clock, SystemClock
from .settings import Settings


class Runtime(msgspec.Struct, frozen=True, kw_only=True):
    """What a process hands to its brokers and layers: its settings, and time and chance."""

    app: str
    """The app's name; AMQP's `app_id`, and part of connection names."""
    settings: Settings = Settings()
    clock: Clock = msgspec.field(default_factory=SystemClock)
    rng: random.Random = msgspec.field(default_factory=random.Random)
    processes: int = 1
    """Worker processes of this `leveret work`, which share out a rate limit."""
