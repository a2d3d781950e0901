"""The levers that other tests pull do what they say."""

import asyncio
import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import asyncpg
import pytest

from tests.conftest import StartPostgres
from tests.nodes import ours
from tests.postgres.node import Found, Postgres
from tests.postgres.process import processes
from tests.proxy import FaultProxy

T = TypeVar("T")
_SOON_S, _SILENCE_S = 30.0, 0.2


@asynccontextmanager
async def connected(url: str) -> AsyncGenerator[asyncpg.Connection]:
    """Connect, and hang up in the end without a word to a server that may be away."""
    connection = await asyncpg.connect(url, timeout=_SOON_S, statement_cache_size=0)
    try:
        yield connection
    finally:
        connection.terminate()


async def waits(answer: "asyncio.Future[T]") -> bool:
    """Say whether no answer comes."""
    done, _ = await asyncio.wait([answer], timeout=_SILENCE_S)
    return not done


async def soon(true: Callable[[], Awaitable[bool]]) -> None:
    """Wait until it is true."""
    async with asyncio.timeout(_SOON_S):
        while not await true():
            await asyncio.sleep(0.02)


async def sleeping(server: Postgres) -> None:
    """Wait until a connection runs pg_sleep: it has then read all that was sent to it, so that its last words aren't lost."""

    async def sleeps() -> bool:
        return bool(await server.query("SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep'"))

    await soon(sleeps)


async def test_a_database_is_gone_after_its_test_even_if_somebody_is_connected(postgres: Postgres) -> None:
    """What stays behind fills the disk of a server that isn't ours, and a test would find another's tables."""
    names = "SELECT datname FROM pg_database"
    async with postgres.database() as url:
        connection = await asyncpg.connect(url)
        await connection.execute("CREATE TABLE t ()")
        name = urlsplit(url).path[1:]
        assert name in {row["datname"] for row in await postgres.query(names)}

    assert name not in {row["datname"] for row in await postgres.query(names)}
    connection.terminate()


async def test_a_role_needs_its_password_and_reads_nobodys_tables(postgres: Postgres) -> None:
    """Tests of rights and of wrong passwords would pass for the wrong reason."""
    async with postgres.database() as url, postgres.role(url) as role:
        await postgres.query("CREATE TABLE t ()", url=url)
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await postgres.query("SELECT FROM t", url=role)

        await postgres.query(f"GRANT SELECT ON t TO {urlsplit(role).username}", url=url)

        assert await postgres.query("SELECT FROM t", url=role) == []
        with pytest.raises(asyncpg.InvalidPasswordError):
            await postgres.query("SELECT 1", url=role.replace("@", "x@"))


async def test_a_terminated_connection_is_the_only_one_that_ends(postgres: Postgres) -> None:
    """The next connection of a worker must be judged by this: a lever that ended all would hide what it does with the others."""
    async with connected(postgres.url) as one, connected(postgres.url) as other:
        ended = asyncio.Event()
        one.add_termination_listener(lambda _: ended.set())

        await postgres.terminate(one.get_server_pid())

        await asyncio.wait_for(ended.wait(), _SOON_S)
        assert await other.fetchval("SELECT 1") == 1


async def test_a_frozen_link_passes_nothing_until_it_thaws(postgres: Postgres) -> None:
    """Half-open links are tested through this proxy."""
    async with FaultProxy(urlsplit(postgres.url).port or 0) as link, connected(link.url_of(postgres.url)) as connection:
        link.freeze("down")
        answer = asyncio.ensure_future(connection.fetchval("SELECT 1"))
        assert await waits(answer)

        link.thaw()

        assert await answer == 1


@pytest.mark.fault
async def test_a_killed_server_keeps_what_was_committed_and_leaves_no_process(postgres_node: StartPostgres) -> None:
    """Fault tests count what a server owes after kill -9; a backend that lived on would still commit."""
    node = await postgres_node()
    await node.query("CREATE TABLE t (n int)")
    await node.query("INSERT INTO t VALUES (1)")
    async with connected(node.url) as open_one:
        await open_one.execute("BEGIN; INSERT INTO t VALUES (2)")
        backend = open_one.get_server_pid()

        await node.kill9()

    assert node.pid is None
    assert backend not in processes()
    await node.start()
    assert [row["n"] for row in await node.query("SELECT n FROM t")] == [1]


@pytest.mark.fault
async def test_a_stopped_server_says_so_and_starts_again(postgres_node: StartPostgres) -> None:
    """An administrator's restart is told to clients (57P01); a kill isn't, and would be the other test."""
    node = await postgres_node()
    async with connected(node.url) as connection:
        running = asyncio.ensure_future(connection.fetchval("SELECT pg_sleep(60)"))
        await sleeping(node)

        await node.stop()

        with pytest.raises(asyncpg.PostgresError, match="administrator command"):
            await running
    assert node.pid is None
    await node.start()
    assert "database system was shut down" in node.log.read_text()


@pytest.mark.fault
async def test_a_paused_server_answers_nobody_until_resumed(postgres_node: StartPostgres) -> None:
    """A hang is the fault that deadlines are for; a backend that still answered would leave them untested."""
    node = await postgres_node()
    async with connected(node.url) as connection:
        node.pause()
        answers = [
            asyncio.ensure_future(connection.fetchval("SELECT 1")),
            asyncio.ensure_future(node.query("SELECT 1")),
        ]
        for answer in answers:
            assert await waits(answer)

        node.resume()

        await asyncio.gather(*answers)


@pytest.mark.fault
async def test_a_backends_kill_ends_all_connections_and_the_server_recovers(postgres_node: StartPostgres) -> None:
    """The out-of-memory killer does that: each worker loses its connection at once, and comes back."""
    node = await postgres_node()
    async with connected(node.url) as one, connected(node.url) as other:
        other_ends = asyncio.ensure_future(other.fetchval("SELECT pg_sleep(60)"))
        await sleeping(node)

        node.kill9_backend(one.get_server_pid())

        with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.CrashShutdownError, OSError)):
            await asyncio.wait_for(other_ends, _SOON_S)

    async def takes_connections() -> bool:
        with contextlib.suppress(OSError, asyncpg.PostgresError):
            return bool(await node.query("SELECT 1"))
        return False

    await soon(takes_connections)


@pytest.mark.fault
async def test_a_commit_waits_for_a_synchronous_standby_which_then_has_it(postgres_node: StartPostgres) -> None:
    """What is confirmed survives the primary: with a standby that isn't waited for, a test of that proves nothing."""
    primary = await postgres_node()
    await primary.query("CREATE TABLE t (n int)")
    standby = await primary.standby(synchronous=True)
    standby.pause()
    insert = asyncio.ensure_future(primary.query("INSERT INTO t VALUES (1)"))
    assert await waits(insert)
    standby.resume()
    await insert

    await primary.kill9()
    await standby.promote()

    async with connected(f"{primary.url_with(standby)}?target_session_attrs=read-write") as connection:
        assert await connection.fetchval("SELECT n FROM t") == 1
        await connection.execute("INSERT INTO t VALUES (2)")


@pytest.mark.fault
async def test_a_commit_doesnt_wait_for_an_asynchronous_standby_which_may_lack_it(postgres_node: StartPostgres) -> None:
    """The README says that confirmed jobs may then be missing; a test of that needs a standby that lags."""
    primary = await postgres_node()
    await primary.query("CREATE TABLE t (n int)")
    standby = await primary.standby(synchronous=False)
    await standby.kill9()
    await primary.query("INSERT INTO t VALUES (1)")

    await primary.kill9()
    await standby.start()
    await standby.promote()

    assert await standby.query("SELECT n FROM t") == []


@pytest.mark.fault
async def test_two_clients_share_a_connection_by_the_transaction(postgres_node: StartPostgres) -> None:
    """What relies on a session must fail behind the pooler, as it does in production."""
    node = await postgres_node()
    pooler = await node.pooler(default_pool_size=1)
    async with node.database() as url, node.role(url) as role:
        async with connected(pooler.url_of(role)) as one, connected(pooler.url_of(role)) as other:
            async with one.transaction():
                backend = await one.fetchval("SELECT pg_backend_pid()")
                waiting = asyncio.ensure_future(other.execute("SELECT 1"))
                assert await waits(waiting)
            await waiting
            async with other.transaction():
                assert await other.fetchval("SELECT pg_backend_pid()") == backend

        await pooler.kill9()
        with pytest.raises(OSError):
            await node.query("SELECT 1", url=pooler.url)
        await pooler.start()
        async with connected(pooler.url_of(role)) as again:
            await again.execute("SELECT 1")


@pytest.mark.fault
async def test_the_clock_steps_on_a_connection_and_spans_stay(postgres_node: StartPostgres) -> None:
    """Leases and delays are tested against a clock that jumps; one that jumped in new connections alone would spare them."""
    node = await postgres_node(clock=True)
    async with connected(node.url) as connection:
        for ahead_s in (3600, -3600, 0):
            node.step_clock(ahead_s)
            now = await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
            assert now - time.time() == pytest.approx(ahead_s, abs=20)
        node.step_clock(3600)
        began = time.monotonic()
        await connection.fetchval("SELECT pg_sleep(0.2)")
        assert 0.2 <= time.monotonic() - began < 20


_TESTS_THAT_ARE_KILLED = """
import asyncio, sys, time
from tests.postgres.node import Node, find_postgres
node = Node(find_postgres())
asyncio.run(node.start())
if sys.argv[1] == "paused":
    node.pause()
print(node.pid, node.folder, flush=True)
time.sleep(600)
"""


@pytest.mark.fault
@pytest.mark.parametrize("state", ["running", "paused"])
async def test_a_server_ends_with_the_tests_that_are_killed(state: str, postgres_found: Found) -> None:
    """A server that nobody ends keeps its memory, its port and its folder until the machine is started again."""
    ours(postgres_found)
    tests = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _TESTS_THAT_ARE_KILLED, state, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE
    )
    assert tests.stdout is not None
    pid, folder = (await tests.stdout.readline()).decode().split()
    forked = [child for child, (_, parent) in processes().items() if parent == int(pid)]
    assert forked

    tests.kill()
    await tests.wait()

    async def ended() -> bool:
        return not processes().keys() & {int(pid), *forked}

    await soon(ended)
    shutil.rmtree(folder)
