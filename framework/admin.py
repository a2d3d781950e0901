"""The contract of a broker's admin, with which the command line inspects and repairs queues."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from .envelope import Envelope
from .job import Queue


class Depth(msgspec.Struct, frozen=True, kw_only=True):
    """How many jobs a queue holds; None where the broker can't count them."""

    queue: str
    ready: int
    """Jobs that wait for a worker, on all levels."""
    levels: dict[str, int]
    """The same count by level; a single entry "all" if the broker keeps all levels in one queue."""
    unsettled: int | None
    """Jobs that workers hold."""
    delayed: int | None
    """Jobs that wait for their time."""
    dead: int
    consumers: int | None
    exists: bool


class DeadLetter(Protocol):
    """One buried job: `envelope.queue` is its original queue, `envelope.priority` its level there."""

    @property
    def job_id(self) -> str:
        """The job's id, without decoding the rest where the broker can: a command finds one letter among many by it."""
        ...

    @property
    def envelope(self) -> Envelope:
        """The job as it was buried: attempts, errors, body."""
        ...


class DeadLetters(Protocol):
    """The dead letters of one queue, oldest first. Letters that are neither replayed nor dropped go back unchanged, in their order.

    The reader keeps no letter that it has yielded, and a bounded number of bytes that it hasn't yielded yet.
    """

    def __aiter__(self) -> AsyncIterator[DeadLetter]: ...

    async def replay(self, letter: DeadLetter, envelope: Envelope) -> None:
        """Publish `envelope` to its original queue at its level; once confirmed, ack the letter. Many replays may run at once."""
        ...

    async def drop(self, letter: DeadLetter) -> None:
        """Delete the letter for good."""
        ...


class Admin(Protocol):
    """Inspects and repairs queues for the command line, apart from the pipeline."""

    async def depths(self, queues: Sequence[Queue]) -> list[Depth]:
        """Return one row per queue, in the order given; a missing queue has `exists` False."""
        ...

    async def delayed(self) -> int | None:
        """Count the delayed jobs of all queues together; None if `depths` counts them per queue."""
        ...

    async def notes(self) -> list[str]:
        """Return what an operator should know of the broker besides its queues, one line each: what slows it down, and since when."""
        ...

    async def purge(self, queue: Queue) -> int:
        """Delete the waiting jobs of `queue`, on all levels, and return how many. Delayed, unsettled and dead jobs stay."""
        ...

    def dead(self, queue: Queue) -> AbstractAsyncContextManager[DeadLetters]:
        """Open the dead letters of `queue`; until closed, the letters read so far are hidden from everyone else.

        RabbitMQ hides some more: the reader takes letters ahead.
        """
        ...

    async def close(self) -> None:
        """Close the admin's connection."""
        ...


class OutboxDepth(msgspec.Struct, frozen=True, kw_only=True):
    """What an outbox holds for one queue."""

    queue: str
    waiting: int
    """Committed jobs that no relay has published yet."""
    oldest_s: float | None
    """For how long the oldest of them has waited since its publish; None without any."""
    dead: int
    """Jobs that the broker will never take."""


class OutboxAdmin(Protocol):
    """Inspects and repairs an outbox for the command line."""

    async def depths(self) -> list[OutboxDepth]:
        """Return a row for each queue that has jobs or dead letters in the outbox, by name."""
        ...

    def dead(self, queue: Queue) -> AbstractAsyncContextManager[DeadLetters]:
        """Open the outbox's dead letters of `queue`. A replay puts a letter back into the outbox. They aren't hidden from anybody."""
        ...

    async def close(self) -> None:
        """Close the admin's connection."""
        ...
