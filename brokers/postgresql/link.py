"""The connection of a store: opening it, hearing notices on it, and what its errors mean."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, final

import asyncpg
import msgspec

from leveret.errors import ConfigurationError, LeveretError
from leveret.runtime import Runtime

from . import schema
from .address import Address, connect
from .statements import SET, begin

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

log = logging.getLogger("leveret.postgresql")

_UNSENT = "another operation (2) is in progress"
"""What asyncpg says of a statement after it has read an error that belongs to none."""
LEASE_LOST = "LV001"
"""The SQLSTATE of the schema's functions if a worker's entry is gone."""
_ECHO = "echo "
"""How the notice begins that each connection sends itself."""
_ECHO_S = 1.0
"""How long it waits for that notice."""
_CLOSE_S = 1.0

Meaning: TypeAlias = Literal["lost", "busy", "lease", "full", "refused", "wrong"]
"""What an error says of the connection and the transaction:

- lost: the connection can't be used any more; another one may be better.
- busy: the transaction was rolled back, and another try will do.
- lease: a worker's entry is gone.
- full: the server can't write.
- refused: a value can't be stored.
- wrong: waiting won't help.
"""

_LOST = (
    OSError,  # TimeoutError too
    EOFError,
    LeveretError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.TooManyConnectionsError,
    asyncpg.ReadOnlySQLTransactionError,  # this server is no longer the primary
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.ProtocolViolationError,
    asyncpg.InvalidSQLStatementNameError,
    asyncpg.InFailedSQLTransactionError,
    asyncpg.DuplicatePreparedStatementError,
)
_BUSY = (asyncpg.LockNotAvailableError, asyncpg.QueryCanceledError, asyncpg.TransactionRollbackError)
_REFUSED = (
    asyncpg.exceptions.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
    ValueError,
    OverflowError,
)
_WRONG = (
    asyncpg.InsufficientPrivilegeError,
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedFunctionError,
    asyncpg.UndefinedColumnError,
    asyncpg.InvalidSchemaNameError,
    ConfigurationError,
)


def meaning_of(error: Exception) -> Meaning | None:
    """Return what an error of a connection says; None if it isn't one."""
    if isinstance(error, asyncpg.PostgresError) and error.sqlstate == LEASE_LOST:
        return "lease"
    if isinstance(error, _WRONG):
        return "wrong"
    if isinstance(error, _BUSY):
        return "busy"
    if isinstance(error, _REFUSED):
        return "refused"
    if isinstance(error, _LOST):
        return "lost"
    return "full" if isinstance(error, asyncpg.PostgresError) else None


def reported(error: Exception) -> bool:
    """Whether the server reported the error: then a statement that was its own transaction was not committed.

    A server that ends a connection reports why. asyncpg's error of the loss has that as its cause if a statement was under way;
    otherwise asyncpg refuses the next statement, and sends nothing.
    """
    if isinstance(error, asyncpg.InternalClientError):
        return _UNSENT in str(error)
    said = error.__cause__ if isinstance(error, asyncpg.ConnectionDoesNotExistError) else error
    return isinstance(said, asyncpg.PostgresError) and not isinstance(said, asyncpg.PostgresConnectionError)


@final
class Link:
    """A connection to the database at `address`, opened at first use and anew after a loss. `notice` is called with each notice."""

    def __init__(
        self, address: Address, runtime: Runtime, channel: str, notice: Callable[[str], None], *, name: str
    ) -> None:
        self.address = address
        self.fresh = False
        """Whether the connection is new, until its user sets it to False."""
        self.direct = False
        """Whether the connection is to the server itself: its backend is the same for the whole connection."""
        self.begin = begin(direct=False)
        """What begins a transaction on the connection."""
        self.listens = False
        """Whether notices arrive. If they don't, polling finds what is new."""
        self._runtime = runtime
        self._channel = channel
        self._notice = notice
        self._name = name
        self._connection: Connection | None = None
        self._echo: tuple[str, asyncio.Event] | None = None
        self._tried = False
        self._said = False

    async def connection(self, *, listen: bool) -> Connection:
        """Return the connection; `listen` lets it hear notices. Raises ConfigurationError if waiting won't help."""
        if (opened := self.opened) is None:
            self.abandon()
            limit_s = self._runtime.settings.connect_timeout_s
            opened = await connect(self.address, limit_s, prepared=self.address.prepared, name=self._name)
            try:
                await self._examine(opened)
            except BaseException:
                opened.terminate()
                raise
            self._connection = opened
            self.fresh, self.listens, self._tried = True, False, False
            opened.add_termination_listener(lambda _: self._notice("lost"))
        if listen and not self._tried:
            self._tried = True
            await self._listen(opened)
        return opened

    async def _examine(self, connection: Connection) -> None:
        """Find out whether the connection can be used, and whether it is to the server itself."""
        await schema.check(connection, self.address.schema)
        await connection.execute("BEGIN READ ONLY")
        self.direct = await connection.fetchval("SELECT pg_backend_pid()") == connection.get_server_pid()
        encoding = await connection.fetchval("SELECT current_setting('server_encoding')")
        await connection.execute("COMMIT")
        self.begin = begin(direct=self.direct)
        if self.direct:
            await connection.execute(SET)
        if encoding != "UTF8":
            msg = f"the database of {self.address} has the encoding {encoding}; leveret needs a database with UTF8"
            raise ConfigurationError(msg)

    @property
    def opened(self) -> Connection | None:
        """The connection, if it is open."""
        return None if self._connection is None or self._connection.is_closed() else self._connection

    def abandon(self) -> None:
        """Drop the connection without a word to the server, which rolls back an open transaction."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    def lost(self, error: Exception) -> None:
        """Drop the connection that this error ended. If a pooler forgot a prepared statement, the next one prepares none."""
        forgotten = isinstance(error, (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError))
        if forgotten and self.address.prepared:
            self.address = msgspec.structs.replace(self.address, prepared=False)
            log.warning("the pooler at %s keeps no prepared statements: write ?prepared=off into the URL", self.address)
        self.abandon()

    async def rollback(self) -> None:
        """End a transaction that failed, with the marks that it may have set; drop the connection if that fails."""
        if self._connection is not None:
            try:
                async with asyncio.timeout(_CLOSE_S):
                    await self._connection.execute("ROLLBACK")
                    if self.direct:
                        await self._connection.execute("SELECT pg_advisory_unlock_all()")
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                self.abandon()

    async def close(self) -> None:
        """Say goodbye, and drop the connection."""
        if self._connection is not None:
            with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await self._connection.close(timeout=_CLOSE_S)
            self.abandon()

    async def _listen(self, connection: Connection) -> None:
        """Listen, and try whether a notice comes back. Behind a pooler LISTEN would reach whoever has the server's connection next."""
        if self.direct:
            token, came = f"{_ECHO}{secrets.token_hex(8)}", asyncio.Event()
            self._echo = token, came
            await connection.add_listener(self._channel, self._on_notice)
            await connection.execute(f"SELECT pg_notify('{self._channel}', '{token}')")
            with suppress(TimeoutError):
                async with asyncio.timeout(_ECHO_S):
                    await came.wait()
            self._echo = None
            self.listens = came.is_set()
        if not (self.listens or self._said):
            self._said = True
            log.info(
                "%s passes no notices on, as behind a pooler: what is new is looked for every 100 ms", self.address
            )

    def _on_notice(self, _connection: Any, _pid: int, _channel: str, payload: object) -> None:
        said = str(payload)
        if self._echo is not None and said == self._echo[0]:
            self._echo[1].set()
        elif not said.startswith(_ECHO):
            self._notice(said)
