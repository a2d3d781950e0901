"""The runtime: settings, clock and randomness that a process hands to its brokers and middleware."""

from __future__ import annotations

import random
from typing import Protocol

import msgspec

from .clock import Clock, SystemClock
from .settings import Settings


class Region(Protocol):
    """A piece of the memory that all processes of one `leveret work` share."""

    @property
    def numbers(self) -> memoryview[float]:
        """Eight floats, all 0 when `leveret work` starts. Reading or writing one float is atomic."""
        ...

    def lock(self) -> bool:
        """Take the region's lock; False if another process has it. The kernel frees the lock when its holder dies."""
        ...

    def unlock(self) -> None:
        """Free the lock. Lock and unlock without an await between: the lock doesn't exclude others in the same process."""
        ...


class Shared(Protocol):
    """The memory that all processes of one `leveret work` share."""

    def region(self) -> Region | None:
        """Return the next region; None if all are taken.

        Every process binds its middleware in the same order, so the n-th call returns the same region in every process.
        Processes whose code differs may disagree: keep a check in the region.
        """
        ...


class Runtime(msgspec.Struct, frozen=True, kw_only=True):
    """What a process hands to its brokers and middleware: settings, clock and randomness."""

    app: str
    """The app's name; AMQP's `app_id`, and part of connection names."""
    settings: Settings = Settings()
    clock: Clock = msgspec.field(default_factory=SystemClock)
    rng: random.Random = msgspec.field(default_factory=random.Random)
    processes: int = 1
    """Worker processes of this `leveret work`."""
    shared: Shared | None = None
    """The memory that these processes share; None in a single process."""
