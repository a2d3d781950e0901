"""What a SQLite URL may name, and what is said where it can't be used."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from leveret.admin import Admin
from leveret.broker import Broker, Subscription
from leveret.brokers.sqlite import open_admin, open_broker
from leveret.brokers.sqlite.broker import path_of
from leveret.errors import BrokerUnavailable, ConfigurationError
from leveret.job import Queue
from leveret.runtime import Runtime
from tests.contract.harness import Recorder, make_envelope, soon, timed

QUEUE = Queue("jobs")
RUNTIME = Runtime(app="unit")


async def publish(broker: Broker) -> None:
    await broker.publish(QUEUE, timed(make_envelope(QUEUE), soon()))


def exists(path: Path) -> bool:
    return path.exists()


def names_in(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


async def refusal(path: Path) -> str:
    """Return the text with which a publisher, a worker and an admin refuse `path`: the same for all.

    A publisher raises the `PublishError` that its callers handle; workers and commands raise `ConfigurationError`.
    """
    broker: Broker = open_broker(f"sqlite:///{path}", RUNTIME)
    admin: Admin = open_admin(f"sqlite:///{path}", RUNTIME)
    try:
        with pytest.raises(BrokerUnavailable) as published:
            await publish(broker)
        assert isinstance(published.value.__cause__, ConfigurationError)
        with pytest.raises(ConfigurationError) as consumed:
            await broker.consume([Subscription(QUEUE, 1)], Recorder())
        if exists(path):
            with pytest.raises(ConfigurationError) as looked:
                await admin.depths([QUEUE])
            assert str(looked.value) == str(published.value)
        assert str(consumed.value) == str(published.value)
        assert str(path) in str(published.value)
        return str(published.value)
    finally:
        await broker.close()
        await admin.close()


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://", "sqlite:///", "sqlite://jobs.db", "sqlite://user:secret@host/jobs.db", "sqlite:///:memory:",
        "sqlite:///jobs.db?mode=ro", "sqlite:///jobs.db#a", "sqlite:///a%00b",
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_is_one_clear_error(url: str) -> None:
    """Two slashes instead of three is the commonest mistake; no password may be shown."""
    for opened in (open_broker, open_admin):
        with pytest.raises(ConfigurationError, match=r"sqlite:///jobs\.db") as raised:
            opened(url, RUNTIME)
        assert "secret" not in str(raised.value)


def test_three_slashes_are_relative_and_four_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher and a worker that take a URL for two files never meet."""
    monkeypatch.chdir(tmp_path)

    assert path_of("sqlite:///jobs.db") == str(tmp_path / "jobs.db")
    assert path_of("sqlite:///a/b%20c.db") == str(tmp_path / "a" / "b c.db")
    assert path_of("sqlite:////var/lib/jobs.db") == "/var/lib/jobs.db"
    for url in ("sqlite:jobs.db", "sqlite:/var/lib/jobs.db"):
        with pytest.raises(ConfigurationError, match="has too few slashes: write three slashes before a relative path"):
            path_of(url)


async def test_a_relative_path_stays_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that changes its folder before its first publish must not write elsewhere than its workers read."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    broker = open_broker("sqlite:///jobs.db", RUNTIME)

    monkeypatch.chdir(tmp_path / "elsewhere")
    await publish(broker)
    await broker.close()

    assert (tmp_path / "jobs.db").exists()


async def test_nothing_is_opened_before_the_first_use(tmp_path: Path) -> None:
    """Importing an app must not make files."""
    broker = open_broker(f"sqlite:///{tmp_path}/jobs.db", RUNTIME)
    await broker.close()

    assert names_in(tmp_path) == []


async def test_an_admin_makes_no_file(tmp_path: Path) -> None:
    """`leveret queues` with a misspelt path must not leave an empty database behind."""
    admin = open_admin(f"sqlite:///{tmp_path}/jobs.db", RUNTIME)
    [row] = await admin.depths([QUEUE])
    purged = await admin.purge(QUEUE)
    async with admin.dead(QUEUE) as letters:
        dead = [letter async for letter in letters]
    await admin.close()

    assert (row.exists, purged, dead) == (False, 0, [])
    assert names_in(tmp_path) == []


async def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """A typo in the path must be one line with the path in it."""
    assert f"the folder {tmp_path}/missing doesn't exist" in await refusal(tmp_path / "missing" / "jobs.db")


async def test_a_folder_is_no_file(tmp_path: Path) -> None:
    """sqlite:////var/lib/shop is a natural mistake."""
    assert "is a folder" in await refusal(tmp_path)


async def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    """A URL that points at somebody's text file must not cost them the text."""
    path = tmp_path / "notes.txt"
    path.write_text("remember the milk\n" * 100)

    assert "isn't a SQLite database" in await refusal(path)
    assert path.read_text() == "remember the milk\n" * 100


async def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    """A queue inside the application's own database fights it for the lock and for user_version."""
    path = tmp_path / "shop.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE orders (id INTEGER)")
    before = path.read_bytes()

    assert "another program's" in await refusal(path)
    assert path.read_bytes() == before


async def test_a_newer_schema_says_upgrade(tmp_path: Path) -> None:
    """An old worker in a rolling deploy must not write rows that the new one misreads."""
    path = tmp_path / "jobs.db"
    broker = open_broker(f"sqlite:///{path}", RUNTIME)
    await publish(broker)
    await broker.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")

    assert "upgrade leveret" in await refusal(path)


async def test_a_damaged_file_is_said_and_not_retried(tmp_path: Path) -> None:
    """Waiting mends no file; an operator has to know."""
    path = tmp_path / "jobs.db"
    broker = open_broker(f"sqlite:///{path}", RUNTIME)
    for _ in range(50):
        await broker.publish(QUEUE, timed(make_envelope(QUEUE, b"x" * 4000), soon()))
    await broker.close()
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)

    assert "damaged" in await refusal(path)


_READ_ONLY = """
import asyncio, os, sys
from leveret.brokers.sqlite import open_broker
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable
from leveret.job import Queue
from leveret.runtime import Runtime

if os.geteuid() == 0:  # root may write anything
    os.setegid(65534)
    os.seteuid(65534)

async def main():
    broker = open_broker(sys.argv[1], Runtime(app="unit"))
    try:
        await broker.publish(Queue("jobs"), Envelope(job_id="1", job="a", queue="jobs", deadline=asyncio.get_running_loop().time() + 5))
    except BrokerUnavailable as error:
        print(error)
    await broker.close()

asyncio.run(main())
"""


@pytest.mark.parametrize("read_only", ["file", "folder", "folder of a new file"])
async def test_a_read_only_path_is_named(tmp_path: Path, read_only: str) -> None:
    """A service under another user than the one that made the file must say so at once."""
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / "jobs.db"
    if read_only != "folder of a new file":
        broker = open_broker(f"sqlite:///{path}", RUNTIME)
        await publish(broker)
        await broker.close()
    # the child is another user, and has to reach the folder
    for parent in folder.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o555)
    folder.chmod(0o777 if read_only == "file" else 0o555)
    if path.exists():
        path.chmod(0o444 if read_only == "file" else 0o666)

    try:
        command = [sys.executable, "-c", _READ_ONLY, f"sqlite:///{path}"]
        child = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, timeout=60, check=True, cwd="/"
        )
    finally:
        folder.chmod(0o755)

    assert child.stdout.count("\n") == 1
    assert str(path) in child.stdout
    assert "can't be written" in child.stdout


def test_a_sqlite_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an old system the first claim would be a syntax error."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    monkeypatch.setattr(sqlite3, "sqlite_version", "3.34.1")

    with pytest.raises(ConfigurationError, match=r"3\.34\.1.*3\.35"):
        open_broker("sqlite:///jobs.db", RUNTIME)


async def test_commits_are_durable_and_the_log_is_write_ahead(tmp_path: Path) -> None:
    """Without synchronous=FULL a power cut takes confirmed jobs; without WAL readers and writers stop each other."""
    from leveret.brokers.sqlite.schema import open_file

    with closing(open_file(str(tmp_path / "jobs.db"), create=True)) as connection:
        settings = [
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("synchronous", "journal_mode", "auto_vacuum")
        ]

    assert settings == [2, "wal", 2]


async def test_the_state_says_that_a_file_cannot_be_used_until_it_can(tmp_path: Path) -> None:
    """A readiness probe that sees "ready" sends requests to a service whose every publish fails."""
    path = tmp_path / "notes.txt"
    path.write_text("remember the milk\n" * 100)
    broker = open_broker(f"sqlite:///{path}", Runtime(app="unit"))
    try:
        with pytest.raises(BrokerUnavailable):
            await broker.publish(Queue("jobs"), make_envelope(Queue("jobs")))
        assert broker.publishing.name == "blocked"
        assert "isn't a SQLite database" in broker.publishing.why

        path.unlink()
        await broker.publish(Queue("jobs"), make_envelope(Queue("jobs")))
        assert (broker.publishing.name, broker.publishing.why) == ("ready", "")
    finally:
        await broker.close()
