"""Each role of docs/operations.md, a real user with no other rights: it can do its work, and nothing of the others'."""

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
import pytest_asyncio

from leveret import App, Attempt, Bury, Job, Queue
from leveret.admin import Admin
from leveret.brokers.postgresql import open_store
from leveret.errors import ConfigurationError, LeveretError
from leveret.runtime import Runtime
from leveret.schemes import broker_module, open_migrator
from leveret.store import Change
from tests.postgres.node import Postgres

_DOCS = Path(__file__).parents[2] / "docs/operations.md"
_ROLES = ("shop_publisher", "shop_web", "shop_worker", "shop_monitor")
_PATIENCE_S = 30.0

plain = Queue("plain")


class Note(Job, name="note", queue=plain):
    """A job."""

    text: str = ""


def granted(role: str) -> str:
    """Return the statements that the documentation has for this role."""
    section = _DOCS.read_text().partition("### Roles\n")[2].partition("\n## ")[0]
    blocks: list[str] = re.findall(r"```sql\n(.*?)```", section, re.DOTALL)
    [statements] = [block for block in blocks if role in block]
    return statements


class Database:
    """A database whose schema a role owns that may do nothing else, and the URL of each role."""

    def __init__(self, server: Postgres, urls: dict[str, str]) -> None:
        self.urls = urls
        self._server = server

    async def query(self, role: str, sql: str) -> list[asyncpg.Record]:
        """Run a statement as this role."""
        return await self._server.query(sql, url=self.urls[role])

    async def publish(self, role: str, **options: Any) -> None:
        """Publish a note as this role."""
        async with App("shop", broker=self.urls[role]).publisher() as publisher:
            await publisher.publish(Note(), timeout_s=_PATIENCE_S, **options)

    async def admin(self, role: str, use: Callable[[Admin], Awaitable[Any]]) -> Any:
        """Return what `use` returns of an admin with this role's login."""
        url = self.urls[role]
        admin = broker_module(url).open_admin(url, Runtime(app="shop"))
        try:
            return await use(admin)
        finally:
            await admin.close()

    async def migrate(self, role: str) -> list[str]:
        """Migrate as this role, and return what was said."""
        said: list[str] = []
        migrator = open_migrator(self.urls[role], Runtime(app="shop"))
        assert migrator is not None
        await migrator.migrate(said.append)
        return said


@pytest_asyncio.fixture
async def database(postgres: Postgres) -> AsyncGenerator[Database]:
    """A database as the documentation sets it up."""
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(postgres.database())
        roles = ("owner", *_ROLES, "stranger")
        made = Database(postgres, {name: await stack.enter_async_context(postgres.role(url)) for name in roles})
        name_of = {role: str(urlsplit(url).username) for role, url in made.urls.items()}
        await postgres.query(f"CREATE SCHEMA leveret AUTHORIZATION {name_of['owner']}", url=url)
        await made.migrate("owner")
        connection = await asyncpg.connect(made.urls["owner"])
        for role in _ROLES:
            await connection.execute(granted(role).replace(role, name_of[role]))
        await connection.close()
        yield made


async def dead(admin: Admin) -> list[str]:
    """Return the ids of the dead letters."""
    async with admin.dead(plain) as letters:
        return [letter.job_id async for letter in letters]


async def counts(admin: Admin) -> tuple[int, int]:
    """Return how many jobs are ready, and how many are dead."""
    [depth] = await admin.depths([plain])
    assert depth.ready is not None
    assert depth.dead is not None
    return depth.ready, depth.dead


async def purge(admin: Admin) -> int:
    """Delete the waiting jobs, and return how many there were."""
    return await admin.purge(plain)


async def test_a_publisher_may_call_publish_and_nothing_else(database: Database) -> None:
    """A web server that was broken into must not read what others publish, nor delete it."""
    publish = (
        """SELECT leveret.publish('plain', 'note', '{"text": "a"}'), leveret.publish('plain', 'note', '{}'::bytea)"""
    )
    assert len(await database.query("shop_publisher", publish)) == 1

    for refused in (
        "SELECT FROM leveret.jobs",
        "DELETE FROM leveret.jobs",
        "SELECT leveret.move_due(1)",
        "SELECT leveret.release(1, true)",
        "UPDATE leveret.migrations SET checksum = ''",
        "CREATE TABLE leveret.own ()",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await database.query("shop_publisher", refused)
    assert await database.admin("shop_monitor", counts) == (2, 0)


async def test_a_program_that_publishes_by_leveret_may_not_read(database: Database) -> None:
    """The same, for the publisher of this package."""
    await database.publish("shop_web")
    await database.publish("shop_web", delay_s=3600)

    for use in (counts, dead, purge):
        with pytest.raises(ConfigurationError, match="the role lacks a right: permission denied for"):
            await database.admin("shop_web", use)
    for table in ("jobs", "delayed", "claims", "dead", "workers", "queues", "records"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await database.query("shop_web", f"SELECT FROM leveret.{table}")


async def test_a_program_that_publishes_sees_the_jobs_whose_ids_it_knows(database: Database) -> None:
    """A web server that was broken into must not read everybody's results, nor delete them."""
    url = database.urls["shop_web"]
    store = open_store(url, Runtime(app="shop"))
    store.watch(lambda _: None)
    change = Change(
        job_id="one", publish=1, queue="plain", job="note", state="queued", passes=0, attempt=1, keep_s=60, at_ms=1
    )
    try:
        await store.write([change])
        assert await store.newest(["one"]) == [change.key]
        assert list(await store.ended([change.key])) == []
        assert await store.abort(change.key) == "aborted"
        assert [record and record.state for record in await store.read([change.key])] == ["aborted"]
        assert await store.trim(10) == 0
        for refused in (store.list(limit=10), store.find("one"), store.drop([change.key])):
            with pytest.raises(ConfigurationError, match="permission denied for"):
                await refused
    finally:
        await store.close()


async def test_a_worker_works_and_changes_no_tables(database: Database) -> None:
    """A handler is a user's code: with the owner's rights it could drop what all apps share."""
    app, ran = App("shop", broker=database.urls["shop_worker"]), asyncio.Queue[str]()

    @app.handler
    async def note(job: Note, attempt: Attempt) -> Bury | None:
        ran.put_nowait(attempt.envelope.job_id)
        return Bury("asked for") if attempt.envelope.job_id == "bad" else None

    for job_id in ("good", "bad"):
        await database.publish("shop_web", job_id=job_id)
    await database.publish("shop_web", job_id="later", delay_s=0.1)
    async with app.worker():
        assert {await asyncio.wait_for(ran.get(), _PATIENCE_S) for _ in range(3)} == {"good", "bad", "later"}

    assert await database.admin("shop_worker", dead) == ["bad"]
    assert await database.admin("shop_worker", counts) == (0, 1)
    assert await database.migrate("shop_worker") == []
    for refused in (
        "DROP TABLE leveret.jobs",
        "ALTER TABLE leveret.jobs ADD x int",
        "CREATE TABLE leveret.own ()",
        "DELETE FROM leveret.migrations",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await database.query("shop_worker", refused)


async def test_an_administrator_lists_replays_drops_and_purges(database: Database) -> None:
    """Whoever is called at night has this role, and not the owner's."""
    letter = "INSERT INTO leveret.dead (queue, job_id, job, body) VALUES ('plain', '{}', 'note', '{{}}')"
    for name in ("one", "two"):
        await database.query("owner", letter.format(name))

    async def replay_and_drop(admin: Admin) -> None:
        async with admin.dead(plain) as letters:
            async for letter in letters:
                if letter.job_id == "one":
                    await letters.replay(letter, letter.envelope)
                else:
                    await letters.drop(letter)

    assert await database.admin("shop_worker", dead) == ["one", "two"]
    await database.admin("shop_worker", replay_and_drop)
    assert await database.admin("shop_worker", counts) == (1, 0)
    assert await database.admin("shop_worker", purge) == 1
    assert await database.admin("shop_worker", counts) == (0, 0)


async def test_a_monitor_counts_and_takes_nothing(database: Database) -> None:
    """A monitor runs everywhere, and its login with it."""
    await database.publish("shop_web")

    assert await database.admin("shop_monitor", counts) == (1, 0)
    for use in (dead, purge):
        with pytest.raises(ConfigurationError, match="the role lacks a right: permission denied for"):
            await database.admin("shop_monitor", use)


async def test_what_an_upgrade_adds_is_the_workers_too(database: Database) -> None:
    """The first job after an upgrade would fail on every worker."""
    worker = urlsplit(database.urls["shop_worker"]).username
    connection = await asyncpg.connect(database.urls["owner"])
    await connection.execute(
        "CREATE TABLE leveret.more (); CREATE FUNCTION leveret.more_of() RETURNS int LANGUAGE sql AS 'SELECT 1';"
        " REVOKE ALL ON FUNCTION leveret.more_of FROM PUBLIC"
    )
    may = "SELECT has_table_privilege($1, 'leveret.more', 'INSERT') AND has_function_privilege($1, 'leveret.more_of()', 'EXECUTE')"
    assert await connection.fetchval(may, worker)
    await connection.close()


async def test_a_role_without_rights_hears_it_at_once_wherever_it_comes(database: Database) -> None:
    """A worker that tried for ever would tell nobody whom to ask."""

    async def work(_: Admin) -> None:
        app = App("shop", broker=database.urls["stranger"])
        app.handler(_note)
        async with app.worker():
            await asyncio.sleep(_PATIENCE_S)

    async def publish(_: Admin) -> None:
        await database.publish("stranger")

    async def migrate(_: Admin) -> None:
        await database.migrate("stranger")

    for use in (work, publish, migrate, counts, dead, purge):
        async with asyncio.timeout(_PATIENCE_S):
            with pytest.raises(LeveretError, match="permission denied for schema leveret"):
                await database.admin("stranger", use)


async def _note(job: Note) -> None: ...
