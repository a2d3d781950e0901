"""`leveret migrate` on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

import asyncpg

from leveret.errors import BrokerUnavailable, ConfigurationError, LeveretError
from leveret.runtime import Runtime

from . import schema
from .address import Address, connect
from .link import reported

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

WATCH_S = 5.0
"""How often a migrator asks whether its server is still there, seconds."""


class PostgresMigrator:
    """The migrations of one schema."""

    def __init__(self, address: Address, runtime: Runtime) -> None:
        self._address = address
        self._runtime = runtime

    @property
    def what(self) -> str:
        """The database and the schema in it, without the password."""
        return f"{self._address} (schema {self._address.schema})"

    async def pending(self) -> Sequence[str]:
        """Return the names of the migrations that the database lacks, in order."""
        async with self._connected() as connection, asyncio.timeout(self._runtime.settings.connect_timeout_s):
            return [migration.name for migration in await schema.pending(connection, self._address.schema)]

    async def migrate(self, say: Callable[[str], None]) -> None:
        """Apply what is pending. A migration may take hours, but a server that is gone is left within 30 s."""
        async with self._connected() as connection:
            applying = asyncio.ensure_future(schema.migrate(connection, self._address.schema, say=say))
            try:
                await self._watch(connection, applying)
                await applying
            finally:
                connection.terminate()  # first: a transaction's block waits for its ROLLBACK, which nobody may answer
                applying.cancel()
                await asyncio.gather(applying, return_exceptions=True)

    def sql(self, names: Sequence[str] | None) -> str:
        """Return the SQL of these pending migrations, or of all with None, without connecting."""
        wanted = [migration for migration in schema.shipped() if names is None or migration.name in names]
        return schema.script(wanted, self._address.schema)

    async def _watch(self, connection: Connection, applying: asyncio.Future[None]) -> None:
        """Return when the migrations have ended; BrokerUnavailable if twice in a row another connection can't find the server at them."""
        missed, pid = 0, connection.get_server_pid()
        while not (await asyncio.wait({applying}, timeout=WATCH_S))[0]:
            missed = 0 if await self._is_at_work(pid) else missed + 1
            if missed == 2:
                msg = f"{self.what}: the server is gone, or gives no answer; what was applied stays, so run it again"
                raise BrokerUnavailable(msg)

    async def _is_at_work(self, pid: int) -> bool:
        """Whether the server answers, and has this backend. A pooler has its own numbers, and ends connections to a server that is gone."""
        limit_s = self._runtime.settings.connect_timeout_s
        try:
            other = await connect(self._address, limit_s, prepared=False, name="leveret migrate")
        except LeveretError as error:
            return isinstance(error.__cause__, Exception) and reported(error.__cause__)  # such as: too many connections
        try:
            direct = f"pg_backend_pid() = {other.get_server_pid()}"
            asked = f"SELECT WHERE NOT {direct} OR EXISTS (SELECT FROM pg_stat_activity WHERE pid = {pid})"  # noqa: S608 - numbers
            return await other.execute(asked, timeout=limit_s) == "SELECT 1"
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            return False
        finally:
            other.terminate()

    @asynccontextmanager
    async def _connected(self) -> AsyncGenerator[Connection, None]:
        # no prepared statements: the command works behind any pooler
        settings = self._runtime.settings
        connection = await connect(self._address, settings.connect_timeout_s, prepared=False, name="leveret migrate")
        try:
            yield connection
        except asyncpg.InsufficientPrivilegeError as error:
            msg = f"{self.what}: the role lacks a right: {error}; migrate as the owner of the schema (with --url)"
            raise ConfigurationError(msg) from error
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            said = " ".join(str(error).split()) or "no answer in time"
            msg = f"{self.what}: {said}; what was applied stays, so run it again"
            raise BrokerUnavailable(msg) from error
        finally:
            connection.terminate()
