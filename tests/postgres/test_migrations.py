"""The schema of a real database: made once, whole or not at all, whoever else is at work."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import asyncpg
import pytest
import pytest_asyncio

from leveret.brokers.postgresql.schema import Migration, check, migrate, pending, script
from leveret.errors import ConfigurationError
from tests.postgres.node import Postgres

_JOBS = Migration("0001_jobs", "-- lowest reader: 1\nCREATE TABLE {schema}.jobs (seq int, queue text);\n", 1)
_HINT = Migration("0002_hint", "-- lowest reader: 1\nALTER TABLE {schema}.jobs ADD hint text;\n", 1)
_INDEX = Migration(
    "0003_seq",
    "-- lowest reader: 2\nCREATE UNIQUE INDEX CONCURRENTLY jobs_seq ON {schema}.jobs (seq);\n",
    2,
    "jobs_seq",
)
_ALL = (_JOBS, _HINT, _INDEX)


@asynccontextmanager
async def connected(url: str) -> AsyncGenerator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(url, timeout=30)
    try:
        yield connection
    finally:
        connection.terminate()


@pytest_asyncio.fixture
async def url(postgres: Postgres) -> AsyncGenerator[str]:
    """An empty database."""
    async with postgres.database() as made:
        yield made


async def test_the_first_run_makes_all_and_the_second_changes_nothing(url: str) -> None:
    """A deploy runs it each time."""
    said: list[str] = []
    async with connected(url) as connection:
        assert await pending(connection, "shop", _ALL) == list(_ALL)
        await migrate(connection, "shop", _ALL, say=said.append)
        assert await pending(connection, "shop", _ALL) == []
        before = await connection.fetch('SELECT * FROM "shop".migrations ORDER BY number')

        await migrate(connection, "shop", _ALL, say=said.append)

        assert await connection.fetch('SELECT * FROM "shop".migrations ORDER BY number') == before
        assert [(row["number"], row["name"], row["lowest_reader"]) for row in before] == [
            (1, "0001_jobs", 1),
            (2, "0002_hint", 1),
            (3, "0003_seq", 2),
        ]
        assert said == ["applied 0001_jobs", "applied 0002_hint", "applied 0003_seq"]
        assert await connection.fetchval("SELECT indisvalid FROM pg_index WHERE indexrelid = 'shop.jobs_seq'::regclass")
        held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        assert await connection.fetchval(held) == 0


async def test_migrators_at_once_apply_each_migration_once(url: str) -> None:
    """Each pod of a deployment may run it before it starts."""
    said: list[str] = []

    async def one() -> None:
        async with connected(url) as connection:
            await migrate(connection, "shop", _ALL, say=said.append)

    await asyncio.gather(*(one() for _ in range(5)))

    assert sorted(line for line in said if line.startswith("applied")) == [
        "applied 0001_jobs",
        "applied 0002_hint",
        "applied 0003_seq",
    ]


async def test_two_schemas_of_one_database_know_nothing_of_each_other(url: str) -> None:
    """Staging and production, or two services, may share a database."""
    async with connected(url) as connection:
        await migrate(connection, "one", [_JOBS])

        assert await pending(connection, "other", [_JOBS]) == [_JOBS]
        await migrate(connection, "other", _ALL)

        assert await pending(connection, "one", _ALL) == [_HINT, _INDEX]


async def test_only_the_rights_on_functions_of_ours_are_taken_from_others(url: str) -> None:
    """In a schema with other programs' functions, such as `public`, those programs would stand still after a `migrate`."""
    async with connected(url) as connection:
        await connection.execute("CREATE FUNCTION public.theirs() RETURNS int LANGUAGE sql AS 'SELECT 1'")

        await migrate(connection, "public")

        allowed = await connection.fetch(
            "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND has_function_privilege('public', oid, 'EXECUTE')"
        )
        assert [row["proname"] for row in allowed] == ["theirs"]


async def test_an_older_schema_is_one_line_with_the_command(url: str) -> None:
    """A program that went on would fail at a statement, in the middle of a job."""
    async with connected(url) as connection:
        with pytest.raises(ConfigurationError) as absent:
            await check(connection, "shop", _ALL)
        await migrate(connection, "shop", [_JOBS])

        with pytest.raises(ConfigurationError) as older:
            await check(connection, "shop", _ALL)

    command = "run `leveret migrate` with the app, such as shop:app, or with --url"
    assert str(absent.value) == f"the schema 'shop' of the database isn't there yet; {command}"
    assert str(older.value) == f"the schema 'shop' of the database lacks 0002_hint, 0003_seq; {command}"


async def test_a_newer_schema_is_used_by_those_whom_it_allows(url: str) -> None:
    """In a rolling deploy both versions run; who can't read the new schema must not try, and a deploy stops at `migrate --check`."""
    async with connected(url) as connection:
        await migrate(connection, "shop", _ALL)

        await check(connection, "shop", [_JOBS, _HINT])
        assert await pending(connection, "shop", [_JOBS, _HINT]) == []
        said: list[str] = []
        for use in (check, pending, migrate):
            with pytest.raises(ConfigurationError) as refused:
                await use(connection, "shop", [_JOBS])
            said.append(str(refused.value))

    assert said == 3 * [
        "the schema 'shop' of the database is too new: 0003_seq needs a leveret with migration 0002, and this one knows 1; upgrade leveret"
    ]


async def test_another_text_under_the_same_number_is_refused(url: str) -> None:
    """Two developers' branches would each take the other's tables for their own."""
    other = Migration("0001_jobs", _JOBS.text + "-- more\n", 1)
    async with connected(url) as connection:
        await migrate(connection, "shop", [_JOBS])
        for use in (check, pending, migrate):
            with pytest.raises(ConfigurationError, match="made by another text of 0001_jobs"):
                await use(connection, "shop", [other])


async def test_another_programs_table_of_migrations_is_not_taken_for_ours(url: str) -> None:
    """Many a framework has one in the schema public."""
    async with connected(url) as connection:
        await connection.execute("CREATE TABLE public.migrations (id int, name text)")
        for use in (check, pending, migrate):
            with pytest.raises(ConfigurationError, match="another program's table migrations"):
                await use(connection, "public", [_JOBS])


async def test_a_stricter_default_of_the_role_changes_nothing(url: str) -> None:
    """With a snapshot of before the lock, a migrator would not see what the one before it did."""
    async with connected(url) as first, connected(url) as second:
        for connection in (first, second):
            await connection.execute(
                "SET default_transaction_isolation = 'serializable'; SET statement_timeout = '10s'"
            )

        await asyncio.gather(*(migrate(connection, "shop", _ALL) for connection in (first, second)))

        await check(first, "shop", _ALL)


async def test_a_migration_that_fails_leaves_nothing(url: str) -> None:
    """Half of it would make the next try fail at what is there already."""
    wrong = Migration("0002_hint", "-- lowest reader: 1\nCREATE TABLE {schema}.more ();\nSELECT 1/0;\n", 1)
    async with connected(url) as connection:
        await migrate(connection, "shop", [_JOBS])
        with pytest.raises(asyncpg.DivisionByZeroError):
            await migrate(connection, "shop", [_JOBS, wrong])

        assert await connection.fetchval("SELECT to_regclass('shop.more')") is None
        await migrate(connection, "shop", _ALL)


async def test_an_index_that_was_built_halfway_is_built_again(url: str) -> None:
    """An invalid index costs each write and serves no read."""
    async with connected(url) as connection:
        await migrate(connection, "shop", [_JOBS, _HINT])
        await connection.execute("INSERT INTO shop.jobs VALUES (1), (1)")
        with pytest.raises(asyncpg.UniqueViolationError):
            await migrate(connection, "shop", _ALL)
        assert not await connection.fetchval(
            "SELECT indisvalid FROM pg_index WHERE indexrelid = 'shop.jobs_seq'::regclass"
        )
        await connection.execute("TRUNCATE shop.jobs")

        await migrate(connection, "shop", _ALL)

        assert await connection.fetchval("SELECT indisvalid FROM pg_index WHERE indexrelid = 'shop.jobs_seq'::regclass")
        assert await pending(connection, "shop", _ALL) == []


async def test_an_index_that_was_built_but_not_recorded_is_kept(url: str) -> None:
    """On a large table it took hours."""
    async with connected(url) as connection:
        await migrate(connection, "shop", [_JOBS, _HINT])
        await connection.execute(_INDEX.statements("shop"))
        built = await connection.fetchval("SELECT 'shop.jobs_seq'::regclass::oid")

        await migrate(connection, "shop", _ALL)

        assert await connection.fetchval("SELECT 'shop.jobs_seq'::regclass::oid") == built


async def test_a_migration_lets_others_pass_while_it_waits_for_a_table(url: str) -> None:
    """All who use the table queue behind a lock that is waited for: one long report would stop every publish."""
    said: asyncio.Queue[str] = asyncio.Queue()
    async with connected(url) as connection, connected(url) as report, connected(url) as publisher:
        await migrate(connection, "shop", [_JOBS])
        async with report.transaction():
            await report.fetch("SELECT FROM shop.jobs")
            migrating = asyncio.ensure_future(migrate(connection, "shop", [_JOBS, _HINT], say=said.put_nowait))
            assert await asyncio.wait_for(said.get(), 30) == (
                "waiting: 0002_hint needs a table that a long transaction uses"
            )
            await asyncio.wait_for(publisher.execute("INSERT INTO shop.jobs VALUES (1)"), 30)
        await asyncio.wait_for(migrating, 30)

        assert await pending(connection, "shop", [_JOBS, _HINT]) == []


async def test_the_sql_for_others_does_the_same(url: str) -> None:
    """Who must not run leveret's command on production runs this."""
    async with connected(url) as connection:
        for part in script(_ALL, "shop").split("\n-- 000")[1:]:
            statements = part.partition("\n")[2]
            if "CONCURRENTLY" in statements:
                for statement in filter(str.strip, statements.split(";\n")):
                    await connection.execute(statement)
            else:
                await connection.execute(statements)

        await check(connection, "shop", _ALL)
        with pytest.raises(asyncpg.UniqueViolationError):
            await connection.execute(script([_JOBS], "shop"))
