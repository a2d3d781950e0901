"""Each role of docs/operations.md, a real user with no other rights: it can do its work, and nothing of the others'."""

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
import pytest_asyncio

from tests.cli.command import Project, Ran
from tests.postgres.node import Postgres

_DOCS = Path(__file__).parents[2] / "docs/operations.md"
_ROLES = ("shop_publisher", "shop_web", "shop_worker", "shop_monitor")


def granted(role: str) -> str:
    """Return the statements that the documentation has for this role."""
    section = _DOCS.read_text().partition("### Roles\n")[2].partition("\n## ")[0]
    blocks: list[str] = re.findall(r"```sql\n(.*?)```", section, re.DOTALL)
    [statements] = [block for block in blocks if role in block]
    return statements


class Database:
    """A database whose schema a role owns that may do nothing else, and the URL of each other role."""

    def __init__(self, server: Postgres, project: Project, owner: str, roles: dict[str, str]) -> None:
        self.owner = owner
        self.roles = roles
        self._server = server
        self._project = project

    async def run(self, role: str, *arguments: str) -> Ran:
        """Run the command with this role's login."""
        url = self.roles.get(role, self.owner)
        return await asyncio.to_thread(self._project.run, *arguments, LEVERET_BROKER=url)

    async def query(self, role: str, sql: str) -> list[asyncpg.Record]:
        """Run a statement as this role."""
        return await self._server.query(sql, url=self.roles.get(role, self.owner))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A folder with an app."""
    return Project(tmp_path)


@pytest_asyncio.fixture
async def database(postgres: Postgres, project: Project) -> AsyncGenerator[Database]:
    """A database as the documentation sets it up."""
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(postgres.database())
        owner = await stack.enter_async_context(postgres.role(url))
        roles = {name: await stack.enter_async_context(postgres.role(url)) for name in (*_ROLES, "stranger")}
        await postgres.query(f"CREATE SCHEMA leveret AUTHORIZATION {urlsplit(owner).username}", url=url)
        made = Database(postgres, project, owner, roles)
        migrated = await made.run("owner", "migrate")
        assert migrated.code == 0, migrated
        connection = await asyncpg.connect(owner)
        for name in _ROLES:
            await connection.execute(granted(name).replace(name, str(urlsplit(roles[name]).username)))
        await connection.close()
        yield made


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
        "SELECT leveret.wake(ARRAY['plain'])",
        "UPDATE leveret.migrations SET checksum = ''",
        "CREATE TABLE leveret.own ()",
    ):
        with pytest.raises((asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedFunctionError)):
            await database.query("shop_publisher", refused)
    [[jobs]] = await database.query("owner", "SELECT count(*) FROM leveret.jobs")
    assert jobs == 2


async def test_a_program_that_publishes_by_leveret_may_not_read(database: Database) -> None:
    """The same, for the publisher of this package."""
    published = await database.run("shop_web", "publish", "shop:Note", "{}")
    delayed = await database.run("shop_web", "publish", "shop:Note", "{}", "--delay", "1h")

    assert (published.code, delayed.code) == (0, 0), (published, delayed)
    for arguments in (("queues", "plain"), ("dead", "list", "plain"), ("queues", "purge", "plain", "--yes")):
        refused = await database.run("shop_web", *arguments)
        assert refused.code == 2, refused
        assert "the role lacks a right: permission denied for" in refused.line
    for table in ("jobs", "delayed", "claims", "dead", "workers", "queues"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await database.query("shop_web", f"SELECT FROM leveret.{table}")


async def test_a_worker_works_and_changes_no_tables(database: Database, project: Project) -> None:
    """A handler is a user's code: with the owner's rights it could drop what all apps share."""
    url = database.roles["shop_worker"]
    for job, fields in (
        ("SendInvoice", '{"order_id": 1}'),
        ("Report", '{"title": "a"}'),
        ("SendInvoice", '{"order_id": -1}'),
    ):
        assert (await database.run("shop_web", "publish", f"shop:{job}", fields)).code == 0
    with project.start("work", LEVERET_BROKER=url) as worker:
        await asyncio.to_thread(worker.wait_for, "buried in", 2)
        await asyncio.to_thread(worker.stop)

    assert [line for line in project.said if line.startswith("end 1 ")], project.said
    behind = await database.run("shop_worker", "migrate")
    assert behind.code == 0, behind
    assert "is up to date" in behind.out
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

    listed = await database.run("shop_worker", "dead", "list", "plain", "--json")
    replayed = await database.run("shop_worker", "dead", "replay", "plain", "--id", "one")
    dropped = await database.run("shop_worker", "dead", "drop", "plain", "--id", "two", "--yes")
    counted = await database.run("shop_worker", "queues", "plain", "--json")
    purged = await database.run("shop_worker", "queues", "purge", "plain", "--yes", "--json")

    assert [code.code for code in (listed, replayed, dropped, counted, purged)] == [0, 0, 0, 0, 0], (
        listed,
        replayed,
        dropped,
        counted,
        purged,
    )
    assert len(listed.json) == 2
    [depth] = counted.json
    assert (depth["ready"], depth["dead"]) == (1, 0)
    assert purged.json["purged"] == 1


async def test_a_monitor_counts_and_takes_nothing(database: Database) -> None:
    """A monitor runs everywhere, and its login with it."""
    await database.run("shop_web", "publish", "shop:Note", "{}")
    counted = await database.run("shop_monitor", "queues", "plain", "--json")
    refused = await database.run("shop_monitor", "queues", "purge", "plain", "--yes")

    assert counted.code == 0, counted
    assert counted.json[0]["ready"] == 1
    assert refused.code == 2, refused
    assert "the role lacks a right: permission denied for" in refused.line


async def test_a_role_without_rights_is_one_line_for_each_command(database: Database) -> None:
    """A worker that tried for ever, or a traceback, would tell nobody whom to ask."""
    password = str(urlsplit(database.roles["stranger"]).password)
    for arguments in (
        ("work",),
        ("publish", "shop:Note", "{}"),
        ("queues", "plain"),
        ("dead", "list", "plain"),
        ("migrate",),
        ("migrate", "--check"),
    ):
        ran = await database.run("stranger", *arguments)
        assert ran.code == 2, (arguments, ran)
        assert "permission denied for schema leveret" in ran.err.splitlines()[-1], (arguments, ran)
        assert password not in ran.err
