"""What a program says that can't use its database: one line, without the password, and it ends."""

import asyncio
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
import trustme

from tests.cli.command import Project
from tests.conftest import StartPostgres
from tests.nodes import NOBODY
from tests.postgres.node import Node, Postgres


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A folder with an app."""
    return Project(tmp_path)


@pytest_asyncio.fixture
async def url(postgres: Postgres) -> AsyncGenerator[str]:
    """An empty database."""
    async with postgres.database() as made:
        yield made


async def test_what_waiting_will_not_mend_ends_a_program_with_one_line(project: Project, url: str) -> None:
    """A worker that tried for ever would look healthy, and a publisher would time out without a reason."""
    password = str(urlsplit(url).password)
    migrate = "run `leveret migrate` with the app, such as shop:app, or with --url"
    for command, case, why in (
        (["work"], url, f"the schema 'leveret' of the database isn't there yet; {migrate}"),
        (["publish", "shop:Note", "{}"], url.replace(password, password[::-1]), "password authentication failed"),
        (["queues", "plain"], urlsplit(url)._replace(path="/nothing").geturl(), 'database "nothing" does not exist'),
    ):
        ran = await asyncio.to_thread(project.run, *command, LEVERET_BROKER=case)

        assert ran.code == 2, ran
        assert why in ran.err.splitlines()[-1], ran
        assert password not in ran.err
        assert password[::-1] not in ran.err


def encrypt(node: Node, authority: trustme.CA, name: str) -> None:
    """Give the server a certificate for `name`."""
    data = node.folder / "data"
    issued = authority.issue_cert(name)
    issued.cert_chain_pems[0].write_to_path(data / "server.crt")
    issued.private_key_pem.write_to_path(data / "server.key")
    for file in (data / "server.crt", data / "server.key"):
        file.chmod(0o600)
        if os.geteuid() == 0:
            os.chown(file, NOBODY, NOBODY)


@pytest.mark.fault
async def test_a_certificate_is_checked_and_a_wrong_one_is_one_line(
    project: Project, postgres_node: StartPostgres, tmp_path: Path
) -> None:
    """Whoever stands between a worker and its database would read all jobs."""
    node = await postgres_node()
    ours, others = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(tmp_path / "ours.crt")
    others.cert_pem.write_to_path(tmp_path / "others.crt")
    encrypt(node, ours, "127.0.0.1")
    await node.query("ALTER SYSTEM SET ssl = on")
    await node.query("SELECT pg_reload_conf()")
    password = str(urlsplit(node.url).password)
    named = node.url.replace("127.0.0.1", "localhost")

    async def migrate(url: str) -> tuple[int, str]:
        ran = await asyncio.to_thread(project.run, "migrate", "--check", LEVERET_BROKER=url)
        assert password not in ran.err
        return ran.code, ran.line

    async with asyncio.timeout(60):
        while not await node.query("SELECT FROM pg_stat_ssl WHERE ssl", url=f"{node.url}?sslmode=prefer"):
            await asyncio.sleep(0.1)
    right = await migrate(f"{node.url}?sslmode=verify-full&sslrootcert={tmp_path}/ours.crt")
    wrong = await migrate(f"{node.url}?sslmode=verify-full&sslrootcert={tmp_path}/others.crt")
    other_name = await migrate(f"{named}?sslmode=verify-full&sslrootcert={tmp_path}/ours.crt")

    assert right == (
        2,
        f"leveret: the broker {node.url.replace(password, '***')} (schema leveret) lacks 0001_jobs, 0002_outbox, 0003_records",
    )
    assert wrong[0] == other_name[0] == 2
    assert "certificate verify failed" in wrong[1]
    assert "certificate is not valid for 'localhost'" in other_name[1]
