"""The connections of asyncpg."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from .connection import CLOSED, OUTSIDE, AsyncConnection, has
from .script import Write, run_async

_NEVER_S: Final = 3600.0


class Asyncpg(AsyncConnection):
    """asyncpg's connection, and what its pool lends."""

    library = "asyncpg"
    name = "asyncpg's connection"

    @classmethod
    def fits(cls, one: Any) -> bool:
        """As `Connection.fits`."""
        return has(one, "is_in_transaction")

    def problem(self) -> str | None:
        """As `Connection.problem`."""
        if self._connection.is_closed():
            return CLOSED
        return (
            None if self._connection.is_in_transaction() else OUTSIDE.format("`async with connection.transaction():`")
        )

    async def run(self, write: Write, deadline: float) -> Any:
        """As `AsyncConnection.run`."""

        async def execute(sql: str, arguments: Sequence[Any]) -> object:
            run = self._connection.fetchval if arguments else self._connection.execute
            return await run(sql, *arguments, timeout=_NEVER_S)  # instead of its command_timeout

        return await run_async(write(numbered=True, joined=True), execute, deadline)
