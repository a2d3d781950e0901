"""The connections of SQLAlchemy."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Any

from .connection import CLOSED, FAILED, OUTSIDE, AsyncConnection, BlockingConnection, awaits, check, has
from .script import ANSWER_S, Write, run


class Sqlalchemy(BlockingConnection):
    """SQLAlchemy's `Connection` and `Session`."""

    library = "sqlalchemy"
    name = "SQLAlchemy's Connection or Session"

    @classmethod
    def fits(cls, one: Any) -> bool:
        """As `Connection.fits`."""
        return has(one, "in_transaction") and has(one, "commit") and not awaits(one, "commit")

    def problem(self) -> str | None:
        """As `Connection.problem`."""
        return _problem(self._connection)

    def run(self, write: Write) -> Any:
        """As `BlockingConnection.run`."""
        return _run(self._connection, write)


class SqlalchemyAsync(AsyncConnection):
    """SQLAlchemy's `AsyncConnection` and `AsyncSession`."""

    library = "sqlalchemy"
    name = "SQLAlchemy's AsyncConnection or AsyncSession"

    @classmethod
    def fits(cls, one: Any) -> bool:
        """As `Connection.fits`."""
        return has(one, "in_transaction") and awaits(one, "commit")

    def problem(self) -> str | None:
        """As `Connection.problem`."""
        one = self._connection
        return _problem(one.sync_session if hasattr(one, "sync_session") else one.sync_connection)

    async def run(self, write: Write, deadline: float) -> Any:
        """As `AsyncConnection.run`."""
        # its own time-out ends the connection, so it comes only where the server gives no answer
        limit_s = None if deadline == math.inf else max(0.0, deadline - time.monotonic()) + 2 * ANSWER_S
        async with asyncio.timeout(limit_s):
            return await self._connection.run_sync(_run, write)


def _problem(one: Any) -> str | None:
    """Return what is wrong with a Connection or a Session."""
    if one is None or getattr(one, "closed", False):
        return CLOSED
    if getattr(one, "invalidated", False) or not getattr(one, "is_active", True):
        return FAILED
    bind = one if hasattr(one, "exec_driver_sql") else one.get_bind()
    if bind.dialect.name != "postgresql":
        return f"is of {bind.dialect.name}: the jobs are in PostgreSQL"
    if bind is one and one.connection.dbapi_connection.autocommit:
        return OUTSIDE.format("`begin()` on a connection that isn't in AUTOCOMMIT")
    return None


def _run(one: Any, write: Write) -> Any:
    """Execute the statements on a Connection, or on that of a Session."""
    connection = one
    if not hasattr(one, "exec_driver_sql"):
        connection = one.connection()
        check(_problem(connection))

    def execute(sql: str, arguments: Sequence[Any]) -> object:
        result = connection.exec_driver_sql(sql, tuple(arguments))
        value = result.scalar() if arguments else None
        result.close()
        return value

    return run(write(numbered=connection.dialect.paramstyle == "numeric_dollar", joined=False), execute)
