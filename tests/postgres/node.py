"""PostgreSQL servers as plain child processes: find, start, kill and pause them; nothing is installed or left behind."""

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import asyncpg

from leveret.runtime import Runtime
from leveret.schemes import open_migrator
from leveret.settings import redact
from tests import nodes
from tests.nodes import Choice, free_ports, has_docker, tail, url_at, write
from tests.postgres.installation import (
    Installation,
    copy,
    faketime_for,
    local_installation,
    package,
    pgbouncer_for,
    unpacked_installation,
)
from tests.postgres.process import Process

_BOOT_S, _QUERY_S = 90.0, 30.0
_IMAGE = "postgres:17"
_AWAY = (OSError, asyncpg.CannotConnectNowError)  # a server that a test has killed; its folder goes with it


async def migrate(url: str) -> None:
    """Make leveret's tables in the database of the URL."""
    migrator = open_migrator(url, Runtime(app="tests"))
    assert migrator is not None
    await migrator.migrate(lambda _: None)


class Postgres(nodes.Server):
    """A PostgreSQL for tests: `url` always works; the levers work only if the tests own the process (`Node`)."""

    def kill9_backend(self, pid: int) -> None:
        """Kill the process of one connection: the server then ends all others too, and recovers as after a crash."""
        self._no_lever()

    def step_clock(self, ahead_s: float) -> None:
        """Let the server's clock be `ahead_s` before the true time from now on, or behind it if negative."""
        self._no_lever()

    async def standby(self, *, synchronous: bool) -> "Node":
        """Start a server that streams this one's changes. Commits wait for a synchronous one, of which there can be one at a time."""
        self._no_lever()

    async def promote(self) -> None:
        """Make a standby a server that takes writes; return once it does."""
        self._no_lever()

    async def pooler(self, **conf: str | int) -> "PgBouncer":
        """Start a PgBouncer before this server, in transaction mode; `conf` are its own settings' names."""
        self._no_lever()

    async def query(self, sql: str, *arguments: Any, url: str | None = None) -> list[asyncpg.Record]:
        """Run one statement on a connection of its own, as the superuser unless `url` says another, and return its rows."""
        connection = await asyncpg.connect(url or self.url, timeout=_QUERY_S)
        try:
            return await connection.fetch(sql, *arguments, timeout=_QUERY_S)
        finally:
            await connection.close(timeout=5)

    async def terminate(self, pid: int) -> None:
        """End one connection as an administrator would (57P01), by the process id of its backend."""
        await self.query("SELECT pg_terminate_backend($1)", pid)

    @asynccontextmanager
    async def database(self) -> AsyncGenerator[str]:
        """Make an empty database, and yield its URL; it is dropped in the end, whoever is connected."""
        name = f"test_{secrets.token_hex(6)}"
        await self.query(f"CREATE DATABASE {name}")
        try:
            yield urlsplit(self.url)._replace(path=f"/{name}").geturl()
        finally:
            with contextlib.suppress(*_AWAY):
                await self.query(f"DROP DATABASE {name} WITH (FORCE)")

    @asynccontextmanager
    async def role(self, url: str) -> AsyncGenerator[str]:
        """Make a role that may log in and no more, and yield `url`, that of a database, with its name and password."""
        name, password = f"test_{secrets.token_hex(6)}", secrets.token_hex(12)
        await self.query(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'")
        try:
            parts = urlsplit(url)
            yield parts._replace(netloc=f"{name}:{password}@{parts.netloc.rpartition('@')[2]}").geturl()
        finally:
            with contextlib.suppress(*_AWAY):
                await self.query(f"DROP OWNED BY {name}", url=url)
                await self.query(f"DROP ROLE {name}")


class Node(Process, Postgres):
    """A private server on a free port, with its own folder. Only processes that it started get signals.

    `conf` are settings of postgresql.conf. `clock` makes a clock that `step_clock` moves, and the server slower.
    """

    def __init__(
        self,
        installation: Installation,
        *,
        conf: Mapping[str, str | int] | None = None,
        clock: bool = False,
        primary: "Node | None" = None,
    ) -> None:
        self._template = installation.template()
        library = (
            faketime_for(installation) if clock else None
        )  # before the folder: a test that can't have one ends here
        [self.port] = free_ports(1)
        Process.__init__(self, f"PostgreSQL on port {self.port}", installation, stops_by=signal.SIGINT)
        self._password = (self._template / "password").read_text()
        Postgres.__init__(self, f"postgresql://postgres:{self._password}@127.0.0.1:{self.port}/postgres")
        self._conf = dict(conf or {})
        self._primary = primary
        self._data = self.folder / "data"
        self._beside: list[Node | PgBouncer] = []
        self._clock = self.folder / "clock" if library else None
        if self._clock is not None and library is not None:
            write(self._clock, "+0")
            preloaded = self.folder / library.name
            preloaded.write_bytes(library.read_bytes())  # it may lie where the server's user can't read
            preloaded.chmod(0o644)

    def url_with(self, *others: "Node") -> str:
        """Return the URL of this server and others, from which a client chooses."""
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in (self, *others))
        return f"postgresql://postgres:{self._password}@{hosts}/postgres"

    async def start(self) -> None:
        """Start the server with its old data, and return once it takes connections. A running server is left alone."""
        if self.pid is not None:
            return
        if not self._data.exists():
            await asyncio.to_thread(self._fill)
        inside = self._installation.inside(self.folder)
        command = [*self._clocked(inside), f"{self._installation.tools}/postgres", "-D", f"{inside}/data"]
        await self._run(command, self._ready)
        if self._clock is not None and "cannot be preloaded" in self.log.read_text():
            raise RuntimeError(f"this PostgreSQL can't load libfaketime: {tail(self.log)}")

    def kill9_backend(self, pid: int) -> None:
        """Kill the process of one connection: the server then ends all others too, and recovers as after a crash."""
        if pid not in self._forked():
            raise RuntimeError(f"process {pid} isn't a backend of this server")
        os.kill(pid, signal.SIGKILL)

    def step_clock(self, ahead_s: float) -> None:
        """Let the server's clock be `ahead_s` before the true time from now on, or behind it if negative."""
        if self._clock is None:
            raise RuntimeError("this server has the machine's clock: start it with clock=True")
        new = self._clock.with_suffix(".new")
        write(new, f"{ahead_s:+}")
        new.replace(self._clock)

    async def standby(self, *, synchronous: bool) -> "Node":
        """Start a server that streams this one's changes. Commits wait for a synchronous one, of which there can be one at a time."""
        standby = Node(self._installation, conf=self._conf, clock=self._clock is not None, primary=self)
        self._beside.append(standby)
        await self._set("wal_keep_size", "1GB")  # a standby that is paused for long finds all that it missed
        await standby.start()
        if synchronous:
            await self._set("synchronous_standby_names", standby._name)
        streams = (
            "SELECT FROM pg_stat_replication WHERE application_name = $1 AND state = 'streaming' AND sync_state = $2"
        )
        ends = time.monotonic() + _BOOT_S
        while not await self.query(streams, standby._name, "sync" if synchronous else "async"):
            if time.monotonic() > ends:
                raise RuntimeError(f"the standby doesn't stream after {_BOOT_S:.0f} s")
            await asyncio.sleep(0.02)  # another's replication has no event
        return standby

    async def promote(self) -> None:
        """Make a standby a server that takes writes; return once it does."""
        [[done]] = await self.query("SELECT pg_promote(wait_seconds => 25)")
        if not done:
            raise RuntimeError("the standby wasn't promoted in 25 s")

    async def pooler(self, **conf: str | int) -> "PgBouncer":
        """Start a PgBouncer before this server, in transaction mode; `conf` are its own settings' names."""
        pooler = PgBouncer(pgbouncer_for(self._installation), self.url, conf)
        self._beside.append(pooler)
        await pooler.start()
        return pooler

    async def close(self) -> None:
        """End the server and what was started beside it at once, and remove their folders."""
        for beside in self._beside:
            await beside.close()
        await super().close()

    @property
    def _name(self) -> str:
        return f"standby_{self.port}"

    async def _set(self, name: str, value: str) -> None:
        await self.query(f"ALTER SYSTEM SET {name} TO '{value}'")
        await self.query("SELECT pg_reload_conf()")

    def _fill(self) -> None:
        """Make the data: a copy of a new server's, or of the primary's."""
        conf = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "dynamic_shared_memory_type": "mmap",  # in the folder, which goes: the others outlive a kill -9
            "timezone": "UTC",
            **self._conf,
        }
        if self._primary is None:
            copy(self._template / "data", self._data)
        else:
            target = f"{self._installation.inside(self.folder)}/data"
            to = ["-h", "127.0.0.1", "-p", str(self._primary.port), "-U", "postgres"]
            options = ["--checkpoint", "fast", "--no-sync"]
            self._installation.run(self.folder, "pg_basebackup", *to, "-D", target, *options, password=self._password)
            (self._data / "standby.signal").touch()
            write(self._data / "postgresql.auto.conf", "")  # the primary waits for a standby; its copy must not
            login = f"user=postgres password={self._password} application_name={self._name}"
            conf["primary_conninfo"] = f"host=127.0.0.1 port={self._primary.port} {login}"
        with (self._data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in conf.items())

    def _clocked(self, inside: str) -> list[str]:
        """Return the words before a command whose clock `step_clock` moves; what measures spans goes on at its pace."""
        if self._clock is None:
            return []
        return [
            "env",
            f"LD_PRELOAD={inside}/libfaketime.so.1",
            f"FAKETIME_TIMESTAMP_FILE={inside}/clock",
            "FAKETIME_NO_CACHE=1",
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
            "NO_FAKE_STAT=1",
        ]

    async def _ready(self) -> bool:
        """Return whether the server takes connections, as it writes to its lock file."""
        with contextlib.suppress(FileNotFoundError, IndexError):
            lines = (self._data / "postmaster.pid").read_text().splitlines()
            return lines[0] == str(self.pid) and lines[7].strip() == "ready"
        return False


class PgBouncer(Process):
    """A private PgBouncer before a server, in transaction mode, for every database and role that the server has."""

    def __init__(self, installation: Installation, server: str, conf: Mapping[str, str | int]) -> None:
        [self.port] = free_ports(1)
        super().__init__(f"PgBouncer on port {self.port}", installation, stops_by=signal.SIGINT)
        self.url = self.url_of(server)
        behind = urlsplit(server)
        inside = installation.inside(self.folder)
        write(self.folder / "users", f'"{behind.username}" "{behind.password}"\n')
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "pool_mode": "transaction",
            "auth_type": "scram-sha-256",
            "auth_file": f"{inside}/users",
            "auth_user": behind.username,  # asks the server for the roles that tests make
            **conf,
        }
        lines = [f"{name} = {value}\n" for name, value in settings.items()]
        databases = f"[databases]\n* = host=127.0.0.1 port={behind.port}\n"
        write(self.folder / "pgbouncer.ini", f"{databases}[pgbouncer]\n{''.join(lines)}")

    def url_of(self, url: str) -> str:
        """Return the URL of one of the server's databases through this pooler."""
        return url_at(url, self.port)

    async def start(self) -> None:
        """Start the pooler, and return once it takes connections. A running one is left alone."""
        if self.pid is None:
            conf = f"{self._installation.inside(self.folder)}/pgbouncer.ini"
            await self._run([f"{self._installation.tools}/pgbouncer", conf], partial(_accepts, self.port))


async def _accepts(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.transport.abort()
    return True


async def in_container() -> Postgres:
    """Start PostgreSQL in a container. Testcontainers' reaper ends it after the tests."""
    # Not tried yet: no machine that ran these tests had Docker. A container has no levers, so tests that need one skip.
    from testcontainers.core.container import DockerContainer

    password = secrets.token_hex(16)
    container = DockerContainer(_IMAGE).with_env("POSTGRES_PASSWORD", password).with_exposed_ports(5432).start()
    host, port = container.get_container_host_ip(), int(container.get_exposed_port(5432))
    url = f"postgresql://postgres:{password}@{host}:{port}/postgres"
    server = Postgres(url, why_no_levers="PostgreSQL runs in a container, which these tests can't stop and start")
    async with asyncio.timeout(_BOOT_S):
        while True:
            with contextlib.suppress(*_AWAY):
                await server.query("SELECT 1")
                return server
            await asyncio.sleep(0.1)


Found: TypeAlias = Postgres | Installation
"""A running server that isn't ours, or the programs to run some."""


def choose() -> Choice[Found]:
    """Return the PostgreSQL to use, without starting or downloading anything.

    In this order: the server of LEVERET_TEST_POSTGRES; the Debian suite that LEVERET_POSTGRES_SUITE names (bookworm: 15,
    trixie: 17); a local server; Docker; bookworm's as unpacked packages.
    """
    if url := os.environ.get("LEVERET_TEST_POSTGRES"):
        why = "LEVERET_TEST_POSTGRES names a foreign server, which the tests must not stop"
        return Choice(f"{redact(url)} (LEVERET_TEST_POSTGRES)", lambda: Postgres(url, why_no_levers=why))
    if suite := os.environ.get("LEVERET_POSTGRES_SUITE"):
        return Choice(package(suite), partial(unpacked_installation, suite))
    if local := local_installation():
        return Choice(f"private servers of {local.tools}", lambda: local)
    if has_docker():
        return Choice(f"a container of {_IMAGE}, pulled if it isn't here", lambda: asyncio.run(in_container()))
    return Choice(package("bookworm"), unpacked_installation)


def find_postgres() -> Found:
    """Return what `choose` chooses; Unavailable if it can't be had."""
    return choose().find()
