"""Looking into queues and repairing them: the contract of a broker's second face, for the command line."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from .envelope import Envelope
from .job import Queue


class Depth(msgspec.Struct, frozen=True, kw_only=True):
    """How many jobs a queue holds; None where the broker can't tell."""

    queue: str
    ready: int
    """Waiting to be delivered, all levels."""
    levels: dict[str, int]
    """The same by level; one entry "all" where the broker keeps them in one."""
    unsettled: int | None
    """Held by workers."""
    delayed: int | None
    """Waiting for their time."""
    dead: int
    consumers: int | None
    exists: bool


class DeadLetter(Protocol):
    """One buried job. `envelope.queue` is its origin, `envelope.priority` its level there."""

    @property
    def envelope(self) -> Envelope:
        """As it was buried: attempts, errors, body."""
        ...


class DeadLetters(Protocol):
    """The dead letters of one queue, oldest first. What is neither replayed nor dropped goes back as it was."""

    def __aiter__(self) -> AsyncIterator[DeadLetter]: ...

    async def replay(self, letter: DeadLetter, envelope: Envelope) -> None:
        """Publish `envelope` to its origin at its own level, confirmed; then ack the letter."""
        ...

    async def drop(self, letter: DeadLetter) -> None:
        """Forget it for good."""
        ...


class Admin(Protocol):
    """Looking into queues and repairing; for the command line, apart from the pipeline."""

    async def depths(self, queues: Sequence[Queue]) -> list[Depth]:
        """One row a queue, in order; a queue that isn't there says so."""
        ...

    async def delayed(self) -> int | None:
        """Count what waits for its time, of all queues together; None where `depths` tells it by queue."""
        ...

    async def purge(self, queue: Queue) -> int:
        """Delete what waits in `queue`, all levels; return how many. Delayed, unsettled and dead jobs stay."""
        ...

    def dead(self, queue: Queue) -> AbstractAsyncContextManager[DeadLetters, None]:
        """Open the dead letters of `queue`; while open, nobody else sees those already read."""
        ...

    async def close(self) -> None:
        """End its connection."""
        ...
