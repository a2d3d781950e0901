"""Redis and Valkey servers as plain child processes: find, start, kill and pause them; nothing is installed or left behind."""

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias
from urllib.parse import urlsplit

import trustme
from redis import asyncio as client
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from leveret.settings import redact
from tests import nodes
from tests.nodes import (
    NOBODY,
    Choice,
    free_ports,
    has_docker,
    kill_group,
    private_folder,
    spawn,
    tail,
    why_not_up,
    write,
)
from tests.redis.installation import Installation, local_installation, package, unpacked_installation

_BOOT_S, _STOP_S, _ANSWER_S = 60.0, 60.0, 30.0
_IMAGE = "valkey/valkey:8"
_NEVER_MS = 3_600_000
_SLOTS = 16_384
_AWAY = (OSError, RedisError)  # a server that a test has killed; its folder goes with it

Conf: TypeAlias = Mapping[str, str | int]
"""Settings by their names in redis.conf."""


_REDIS: Any = client.Redis  # whose annotations are partial


class Connection:
    """One connection, which isn't made again."""

    def __init__(self, url: str) -> None:
        self._client = _REDIS.from_url(
            url,
            protocol=3,
            decode_responses=True,
            encoding_errors="surrogateescape",  # a key that isn't UTF-8 is there to be moved, too
            socket_timeout=_ANSWER_S,
            socket_connect_timeout=_ANSWER_S,
            retry=Retry(NoBackoff(), 0),
            single_connection_client=True,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def command(self, *words: str | int | bytes) -> Any:
        """Send one command, and return the answer; an error raises redis-py's."""
        return await self._client.execute_command(*words)

    def listener(self) -> Any:
        """Return redis-py's PubSub, which has a connection of its own."""
        return self._client.pubsub()


async def ask(url: str, *words: str | int | bytes) -> Any:
    """Send one command on a connection of its own, and return the answer; an error raises redis-py's."""
    async with Connection(url) as one:
        return await one.command(*words)


async def soon(true: Callable[[], Awaitable[bool]], what: str) -> None:
    """Wait until it is true; RuntimeError where it isn't in a minute."""
    ends = time.monotonic() + _BOOT_S
    while not await true():
        if time.monotonic() > ends:
            raise RuntimeError(f"not {what} after {_BOOT_S:.0f} s")
        await asyncio.sleep(0.02)  # another's state has no event


class Server(nodes.Server):
    """A Redis for tests: `url` always works; the levers work only if the tests own the process (`Node`)."""

    async def hold(self, what: Literal["WRITE", "ALL"]) -> None:
        """Let writes, or all commands, of all clients wait (CLIENT PAUSE); reads go on while writes wait."""
        self._no_lever()

    async def release(self) -> None:
        """End `hold("WRITE")`: what waited runs."""
        self._no_lever()

    async def disconnect(self) -> None:
        """End all connections of clients, those that publish, work or listen, as an administrator may."""
        self._no_lever()

    async def configure(self, name: str, value: str | int) -> None:
        """Change a setting until the next start."""
        self._no_lever()

    async def replica(self) -> "Node":
        """Start a server that follows this one, and return it once it has what this one has."""
        self._no_lever()

    async def detach(self) -> None:
        """Let a replica keep what it has, and follow no more."""
        self._no_lever()

    async def promote(self) -> None:
        """Make a replica a server that takes writes."""
        self._no_lever()

    async def command(self, *words: str | int | bytes) -> Any:
        """Run one command on a connection of its own, and return the answer."""
        return await ask(self.url, *words)

    async def info(self, section: str) -> dict[str, Any]:
        """Return a section of INFO."""
        found: dict[str, Any] = await self.command("INFO", section)
        return found

    @asynccontextmanager
    async def user(self, *rules: str) -> AsyncGenerator[str]:
        """Make a user with these rules of ACL SETUSER, by default all but CONFIG, and yield the URL with its name and password."""
        name, password = f"test-{secrets.token_hex(6)}", secrets.token_hex(12)
        await self.command("ACL", "SETUSER", name, "on", f">{password}", *(rules or ("~*", "&*", "+@all", "-config")))
        try:
            parts = urlsplit(self.url)
            yield parts._replace(netloc=f"{name}:{password}@{parts.netloc.rpartition('@')[2]}").geturl()
        finally:
            with contextlib.suppress(*_AWAY):
                await self.command("ACL", "DELUSER", name)


class Node(Server):
    """A private server on a free port, in a folder of its own. It is this thread's child and ends with it, even if the tests are killed (on Linux).

    Each write is in its file before its answer, so that none is lost by `kill9`, which isn't a power cut; `conf` may say else.
    """

    def __init__(
        self,
        installation: Installation,
        *,
        conf: Conf | None = None,
        authority: trustme.CA | None = None,
        password: str = "",
    ) -> None:
        self.port, self.tls_port, self.bus_port = free_ports(3)
        self.password = password or secrets.token_hex(12)
        super().__init__(f"redis://default:{self.password}@127.0.0.1:{self.port}/0")
        self._installation = installation
        self._conf = conf or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._primary: Node | None = None
        self._beside: list[Node] = []
        self.folder = private_folder("leveret-redis-")
        if authority is not None:
            self._certify(authority)
        self._write("redis.conf", "".join(f"{line}\n" for line in self._lines(encrypted=authority is not None)))

    @property
    def tls_url(self) -> str:
        """The URL of the port that speaks TLS, if it was made with an authority; the certificate is for localhost and 127.0.0.1."""
        return f"rediss://default:{self.password}@localhost:{self.tls_port}/0"

    @property
    def pid(self) -> int | None:
        """The process id; None while it doesn't run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    async def start(self) -> None:
        """Start the server with its old data, and return once it takes commands. A running server is left alone."""
        if self.pid is not None:
            return
        inside = self._installation.inside(self.folder)
        program = f"{self._installation.tools}/{self._installation.program}"
        argv = self._installation.argv(self.folder, program, f"{inside}/redis.conf", *self._arguments())
        self._process = spawn(argv, env=self._installation.environ(self.folder), output=self.folder / "log")
        if failed := await why_not_up(self._process, self._answers, _BOOT_S):
            log = tail(self.folder / "log")
            await self.close()
            raise RuntimeError(f"{self._installation.program} on port {self.port} {failed}: {log}")

    async def stop(self) -> None:
        """Stop the server as an administrator would; kill it after 60 s."""
        if self._process is not None and self.pid is not None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, _STOP_S)
            except subprocess.TimeoutExpired:
                await self.kill9()

    async def kill9(self) -> None:
        """End the server as the kernel's out-of-memory killer does: none of its code runs. Its data stays for the next `start`."""
        if self._process is not None:
            kill_group(self._process)

    def pause(self) -> None:
        """Hang the server: connections stay up, and nothing answers."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGSTOP)
            os.waitpid(self.pid, os.WUNTRACED)

    def resume(self) -> None:
        """End `pause`."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGCONT)

    async def hold(self, what: Literal["WRITE", "ALL"]) -> None:
        """Let writes, or all commands, of all clients wait (CLIENT PAUSE); reads go on while writes wait."""
        await self.command("CLIENT", "PAUSE", _NEVER_MS, what)

    async def release(self) -> None:
        """End `hold("WRITE")`: what waited runs."""
        await self.command("CLIENT", "UNPAUSE")

    async def disconnect(self) -> None:
        """End all connections of clients, those that publish, work or listen, as an administrator may."""
        for kind in ("normal", "pubsub"):
            await self.command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")

    async def configure(self, name: str, value: str | int) -> None:
        """Change a setting until the next start."""
        await self.command("CONFIG", "SET", name, value)

    async def replica(self) -> "Node":
        """Start a server that follows this one, and return it once it has what this one has."""
        follows = {**self._conf, "replicaof": f"127.0.0.1 {self.port}"}
        replica = Node(self._installation, conf=follows, password=self.password)
        replica._primary = self
        self._beside.append(replica)
        await replica.start()
        await soon(replica.follows, "a replica")
        return replica

    async def follows(self) -> bool:
        """Return whether a replica has all that its primary had when it began to follow."""
        return (await self.info("replication")).get("master_link_status") == "up"

    async def takes_writes(self) -> bool:
        """Return whether it is no replica."""
        return (await self.info("replication")).get("role") == "master"

    async def detach(self) -> None:
        """Let a replica keep what it has, and follow no more."""
        await self.command("REPLICAOF", "127.0.0.1", 1)  # where nobody listens
        primary = self._primary
        assert primary is not None

        async def alone() -> bool:
            return int((await primary.info("replication"))["connected_slaves"]) == 0

        await soon(alone, "alone")

    async def promote(self) -> None:
        """Make a replica a server that takes writes."""
        await self.command("REPLICAOF", "NO", "ONE")

    async def close(self) -> None:
        """End the server and its replicas at once, and remove their folders."""
        for beside in self._beside:
            await beside.close()
        await self.kill9()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _arguments(self) -> Sequence[str]:
        return ()

    def _lines(self, *, encrypted: bool) -> Sequence[str]:
        """Return the lines of redis.conf."""
        inside = self._installation.inside(self.folder)
        settings: dict[str, str | int] = {
            "bind": "127.0.0.1",
            "port": self.port,
            "dir": inside,
            "requirepass": self.password,
            "masterauth": self.password,  # of a primary too: it may come back as a replica
            "save": '""',
            "appendonly": "yes",
            "appendfsync": "everysec",
            "auto-aof-rewrite-percentage": 0,
            "repl-diskless-sync-delay": 0,
            "enable-debug-command": "local",
        }
        if encrypted:
            settings |= {
                "tls-port": self.tls_port,
                "tls-cert-file": f"{inside}/server.crt",
                "tls-key-file": f"{inside}/server.key",
                "tls-ca-cert-file": f"{inside}/ca.crt",
                "tls-auth-clients": "optional",
            }
        return [f"{name} {value}" for name, value in (settings | dict(self._conf)).items()]

    def _certify(self, authority: trustme.CA) -> None:
        issued = authority.issue_cert("localhost", "127.0.0.1")
        self._write("server.crt", issued.cert_chain_pems[0].bytes().decode())
        self._write("server.key", issued.private_key_pem.bytes().decode())
        self._write("ca.crt", authority.cert_pem.bytes().decode())

    def _write(self, name: str, text: str) -> None:
        write(self.folder / name, text)
        if os.geteuid() == 0:  # a server rewrites its settings
            os.chown(self.folder / name, NOBODY, NOBODY)

    async def _answers(self) -> bool:
        with contextlib.suppress(*_AWAY):  # it doesn't listen yet, or it loads its data
            return bool(await ask(self.url, "PING"))
        return False


class Sentinel(Node):
    """One of those that watch a primary and promote a replica when it is silent for a second."""

    NAME = "mymaster"
    """What sentinels call the primary."""

    def __init__(self, installation: Installation, primary: Node, password: str) -> None:
        self._watched = primary
        super().__init__(installation, password=password)

    async def primary_port(self) -> int:
        """Return the port of the primary, as this sentinel knows it."""
        [_, port] = await self.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.NAME)
        return int(port)

    async def knows_all(self) -> bool:
        """Return whether it knows the other two, and two replicas that it could promote."""
        known = await self.command("SENTINEL", "MASTER", self.NAME)
        replicas = await self.command("SENTINEL", "REPLICAS", self.NAME)
        follow = [one for one in replicas if one["flags"] == "slave" and one["master-link-status"] == "ok"]
        return (len(follow), int(known["num-other-sentinels"])) == (2, 2)

    def _arguments(self) -> Sequence[str]:
        return ("--sentinel",)

    def _lines(self, *, encrypted: bool) -> Sequence[str]:
        return [
            "bind 127.0.0.1",
            f"port {self.port}",
            f"dir {self._installation.inside(self.folder)}",
            f"requirepass {self.password}",
            f"sentinel sentinel-pass {self.password}",
            f"sentinel monitor {self.NAME} 127.0.0.1 {self._watched.port} 2",
            f"sentinel auth-pass {self.NAME} {self._watched.password}",
            f"sentinel down-after-milliseconds {self.NAME} 1000",
            f"sentinel failover-timeout {self.NAME} 6000",
        ]


class Sentinels:
    """A primary with two replicas, and three sentinels that watch them."""

    def __init__(self, installation: Installation, *, conf: Conf | None = None) -> None:
        self._nodes = [Node(installation, conf=conf)]
        password = secrets.token_hex(12)
        self._sentinels = [Sentinel(installation, self._nodes[0], password) for _ in range(3)]
        hosts = ",".join(f"127.0.0.1:{one.port}" for one in self._sentinels)
        login = f"default:{self._nodes[0].password}"
        self.url = f"redis+sentinel://{login}@{hosts}/{Sentinel.NAME}/0?sentinel_password={password}"

    async def start(self) -> None:
        """Start all, and return once each sentinel knows the replicas and the other two."""
        await self._nodes[0].start()
        self._nodes += [await self._nodes[0].replica() for _ in range(2)]
        await asyncio.gather(*(one.start() for one in self._sentinels))
        for one in self._sentinels:
            await soon(one.knows_all, "a sentinel that knows all")

    async def primary(self) -> Node:
        """Return the server that the sentinels call the primary."""
        port = await self._sentinels[0].primary_port()
        return next(node for node in self._nodes if node.port == port)

    async def fail_over(self) -> Node:
        """Let the sentinels promote a replica although nothing is wrong, and return it once it takes writes."""
        before = await self.primary()
        await self._sentinels[0].command("SENTINEL", "FAILOVER", Sentinel.NAME)
        return await self.promoted(before)

    async def promoted(self, before: Node) -> Node:
        """Return the replica that is promoted in the place of `before`, once it takes writes and each sentinel says so."""

        async def known() -> bool:
            ports = {await one.primary_port() for one in self._sentinels}
            return len(ports) == 1 and ports != {before.port} and await (await self.primary()).takes_writes()

        await soon(known, "promoted")
        return await self.primary()

    async def close(self) -> None:
        """End all at once, and remove their folders."""
        for one in (*self._sentinels, *self._nodes):
            await one.close()


class Cluster:
    """Three servers that share the slots, each with a replica if asked for."""

    def __init__(self, installation: Installation, *, replicas: bool = False, conf: Conf | None = None) -> None:
        password = secrets.token_hex(12)
        self.primaries, self.replicas = (
            list[Node](_Member(installation, password=password, conf=conf) for _ in range(count))
            for count in (3, 3 if replicas else 0)
        )
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.primaries)
        self.url = f"redis+cluster://default:{password}@{hosts}"

    @property
    def nodes(self) -> list[Node]:
        """All servers; a replica may be a primary now."""
        return [*self.primaries, *self.replicas]

    async def start(self) -> None:
        """Start all, give the slots away, and return once each server knows the whole cluster."""
        await asyncio.gather(*(node.start() for node in self.nodes))
        for number, node in enumerate(self.primaries):
            share = [_SLOTS * one // 3 for one in (number, number + 1)]
            await node.command("CLUSTER", "ADDSLOTSRANGE", share[0], share[1] - 1)
        for number, node in enumerate(self.nodes, 1):
            await node.command("CLUSTER", "SET-CONFIG-EPOCH", number)
            if node is not self.nodes[0]:
                await self.nodes[0].command("CLUSTER", "MEET", "127.0.0.1", node.port, node.bus_port)
        await self.whole()
        for primary, replica in zip(self.primaries, self.replicas, strict=False):
            identifier = await primary.command("CLUSTER", "MYID")
            await replica.command("CLUSTER", "REPLICATE", identifier)
            await soon(replica.follows, "a replica")
        await self.whole()

    async def whole(self) -> None:
        """Wait until each server knows that each slot is served."""
        for node in self.nodes:
            await soon(partial(_whole, node, len(self.nodes)), "a whole cluster")

    async def owner(self, key: str) -> Node:
        """Return the server that has the slot of the key, as the first one that runs knows it."""
        running = next(node for node in self.nodes if node.pid is not None)
        slot = await running.command("CLUSTER", "KEYSLOT", key)
        for first, last, (_, port, *_), *_ in await running.command("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == port)
        raise RuntimeError(f"nobody has the slot {slot}")

    def replica_of(self, primary: Node) -> Node:
        """Return the server that follows this one since the start."""
        return self.replicas[self.primaries.index(primary)]

    async def taken_over(self, primary: Node) -> None:
        """Wait until the replica of a primary, which is away, has its slots, and the others know it."""
        replica, rest = self.replica_of(primary), [node for node in self.nodes if node is not primary]

        async def took() -> bool:
            if not await replica.takes_writes():
                return False
            return all([await _whole(node, len(self.nodes)) for node in rest])

        await soon(took, "taken over")

    async def move(self, key: str, to: Node) -> None:
        """Move the slot of the key, with all its keys, to another primary, as a reshard does."""
        owner = await self.owner(key)
        slot = await owner.command("CLUSTER", "KEYSLOT", key)
        ids = {node: await node.command("CLUSTER", "MYID") for node in (owner, to)}
        await to.command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[owner])
        await owner.command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[to])
        while keys := await owner.command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            login = ("AUTH", owner.password)
            await owner.command("MIGRATE", "127.0.0.1", to.port, "", 0, 30_000, *login, "KEYS", *keys)
        for node in (to, owner, *(one for one in self.primaries if one not in {to, owner})):
            await node.command("CLUSTER", "SETSLOT", slot, "NODE", ids[to])

    async def close(self) -> None:
        """End all at once, and remove their folders."""
        for node in self.nodes:
            await node.close()


class _Member(Node):
    """A server of a cluster."""

    def _lines(self, *, encrypted: bool) -> Sequence[str]:
        return [
            "cluster-enabled yes",
            f"cluster-port {self.bus_port}",
            "cluster-node-timeout 2000",
            "cluster-replica-validity-factor 0",
            *super()._lines(encrypted=encrypted),
        ]


async def _whole(node: Node, size: int) -> bool:
    told: str = await node.command("CLUSTER", "INFO")
    return "cluster_state:ok" in told and f"cluster_known_nodes:{size}\r" in told


async def in_container() -> Server:
    """Start Valkey in a container. Testcontainers' reaper ends it after the tests."""
    # Not tried yet: no machine that ran these tests had Docker. A container has no levers, so tests that need one skip.
    from testcontainers.core.container import DockerContainer

    container = DockerContainer(_IMAGE).with_exposed_ports(6379).start()
    host, port = container.get_container_host_ip(), int(container.get_exposed_port(6379))
    server = Server(
        f"redis://{host}:{port}/0", why_no_levers="Redis runs in a container, which these tests can't stop and start"
    )
    async with asyncio.timeout(_BOOT_S):
        while True:
            with contextlib.suppress(*_AWAY):
                await server.command("PING")
                return server
            await asyncio.sleep(0.1)


Found: TypeAlias = Server | Installation
"""A running server that isn't ours, or the program to run some."""


def choose() -> Choice[Found]:
    """Return the Redis to use, without starting or downloading anything.

    In this order: the server of LEVERET_TEST_REDIS; the Debian suite that LEVERET_REDIS_SUITE names (bookworm: Redis 7.0,
    trixie: Valkey 8); a local server; Docker; bookworm's as an unpacked package.
    """
    if url := os.environ.get("LEVERET_TEST_REDIS"):
        why = "LEVERET_TEST_REDIS names a foreign server, which the tests must not stop"
        return Choice(f"{redact(url)} (LEVERET_TEST_REDIS)", lambda: Server(url, why_no_levers=why))
    if suite := os.environ.get("LEVERET_REDIS_SUITE"):
        return Choice(package(suite), partial(unpacked_installation, suite))
    if local := local_installation():
        return Choice(f"private servers of {local.tools}/{local.program}", lambda: local)
    if has_docker():
        return Choice(f"a container of {_IMAGE}, pulled if it isn't here", lambda: asyncio.run(in_container()))
    return Choice(package("bookworm"), unpacked_installation)


def find_redis() -> Found:
    """Return what `choose` chooses; Unavailable if it can't be had."""
    return choose().find()
