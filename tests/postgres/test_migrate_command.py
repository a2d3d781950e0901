"""`leveret migrate` against a real server: in this process, and in another where it is killed."""

import asyncio
import random
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
import pytest_asyncio
from click.testing import CliRunner

from leveret.brokers.postgresql import schema
from leveret.cli.migrate import migrate
from leveret.errors import ConfigurationError, LeveretError
from tests.cli.command import PATIENCE_S, Project
from tests.conftest import StartPostgres
from tests.nodes import free_ports, url_at
from tests.postgres.node import Postgres

_APP = """
from pathlib import Path
from leveret import App
from leveret.brokers.postgresql import schema

schema.shipped = lambda: schema.read(Path("migrations"))
app = App("shop")
"""
_FIRST = "-- lowest reader: 1\nCREATE TABLE {schema}.jobs (seq int);\n"
_SECOND = "-- lowest reader: 1\nALTER TABLE {schema}.jobs ADD hint text;\n"
_INDEX = "-- lowest reader: 1\nCREATE INDEX CONCURRENTLY jobs_seq ON {schema}.jobs (seq);\n"
_VALID = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'leveret.jobs_seq'::regclass"


@dataclass(frozen=True)
class Said:
    """What the command did: its exit code, its output, and what it said on standard error, its error unredacted."""

    code: int
    out: str
    err: str


class Shop(Project):
    """A folder with an app whose migrations are files of the test's."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.write("shop.py", _APP)
        (folder / "migrations").mkdir()
        self.ship("0001_jobs", _FIRST)

    def ship(self, name: str, text: str) -> None:
        self.write(f"migrations/{name}.sql", text)

    async def migrate(self, url: str, *options: str) -> Said:
        """Run the command in this process."""
        result = await asyncio.to_thread(CliRunner().invoke, migrate, ["--url", url, *options])
        error = result.exception
        if not isinstance(error, LeveretError):
            return Said(result.exit_code, result.stdout, result.stderr)
        return Said(2 if isinstance(error, ConfigurationError) else 1, result.stdout, f"{result.stderr}{error}")


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    made = Shop(tmp_path)
    monkeypatch.setattr(schema, "shipped", lambda: schema.read(tmp_path / "migrations"))
    return made


@pytest_asyncio.fixture
async def url(postgres: Postgres) -> AsyncGenerator[str]:
    """An empty database."""
    async with postgres.database() as made:
        yield made


@asynccontextmanager
async def connected(url: str) -> AsyncGenerator["asyncpg.Connection[asyncpg.Record]"]:
    """Connect, and hang up in the end without a word to a server that may be away."""
    connection = await asyncpg.connect(url, timeout=PATIENCE_S)
    try:
        yield connection
    finally:
        connection.terminate()


async def soon(connection: "asyncpg.Connection[asyncpg.Record]", query: str) -> list[asyncpg.Record]:
    """Wait until the query finds rows, and return them."""
    async with asyncio.timeout(PATIENCE_S):
        while not (found := await connection.fetch(query)):
            await asyncio.sleep(0.02)
    return found


def _shown(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{parts.username}:***@{parts.hostname}:{parts.port}").geturl()


async def test_it_applies_what_is_pending_and_says_it(shop: Shop, url: str) -> None:
    """An operator must see what was done to a database."""
    first = await shop.migrate(url)
    shop.ship("0002_hint", _SECOND)
    second = await shop.migrate(url)
    third = await shop.migrate(url)

    assert (first.code, first.out) == (0, "applied 0001_jobs\n"), first
    assert (second.code, second.out) == (0, "applied 0002_hint\n"), second
    assert (third.code, third.out) == (0, f"the broker {_shown(url)} (schema leveret) is up to date\n"), third
    assert first.err == second.err == third.err == ""


async def test_check_exits_with_2_and_changes_nothing(shop: Shop, url: str, postgres: Postgres) -> None:
    """A deployment stops at it; if it changed anything, it would have deployed."""
    behind = await shop.migrate(url, "--check")
    schemas = await postgres.query("SELECT FROM pg_namespace WHERE nspname = 'leveret'", url=url)
    await shop.migrate(url)
    fine = await shop.migrate(url, "--check")

    assert (behind.code, behind.out) == (2, "")
    assert behind.err == f"the broker {_shown(url)} (schema leveret) lacks 0001_jobs"
    assert schemas == []
    assert (fine.code, fine.err) == (0, "")


async def test_sql_is_what_is_pending_and_does_what_the_command_does(shop: Shop, url: str) -> None:
    """Where leveret may not touch production, a database's administrator runs this."""
    url = f"{url}?schema=shop-2"
    await shop.migrate(url)
    shop.ship("0002_hint", _SECOND)

    printed = await shop.migrate(url, "--sql")

    assert (printed.code, printed.err) == (0, ""), printed
    assert "0001_jobs" not in printed.out
    assert "0002_hint" in (await shop.migrate(url, "--check")).err
    async with connected(url.partition("?")[0]) as connection:
        await connection.execute(printed.out)
    done, nothing = await shop.migrate(url, "--check"), await shop.migrate(url, "--sql")
    assert done.code == 0, done
    assert (nothing.code, nothing.out, nothing.err) == (0, "", ""), nothing


async def test_sql_without_an_answer_is_all_of_it(shop: Shop) -> None:
    """Where the file is made, as in CI, there may be no way to the database."""
    [port] = free_ports(1)
    shop.ship("0002_hint", _SECOND)

    printed = await shop.migrate(f"postgresql://shop:hunter2@127.0.0.1:{port}/shop", "--sql")

    assert printed.code == 0
    assert printed.out.index("-- 0001_jobs") < printed.out.index("-- 0002_hint")
    assert printed.err.strip().startswith(f"postgresql://shop:***@127.0.0.1:{port}/shop: ")
    assert printed.err.strip().endswith("; these are all migrations")


async def test_what_stands_in_the_way_is_one_line_without_the_password(
    shop: Shop, url: str, postgres: Postgres
) -> None:
    """The log of a deployment is read by many, and a traceback by none."""
    [port] = free_ports(1)
    async with postgres.role(url) as role:
        name, password = urlsplit(role).username, urlsplit(role).password
        assert name is not None
        assert password is not None
        wrong = password[::-1]
        cases = [
            (role.replace(password, wrong), 2, f'password authentication failed for user "{name}"'),
            (urlsplit(role)._replace(path="/nothing").geturl(), 2, 'database "nothing" does not exist'),
            (url_at(role, port), 1, "Connect call failed"),
            (f"{role}?sslmode=require", 2, "rejected SSL upgrade"),
            (f"{role}?sslmode=verify-full&sslrootcert=/nowhere.crt", 2, "no such file: sslrootcert=/nowhere.crt"),
            (f"{role}?sslmode=maybe", 2, "sslmode"),
            (f"{role}?schema=a.b", 2, "the schema 'a.b': its name needs"),
            (f"{role}?schema=new", 2, "(schema new): the role lacks a right: permission denied for database"),
        ]
        for case, code, why in cases:
            ran = await shop.migrate(case)
            assert (ran.code, ran.out) == (code, ""), ran
            assert why in ran.err
            assert password not in ran.err
            assert wrong not in ran.err


async def test_a_role_that_owns_the_schema_needs_no_right_on_the_database(
    shop: Shop, url: str, postgres: Postgres
) -> None:
    """Administrators make a schema for a team, and give away no more."""
    async with postgres.role(url) as role:
        await postgres.query(f"CREATE SCHEMA leveret AUTHORIZATION {urlsplit(role).username}", url=url)

        ran = await shop.migrate(role)

        assert (ran.code, ran.out) == (0, "applied 0001_jobs\n"), ran


async def test_it_works_behind_a_pooler_that_keeps_no_session(shop: Shop, url: str, postgres: Postgres) -> None:
    """Many a database is reached by no other way; an index takes a session, and says so."""
    pooler = await postgres.pooler()
    url = pooler.url_of(url)
    shop.ship("0002_hint", _SECOND)

    ran = await shop.migrate(url)
    shop.ship("0003_seq", _INDEX)
    refused = await shop.migrate(url)

    assert (ran.code, ran.out) == (0, "applied 0001_jobs\napplied 0002_hint\n"), ran
    assert refused.code == 2, refused
    assert "0003_seq builds an index, which takes a connection to the server itself" in refused.err


@pytest.mark.fault
async def test_a_migration_whose_migrator_is_killed_is_not_there(shop: Shop, url: str) -> None:
    """A container that is killed during a deploy must not leave half a table."""
    shop.ship("0002_hint", f"{_SECOND}SELECT pg_sleep(1);\n")
    async with connected(url) as connection:
        with shop.start("migrate", LEVERET_BROKER=url) as migrating:
            await soon(connection, "SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
            migrating.process.kill()
            migrating.end()

        ran = await shop.migrate(url)

        assert ran.code == 0, ran
        assert ran.out.endswith("applied 0002_hint\n")  # after a wait, if the server hasn't noticed yet
        assert await connection.fetchval("SELECT count(*) FROM leveret.migrations") == 2


@pytest.mark.fault
async def test_ctrl_c_ends_a_migration_that_waits(shop: Shop, url: str) -> None:
    """An operator who sees that it waits for a report stops it, and finds everything as it was."""
    await shop.migrate(url)
    shop.ship("0002_hint", _SECOND)
    async with connected(url) as report:
        async with report.transaction():
            await report.fetch("SELECT FROM leveret.jobs")
            with shop.start("migrate", LEVERET_BROKER=url) as migrating:
                await asyncio.to_thread(migrating.wait_for, "waiting: 0002_hint needs a table")
                migrating.send(signal.SIGINT)
                assert await asyncio.to_thread(migrating.end) == 130, migrating.log

        assert migrating.log.split("\n", 1)[1].strip() == "leveret: interrupted"
        assert await report.fetchval("SELECT count(*) FROM leveret.migrations") == 1


@pytest.mark.fault
async def test_kills_at_any_moment_leave_whole_migrations(shop: Shop, url: str) -> None:
    """A moment that no test thought of would leave a table that no migration knows of."""
    for number in range(2, 31):
        table = f"CREATE TABLE {{schema}}.t{number} ();"
        shop.ship(f"{number:04}_t", f"-- lowest reader: 1\n{table}\nSELECT pg_sleep(0.02);\n")
    chance = random.Random(21)
    tables = "SELECT substr(relname, 2)::int FROM pg_class WHERE relnamespace = 'leveret'::regnamespace AND relname ~ '^t[0-9]+$'"
    gone = "SELECT WHERE NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'leveret migrate')"
    async with connected(url) as connection:
        there = set[int]()
        while len(there) < 20:  # after five to ten kills
            with shop.start("migrate", LEVERET_BROKER=url) as migrating:
                await asyncio.to_thread(migrating.wait_for, "applied", chance.randrange(1, 4))
                await asyncio.sleep(chance.uniform(0, 0.05))  # that is the moment
                migrating.process.kill()
                migrating.end()
            await soon(connection, gone)
            there = {row[0] for row in await connection.fetch(tables)}
            recorded = await connection.fetch("SELECT number FROM leveret.migrations WHERE number > 1")
            assert there == {row[0] for row in recorded}

        last = await shop.migrate(url)

        assert last.code == 0, last
        assert last.out.count("applied") == 29 - len(there)


@pytest.mark.fault
async def test_an_index_whose_migrator_is_killed_is_finished_by_the_server_and_kept(shop: Shop, url: str) -> None:
    """A second build beside the first would end in a deadlock."""
    await shop.migrate(url)
    shop.ship("0002_seq", _INDEX)
    async with connected(url) as old, connected(url) as connection:
        snapshot = old.transaction(isolation="repeatable_read")
        await snapshot.start()
        await old.fetch("SELECT FROM pg_class")
        with shop.start("migrate", LEVERET_BROKER=url) as migrating:
            await soon(connection, "SELECT FROM pg_stat_activity WHERE wait_event = 'virtualxid'")
            migrating.process.kill()
            migrating.end()
        with shop.start("migrate", LEVERET_BROKER=url) as next_one:
            await asyncio.to_thread(next_one.wait_for, "waiting: another migrator is at work")
            built = await connection.fetchval("SELECT 'leveret.jobs_seq'::regclass::oid")
            await snapshot.rollback()
            assert await asyncio.to_thread(next_one.end) == 0, next_one.log

        assert await connection.fetchval("SELECT 'leveret.jobs_seq'::regclass::oid") == built
        assert await connection.fetchval(_VALID)


@pytest.mark.fault
async def test_an_index_whose_connection_ends_is_built_again(shop: Shop, url: str, postgres: Postgres) -> None:
    """What is left of the first build costs each write, and no query may use it."""
    await shop.migrate(url)
    shop.ship("0002_seq", _INDEX)
    async with connected(url) as old, connected(url) as connection:
        snapshot = old.transaction(isolation="repeatable_read")
        await snapshot.start()
        await old.fetch("SELECT FROM pg_class")
        with shop.start("migrate", LEVERET_BROKER=url) as migrating:
            [row] = await soon(connection, "SELECT pid FROM pg_stat_activity WHERE wait_event = 'virtualxid'")
            await postgres.terminate(row["pid"])
            assert await asyncio.to_thread(migrating.end) == 1, migrating.log
        await snapshot.rollback()
        assert await connection.fetchval(_VALID) is False

        ran = await shop.migrate(url)

        assert (ran.code, ran.out) == (0, "applied 0002_seq\n"), ran
        assert await connection.fetchval(_VALID)
    assert len(migrating.log.splitlines()) == 1


@pytest.mark.fault
async def test_a_server_that_is_killed_leaves_whole_migrations(shop: Shop, postgres_node: StartPostgres) -> None:
    """A power cut during an upgrade must be mended by running it again."""
    node = await postgres_node()
    shop.ship("0002_hint", f"{_SECOND}SELECT pg_sleep(60);\n")
    with shop.start("migrate", LEVERET_BROKER=node.url) as migrating:
        async with connected(node.url) as connection:
            await soon(connection, "SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
        await node.kill9()
        assert await asyncio.to_thread(migrating.end) == 1, migrating.log
    await node.start()
    shop.ship("0002_hint", _SECOND)

    ran = await shop.migrate(node.url)

    assert (ran.code, ran.out) == (0, "applied 0002_hint\n"), ran
    assert migrating.log.splitlines()[0] == "applied 0001_jobs"
    assert len(migrating.log.splitlines()) == 2
