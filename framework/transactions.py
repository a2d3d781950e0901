"""Publishing inside a user's own transaction: what `connection=` takes, and what a broker or an outbox offers for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeAlias, TypeGuard

from .envelope import Envelope
from .job import Queue


class _Asyncpg(Protocol):
    """asyncpg's connection, and what its pool lends."""

    def is_in_transaction(self) -> bool: ...
    async def execute(self, query: str, /) -> str: ...


class _PsycopgAsync(Protocol):
    """psycopg's `AsyncConnection`."""

    def cancel(self) -> None: ...
    async def set_autocommit(self, value: bool, /) -> None: ...


class _SqlalchemyAsync(Protocol):
    """SQLAlchemy's `AsyncConnection` and `AsyncSession`."""

    def in_transaction(self) -> bool: ...
    async def commit(self) -> None: ...


class _Psycopg(Protocol):
    """psycopg's `Connection`."""

    def cancel(self) -> None: ...
    def set_autocommit(self, value: bool, /) -> None: ...


class _Sqlalchemy(Protocol):
    """SQLAlchemy's `Connection` and `Session`."""

    def in_transaction(self) -> bool: ...
    def commit(self) -> None: ...


class _Django(Protocol):
    """Django's `connection`, and an entry of its `connections`."""

    def savepoint(self) -> str | None: ...
    def savepoint_rollback(self, sid: str, /) -> None: ...


AsyncTransaction: TypeAlias = _Asyncpg | _PsycopgAsync | _SqlalchemyAsync
"""A connection with an open transaction, for `connection=` in an event loop: asyncpg's, psycopg's `AsyncConnection`, SQLAlchemy's
`AsyncConnection` or `AsyncSession`. An engine, a pool or a cursor isn't one."""
Transaction: TypeAlias = _Psycopg | _Sqlalchemy | _Django | str
"""A connection with an open transaction, for `connection=` in blocking code: psycopg's `Connection`, SQLAlchemy's `Connection` or
`Session`, Django's `connection` or the alias of one. An engine, a pool or a cursor isn't one."""

Add: TypeAlias = Callable[[Sequence[tuple[Queue, Envelope]], float], Awaitable[None]]
"""Adds jobs to a transaction, all or none, by a deadline in `time.monotonic()` seconds."""
AddBlocking: TypeAlias = Callable[[Sequence[tuple[Queue, Envelope]], float], None]
"""As `Add`, for the thread that has the transaction."""


class Transactional(Protocol):
    """What a broker or an outbox also has if it can publish inside a user's transaction. Optional for a broker.

    Both methods send nothing. They raise `InvalidJob`, with what to do, for an object that isn't such a connection, or that has no
    open transaction. The function that they return adds jobs inside a savepoint. If it raises, none of the jobs is in the transaction,
    and the transaction is as usable as before. Its errors are those of `Broker.publish`. Only an error that makes the user repeat the
    whole transaction, such as a deadlock, is the library's own. A due time counts from the call.
    """

    def within(self, connection: AsyncTransaction, /) -> Add:
        """Return the function that adds jobs to the transaction of `connection`."""
        ...

    def within_blocking(self, connection: Transaction, /) -> AddBlocking:
        """Return the function that adds jobs to the transaction of `connection`; both are called in the thread of the transaction."""
        ...


def is_transactional(broker: object) -> TypeGuard[Transactional]:
    """Return whether `broker` can publish inside a user's transaction."""
    return getattr(broker, "within", None) is not None
