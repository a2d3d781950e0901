"""The schema in the database: numbered migrations, which `leveret migrate` applies, and the check of every program that uses them.

A migration is a file of `migrations/`, such as 0002_levels.sql. A file that was shipped never changes. Its first line says who may
still use the schema afterwards:

    -- lowest reader: 1

A program knows the migrations up to its own last one. It runs on a newer schema if its last one is at least the lowest reader.
`{schema}` in the text stands for the quoted name of the schema.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from leveret.errors import ConfigurationError

if TYPE_CHECKING:
    import asyncpg

    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

_FILE = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
_LOWEST_READER = re.compile(r"-- lowest reader: ([1-9]\d*)\n")
_CONCURRENT = re.compile(r"CREATE (?:UNIQUE )?INDEX CONCURRENTLY (?P<index>[a-z0-9_]+) ON [^;]+;")
_NAME = re.compile(r"(?!pg_)[A-Za-z_][A-Za-z0-9_-]{0,62}", re.ASCII)
_ASK_S: Final = 0.1
"""How long a migrator waits before it asks again for a lock. It holds no snapshot meanwhile, which an index would wait for."""
_LOCK_MS: Final = 300
"""How long a migration waits for the lock of a table. All who use the table wait behind it, so it then lets them pass."""
_PASS_S: Final = 1.0
"""How long it lets them pass before it tries again."""
_OTHER: Final = "another migrator is at work"
_WITHOUT_LIMITS: Final = "SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0"


class Migration(msgspec.Struct, frozen=True):
    """One step of the schema."""

    name: str
    """The name of the file, such as 0002_levels."""
    text: str
    lowest_reader: int
    """The lowest last migration of a program that may use the schema afterwards."""
    index: str | None = None
    """The index that the migration builds concurrently, outside a transaction; None for a migration in one transaction."""

    @property
    def number(self) -> int:
        """The place of the migration."""
        return int(self.name[:4])

    @property
    def checksum(self) -> str:
        """The checksum of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def statements(self, schema: str) -> str:
        """Return the statements for one schema."""
        return in_schema(schema, self.text)


class Applied(msgspec.Struct, frozen=True):
    """A migration as the database recorded it."""

    name: str
    checksum: str
    lowest_reader: int


@functools.cache
def shipped() -> tuple[Migration, ...]:
    """Return the migrations of this leveret, in order."""
    return read(files("leveret.brokers.postgresql").joinpath("migrations"))


def read(folder: Traversable) -> tuple[Migration, ...]:
    """Return the migrations of a folder, in order. ValueError for a file that can't be one."""
    found = sorted(
        (_migration(file.name, file.read_text("utf-8").replace("\r\n", "\n")) for file in folder.iterdir()),
        key=lambda migration: migration.number,
    )
    if [migration.number for migration in found] != list(range(1, len(found) + 1)):
        msg = f"the migrations must be numbered 1, 2, 3 …: {', '.join(migration.name for migration in found)}"
        raise ValueError(msg)
    return tuple(found)


def _migration(file: str, text: str) -> Migration:
    named, reader = _FILE.fullmatch(file), _LOWEST_READER.match(text)
    if named is None or reader is None or int(reader[1]) > int(named[1]):
        msg = f"{file}: expected a name such as 0002_levels.sql, and `-- lowest reader: N` in the first line, with N up to the file's number"
        raise ValueError(msg)
    statements = re.sub(r"--.*", "", text).strip()
    concurrent = _CONCURRENT.fullmatch(statements)
    if concurrent is None and "CONCURRENTLY" in statements:
        msg = f"{file}: a concurrent index needs a file for itself: CREATE INDEX CONCURRENTLY name ON {{schema}}.table (…);"
        raise ValueError(msg)
    return Migration(file.removesuffix(".sql"), text, int(reader[1]), concurrent and concurrent["index"])


def check_name(schema: str) -> None:
    """Raise ConfigurationError unless leveret takes this name of a schema."""
    if not _NAME.fullmatch(schema):
        msg = f"the schema {schema!r:.200}: its name needs 1 to 63 of A-Z a-z 0-9 _ -, with a letter or _ first, and not pg_"
        raise ConfigurationError(msg)


def in_schema(schema: str, sql: str) -> str:
    """Return `sql` with the quoted name of the schema for each `{schema}`."""
    return sql.replace("{schema}", f'"{schema}"')


async def check(connection: Connection, schema: str, known: Sequence[Migration] | None = None) -> None:
    """Return if a program that knows these migrations may use the schema.

    Raises:
        ConfigurationError: The schema isn't there, is older, is too new, or was made by other files. One line says what to do.
    """
    known = shipped() if known is None else known
    applied = await _read_applied(connection, schema)
    if missing := _missing(known, applied, schema):
        what = f"lacks {names(missing)}" if applied else "isn't there yet"
        msg = f"the schema {schema!r} of the database {what}; run `leveret migrate` with the app, such as shop:app, or with --url"
        raise ConfigurationError(msg)
    _refuse_newer(known, applied, schema)


async def pending(connection: Connection, schema: str, known: Sequence[Migration] | None = None) -> list[Migration]:
    """Return the migrations that the database lacks, in order; ConfigurationError if it was made by other files, or is too new."""
    known = shipped() if known is None else known
    applied = await _read_applied(connection, schema)
    _refuse_newer(known, applied, schema)
    return _missing(known, applied, schema)


async def migrate(
    connection: Connection,
    schema: str,
    known: Sequence[Migration] | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Apply the migrations that the database lacks. Several migrators at once take turns.

    A migration is whole or not there at all, wherever the migrator is killed. An index that was built halfway is built again.
    """
    said = ""
    while missing := await pending(connection, schema, known):
        migration = missing[0]
        apply = _apply if migration.index is None else _build
        try:
            if await apply(connection, schema, migration):
                say(f"applied {migration.name}")
        except _Busy as busy:
            if said != str(busy):
                said = str(busy)
                say(f"waiting: {said}")
            await asyncio.sleep(busy.pause_s)


def script(missing: Sequence[Migration], schema: str) -> str:
    """Return SQL that does what `migrate` would do. Run twice, it fails before it changes anything."""
    if not missing:
        return ""
    parts = [f'-- leveret\'s schema "{schema}". An index that is built CONCURRENTLY must not stand in a transaction.\n']
    for migration in missing:
        if migration.index is None:
            head = f"BEGIN;\nSELECT pg_advisory_xact_lock({_lock(schema)});\n{in_schema(schema, _TABLE)}{_record(migration, schema)}"
            parts.append(f"\n-- {migration.name}\n{head}{migration.statements(schema)}COMMIT;\n")
        else:
            parts.append(f"\n-- {migration.name}\n{migration.statements(schema)}{_record(migration, schema)}")
    return "".join(parts)


def names(migrations: Iterable[Migration]) -> str:
    """Return the names in one line."""
    return ", ".join(migration.name for migration in migrations)


class _Busy(Exception):
    """Others have what a migration needs; the message says what. Another try will do, after the pause."""

    def __init__(self, message: str, pause_s: float) -> None:
        super().__init__(message)
        self.pause_s = pause_s


async def _apply(connection: Connection, schema: str, migration: Migration) -> bool:
    """Apply a migration in one transaction; False if another migrator has done it meanwhile."""
    from asyncpg import LockNotAvailableError

    try:
        # whatever the role's default is: what is applied is read after the lock
        async with connection.transaction(isolation="read_committed"):
            if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", _lock(schema)):
                raise _Busy(_OTHER, _ASK_S)
            if migration.number in await _applied(connection, schema):
                return False
            await connection.execute(f"{_WITHOUT_LIMITS}; SET LOCAL lock_timeout = {_LOCK_MS}")
            await connection.execute(
                f"{in_schema(schema, _TABLE)}{_record(migration, schema)}{migration.statements(schema)}"
            )
    except LockNotAvailableError as error:
        msg = f"{migration.name} needs a table that a long transaction uses"
        raise _Busy(msg, _PASS_S) from error
    return True


async def _build(connection: Connection, schema: str, migration: Migration) -> bool:
    """Build an index outside a transaction; False if another migrator has done it meanwhile."""
    async with connection.transaction(readonly=True):
        direct = await connection.fetchval("SELECT pg_backend_pid()") == connection.get_server_pid()
    if not direct:
        msg = (
            f"{migration.name} builds an index, which takes a connection to the server itself: run `leveret migrate --url`"
            " with the server's address, not the pooler's"
        )
        raise ConfigurationError(msg)
    # the lock of the session: it also holds while the server goes on with the index after this process was killed
    if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", _lock(schema)):
        raise _Busy(_OTHER, _ASK_S)
    try:
        if migration.number in await _applied(connection, schema):
            return False
        await connection.execute("SET statement_timeout = 0; SET lock_timeout = 0")
        index = in_schema(schema, f"{{schema}}.{migration.index}")
        whole = await connection.fetchval("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass($1)", index)
        if whole is False:
            await connection.execute(f"DROP INDEX CONCURRENTLY {index}")
        if not whole:
            await connection.execute(migration.statements(schema))
        await connection.execute(_record(migration, schema))
    finally:
        if not connection.is_closed():
            await connection.execute("SELECT pg_advisory_unlock_all(); RESET statement_timeout; RESET lock_timeout")
    return True


async def _read_applied(connection: Connection, schema: str) -> dict[int, Applied]:
    # behind a pooler, only the statements of one transaction reach the same server. No block of asyncpg's: one that is cancelled waits
    # for its ROLLBACK, so a time-out would wait for a server that is gone
    await connection.execute("BEGIN READ ONLY")
    try:
        applied = await _applied(connection, schema)
    except ConfigurationError:
        await connection.execute("ROLLBACK")
        raise
    await connection.execute("COMMIT")
    return applied


async def _applied(connection: Connection, schema: str) -> dict[int, Applied]:
    """Return what the database has recorded, by number."""
    from asyncpg import UndefinedColumnError

    # a query, and not to_regclass: that one would still see what the session knew before it got the lock
    there = "SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = 'migrations'"
    if not await connection.fetch(there, schema):
        return {}
    recorded = in_schema(schema, "SELECT number, name, checksum, lowest_reader FROM {schema}.migrations")
    try:
        rows = await connection.fetch(recorded)
    except UndefinedColumnError as error:
        msg = f"the schema {schema!r} of the database has another program's table migrations; give leveret a schema for itself: ?schema=leveret"
        raise ConfigurationError(msg) from error
    return {number: Applied(name, checksum, lowest_reader) for number, name, checksum, lowest_reader in rows}


def _missing(known: Iterable[Migration], applied: dict[int, Applied], schema: str) -> list[Migration]:
    missing: list[Migration] = []
    for migration in known:
        there = applied.get(migration.number)
        if there is None:
            missing.append(migration)
        elif there.checksum != migration.checksum:
            msg = (
                f"the schema {schema!r} of the database was made by another text of {migration.name} ({there.name}, checksum"
                f" {there.checksum[:12]} instead of {migration.checksum[:12]}); use the leveret that made it, or another schema"
            )
            raise ConfigurationError(msg)
    return missing


def _refuse_newer(known: Sequence[Migration], applied: dict[int, Applied], schema: str) -> None:
    lowest_reader = max((one.lowest_reader for one in applied.values()), default=0)
    if lowest_reader > len(known):
        msg = (
            f"the schema {schema!r} of the database is too new: {applied[max(applied)].name} needs a leveret with migration"
            f" {lowest_reader:04}, and this one knows {len(known)}; upgrade leveret"
        )
        raise ConfigurationError(msg)


def _lock(schema: str) -> int:
    """Return the number of the advisory lock of all who migrate the schema."""
    return int.from_bytes(hashlib.sha256(f"leveret migrations {schema}".encode()).digest()[:8], signed=True)


_TABLE = """\
DO $$ BEGIN IF to_regnamespace('{schema}') IS NULL THEN CREATE SCHEMA {schema}; END IF; END $$;
CREATE TABLE IF NOT EXISTS {schema}.migrations (
    number int PRIMARY KEY,
    name text NOT NULL,
    checksum text NOT NULL,
    lowest_reader int NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);
-- every role that may use the schema looks here first
GRANT SELECT ON {schema}.migrations TO PUBLIC;
"""


def _record(migration: Migration, schema: str) -> str:
    values = f"{migration.number}, '{migration.name}', '{migration.checksum}', {migration.lowest_reader}"
    insert = "INSERT INTO {schema}.migrations (number, name, checksum, lowest_reader) VALUES"
    return f"{in_schema(schema, insert)} ({values});\n"
