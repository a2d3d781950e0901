"""`leveret migrate` on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

import asyncpg

from leveret.errors import BrokerUnavailable, ConfigurationError
from leveret.runtime import Runtime

from . import schema
from .address import Address, connect

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]


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
        """Apply what is pending."""
        async with self._connected() as connection:
            await schema.migrate(connection, self._address.schema, say=say)

    def sql(self, names: Sequence[str] | None) -> str:
        """Return the SQL of these pending migrations, or of all with None, without connecting."""
        wanted = [migration for migration in schema.shipped() if names is None or migration.name in names]
        return schema.script(wanted, self._address.schema)

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
