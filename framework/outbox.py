"""The contract of an outbox: jobs wait in the user's database until a relay has published them. An inbox is beside it."""

from __future__ import annotations

from collections.abc import Awaitable, Collection, Sequence
from typing import Protocol, TypeGuard

import msgspec

from .envelope import Envelope
from .job import Queue
from .transactions import AsyncTransaction, Transaction, Transactional


class Waiting(msgspec.Struct, frozen=True, gc=False):
    """A job that waits in an outbox."""

    seq: int
    """Its number. A relay publishes in the order of the numbers."""
    queue: Queue | None
    """The queue to publish to; None if its definition can't be read."""
    envelope: Envelope
    """The job. A delay that is left is in its `due_ms`, by the relay's clock."""
    problem: str | None
    """Why the job can never be published, if that is known; otherwise None."""


class Line(Protocol):
    """A relay's connection to an outbox. It has one transaction at a time, from a `take` that returns jobs to `settle` or `leave`.

    Each method raises ConfigurationError if waiting won't help, and BrokerUnavailable if another try will do. The transaction is then
    rolled back.
    """

    async def take(
        self, at_most: int, *, only: str | None, without: Collection[str], deadline: float
    ) -> Sequence[Waiting]:
        """Lock jobs that no other relay has locked, oldest first, and return them, to be published by `deadline`.

        With `only`, jobs of that queue; otherwise of all queues that aren't in `without`.
        """
        ...

    async def settle(self, published: Sequence[int], dead: Sequence[tuple[int, Envelope]]) -> None:
        """Delete the published jobs, move `dead` to the outbox's dead letters with these envelopes, and commit. The other jobs stay."""
        ...

    async def leave(self) -> None:
        """Roll the transaction back: all jobs stay."""
        ...

    async def wait(self) -> None:
        """Return when there may be a job to take."""
        ...

    async def forget(self) -> None:
        """Delete the oldest entries of the inbox, in small transactions."""
        ...

    async def close(self) -> None:
        """Close the connection. Idempotent."""
        ...


class Inbox(Protocol):
    """Which jobs' effects are committed. Both methods raise as `Transactional` and its functions do."""

    def once(self, connection: AsyncTransaction, queue: str, job_id: str, /) -> Awaitable[bool]:
        """Note in the transaction that it has the effect of the job; False if a committed transaction has it."""
        ...

    def once_blocking(self, connection: Transaction, queue: str, job_id: str, /) -> bool:
        """As `once`, in the thread of the transaction."""
        ...


class Outbox(Transactional, Inbox, Protocol):
    """An outbox and the inbox beside it. It connects to nothing; a line does."""

    def line(self) -> Line:
        """Return a line, without connecting."""
        ...


def has_inbox(one: object) -> TypeGuard[Inbox]:
    """Return whether a broker or an outbox has an inbox beside its jobs."""
    return getattr(one, "once", None) is not None
