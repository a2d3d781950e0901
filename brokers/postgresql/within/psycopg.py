"""The connections of psycopg."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .connection import BUSY, CLOSED, FAILED, OUTSIDE, AsyncConnection, BlockingConnection, awaits, has
from .script import Write, run, run_async


class Psycopg(BlockingConnection):
    """psycopg's `Connection`."""

    library = "psycopg"
    name = "psycopg's Connection"

    @classmethod
    def fits(cls, one: Any) -> bool:
        """As `Connection.fits`."""
        return has(one, "set_autocommit") and not awaits(one, "set_autocommit")

    def problem(self) -> str | None:
        """As `Connection.problem`."""
        return _problem(self._connection, "`with connection.transaction():`")

    def run(self, write: Write) -> Any:
        """As `BlockingConnection.run`."""

        def execute(sql: str, arguments: Sequence[Any]) -> object:
            cursor = self._connection.cursor(row_factory=_rows)
            cursor.execute(sql, arguments or None)
            return cursor.fetchone()[0] if arguments else None

        return run(write(numbered=False, joined=True), execute)


class PsycopgAsync(AsyncConnection):
    """psycopg's `AsyncConnection`."""

    library = "psycopg"
    name = "psycopg's AsyncConnection"

    @classmethod
    def fits(cls, one: Any) -> bool:
        """As `Connection.fits`."""
        return awaits(one, "set_autocommit")

    def problem(self) -> str | None:
        """As `Connection.problem`."""
        return _problem(self._connection, "`async with connection.transaction():`")

    async def run(self, write: Write, deadline: float) -> Any:
        """As `AsyncConnection.run`."""

        async def execute(sql: str, arguments: Sequence[Any]) -> object:
            cursor = self._connection.cursor(row_factory=_rows)
            await cursor.execute(sql, arguments or None)
            return (await cursor.fetchone())[0] if arguments else None

        return await run_async(write(numbered=False, joined=True), execute, deadline)


def _rows(_: object) -> type[tuple[Any, ...]]:
    """Return how psycopg makes rows, instead of the connection's own way."""
    return tuple


def _problem(connection: Any, open_one: str) -> str | None:
    if connection.closed:
        return CLOSED
    if connection.pgconn.pipeline_status:
        return "is in pipeline mode, where the result of a statement isn't known: leave it first"
    status = connection.info.transaction_status.name
    if status == "INERROR":
        return FAILED
    if status == "ACTIVE":
        return BUSY
    return OUTSIDE.format(open_one) if status == "IDLE" and connection.autocommit else None
