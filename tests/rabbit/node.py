"""RabbitMQ nodes as plain child processes: find, start, kill and pause them; nothing is installed or left behind."""

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from leveret.settings import redact
from tests import nodes
from tests.nodes import (
    Choice,
    Unavailable,
    free_ports,
    has_docker,
    kill_group,
    spawn,
    tail,
    unpack,
    unpacks,
    why_not_up,
)

_AMQP_HEADER = b"AMQP\x00\x00\x09\x01"
_BOOT_S = 90.0
_IMAGE = "rabbitmq:4"
_HELP = "set LEVERET_TEST_AMQP to a URL, install rabbitmq-server, start Docker, or be root on Debian"

SUITES = {"3.10": "bookworm", "4.0": "trixie", "4.3": "forky"}
"""The versions that the tests run on, and the Debian suite that has each."""

# Erlang that a node runs at its start. It listens on 127.0.0.1, evaluates what each connection sends, and answers "ok" or "error" and a term.
_CONSOLE = """
Answer = fun(Text) ->
    try
        {{ok, Tokens, _}} = erl_scan:string(unicode:characters_to_list(Text)),
        {{ok, Expressions}} = erl_parse:parse_exprs(Tokens),
        {{value, Value, _}} = erl_eval:exprs(Expressions, []),
        io_lib:format("ok ~0tp", [Value])
    catch _:Reason -> io_lib:format("error ~0tp", [Reason])
    end
end,
spawn(fun() ->
    Options = [binary, {{packet, 4}}, {{active, false}}, {{reuseaddr, true}}, {{ip, {{127, 0, 0, 1}}}}],
    {{ok, Listening}} = gen_tcp:listen({port}, Options),
    Serve = fun Serve() ->
        {{ok, Socket}} = gen_tcp:accept(Listening),
        spawn(Serve),
        case gen_tcp:recv(Socket, 0) of
            {{ok, Text}} -> gen_tcp:send(Socket, unicode:characters_to_binary(Answer(Text)));
            _ -> closed
        end
    end,
    spawn(Serve),
    receive after infinity -> ok end
end).
"""


class Rabbit(nodes.Server):
    """A RabbitMQ for tests: `url` always works; the levers work only if the tests own the process (`Node`)."""

    async def flush(self) -> None:
        """Write the list of quorum queues to disk. Call before `kill9`, or RabbitMQ forgets queues declared in the last second."""
        self._no_lever()

    async def ctl(self, *arguments: str, timeout_s: float = 60) -> str:
        """Run rabbitmqctl, which takes 1 to 2 s, and return its output; RuntimeError with its stderr if it fails."""
        self._no_lever()

    async def eval(self, erlang: str) -> str:
        """Evaluate Erlang in the node, within milliseconds, and return its value; RuntimeError if it raises."""
        self._no_lever()

    async def close_connections(self, why: str = "a test closes all connections") -> None:
        """Close all connections, as an administrator may (320, CONNECTION_FORCED)."""
        await self.eval(f'rabbit_networking:close_connections(rabbit_networking:connections(), "{why}").')

    async def stop_queue(self, queue: str) -> None:
        """Stop this node's member of a quorum queue: on a single node, or on two of three, the queue then has no leader."""
        await self.eval(f"ra:stop_server(quorum_queues, {_member(queue)}).")

    async def start_queue(self, queue: str) -> None:
        """End `stop_queue`."""
        await self.eval(f"ra:restart_server(quorum_queues, {_member(queue)}).")

    async def limit_consumers(self, timeout_s: float) -> None:
        """Set the node's consumer timeout for channels that are opened from now on, looked at each second; 1800 is RabbitMQ's own."""
        await self.eval(
            f"application:set_env(rabbit, consumer_timeout, {timeout_s * 1000:.0f}),"
            " application:set_env(rabbit, channel_tick_interval, 1000)."
        )

    async def limit_messages(self, octets: int) -> None:
        """Refuse larger messages, as the node's max_message_size does: 406 once a publisher has sent the whole body."""
        await self.eval(
            f"application:set_env(rabbit, max_message_size, {octets}), persistent_term:put(max_message_size, {octets})."
        )

    async def alarm(self, *, on: bool) -> None:
        """Raise or clear the memory alarm: while it lasts, connections that publish are blocked, and nothing tells those that don't ask."""
        limit = "1MB" if on else "1GB"
        await self.eval(f'vm_memory_monitor:set_vm_memory_high_watermark({{absolute, "{limit}"}}).')
        async with asyncio.timeout(20):
            while ("memory" in await self.eval("rabbit_alarm:get_alarms().")) is not on:
                await asyncio.sleep(0.02)  # the node measures its memory from time to time

    async def limit_connections(self, count: int, *, of: Literal["user", "vhost"]) -> None:
        """Let the user guest, or the default vhost, have so many connections: the next one is refused."""
        limits = f'<<"{{\\"max-connections\\": {count}}}">>'
        await self.eval(
            f'ok = rabbit_auth_backend_internal:set_user_limits(<<"guest">>, {limits}, <<"test">>).'
            if of == "user"
            else f'ok = rabbit_vhost_limit:parse_set(<<"/">>, {limits}, <<"test">>).'
        )

    async def set_policy(self, name: str, pattern: str, definition: Mapping[str, int | str]) -> None:
        """Set an operator's policy for the queues whose name matches `pattern`."""
        given = json.dumps(json.dumps(definition))  # as a string of Erlang's
        await self.eval(
            f'ok = rabbit_policy:parse_set(<<"/">>, <<"{name}">>, <<"{pattern}">>, <<{given}>>, 0, <<"queues">>, <<"test">>).'
        )

    async def clear_policy(self, name: str) -> None:
        """End `set_policy`."""
        await self.eval(f'ok = rabbit_policy:delete(<<"/">>, <<"{name}">>, <<"test">>).')


@dataclass(frozen=True)
class Installation(nodes.Installation):
    """RabbitMQ's programs: `tools` is the folder of rabbitmq-server and rabbitmqctl."""

    @property
    def version(self) -> str:
        """RabbitMQ's version, such as 4.0.5, by the name of the folder of its code; empty where that isn't Debian's."""
        code = Path(f"{self.root or ''}{self.tools}").parent / "lib"
        return next((found.name.partition("-")[2] for found in code.glob("rabbitmq_server-*")), "")


@dataclass(frozen=True)
class Place:
    """Where a node runs, and as whom its peers know it."""

    node: str = "test@localhost"
    address: str = "127.0.0.1"
    enter: tuple[str, ...] = ()  # the command that runs another in the node's network namespace
    cookie: str = field(default_factory=lambda: base64.b32encode(os.urandom(15)).decode())
    epmd_port: int | None = None  # the same on all nodes of a cluster; a free one if None
    ticktime_s: int = 60  # a peer that is silent for so long counts as down; RabbitMQ's own


class Node(Rabbit):
    """A private node on free ports, with its own folder and its own epmd. Only processes that it started get signals.

    The process is this thread's child and dies with it, even if the tests are killed (on Linux with `setpriv`).
    """

    def __init__(
        self,
        installation: Installation,
        *,
        conf: Mapping[str, str] | None = None,
        advanced: Mapping[str, int] | None = None,
        plugins: Sequence[str] = (),
        place: Place | None = None,
    ) -> None:
        place = place or Place()
        self.port, self._dist_port, self._epmd_port, self._ctl_port, self._console_port = free_ports(5)
        self._epmd_port = place.epmd_port or self._epmd_port
        super().__init__(f"amqp://guest:guest@{place.address}:{self.port}/")
        self.name = place.node
        self._installation = installation
        self._place = place
        self._process: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="leveret-rabbit-"))
        for name in ("data", "log", "gen", "schema"):
            (self.folder / name).mkdir()
        cookie = self.folder / ".erlang.cookie"
        cookie.write_text(place.cookie)
        cookie.chmod(0o400)
        settings = {
            "listeners.tcp.default": f"{place.address}:{self.port}",
            "loopback_users": "none",
            "disk_free_limit.absolute": "50MB",
            "vm_memory_high_watermark.absolute": "1GB",
            "log.console": "false",
            "log.file.level": "info",
            **(conf or {}),
        }
        (self.folder / "rabbitmq.conf").write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
        terms = ", ".join(f"{{{key}, {value}}}" for key, value in (advanced or {}).items())
        (self.folder / "advanced.config").write_text(f"[{{rabbit, [{terms}]}}].\n")
        (self.folder / "plugins").write_text(f"[{','.join(plugins)}].\n")
        (self.folder / "console").write_text(_CONSOLE.format(port=self._console_port))

    @property
    def pid(self) -> int | None:
        """The process id of the Erlang machine; None while it doesn't run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    async def start(self) -> None:
        """Start the node with its old data, and return once AMQP answers. A running node is left alone."""
        if self.pid is not None:
            return
        if self._epmd is None:  # before the node, which would start an epmd daemon that nobody ends
            epmd = "epmd" if self._installation.root is None else "/usr/bin/epmd"
            self._epmd = self._spawn(epmd, "-port", str(self._epmd_port), "-address", self._place.address)
            await self._until_answers(self._epmd, self._epmd_port, b"")
        self._process = self._spawn(f"{self._installation.tools}/rabbitmq-server")
        await self._until_answers(self._process, self.port, _AMQP_HEADER)
        if not self._place.enter:
            await self._until_answers(self._process, self._console_port, b"")

    async def stop(self) -> None:
        """Stop the node as an administrator would; kill it after 60 s."""
        if self._process is not None and self.pid is not None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, 60)
            except subprocess.TimeoutExpired:
                await self.kill9()

    async def kill9(self) -> None:
        """Stop the node as a power cut would: none of its code runs. Its data stays for the next `start`; see `flush`."""
        if self._process is not None:
            kill_group(self._process)

    async def flush(self) -> None:
        """Write the list of quorum queues to disk. Call before `kill9`, or RabbitMQ forgets queues declared in the last second."""
        # Seen on 3.10, 4.0 and 4.3: 300 of 300 confirmed messages lost where the kill came within a second of the declare.
        await self.eval("[dets:sync(Table) || Table <- dets:all()].")

    def pause(self) -> None:
        """Hang the node: connections stay up, and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """End `pause`."""
        self._signal(signal.SIGCONT)

    async def ctl(self, *arguments: str, timeout_s: float = 60) -> str:
        """Run rabbitmqctl, which takes 1 to 2 s, and return its output; RuntimeError with its stderr if it fails."""
        command = self._installation.argv(self.folder, f"{self._installation.tools}/rabbitmqctl", "-q", *arguments)
        process = await asyncio.create_subprocess_exec(
            *self._place.enter,
            *command,
            env=self._environ(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(timeout_s):
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if process.returncode:
            msg = f"rabbitmqctl {' '.join(arguments)} ended with {process.returncode}: {err.decode(errors='replace').strip()[-600:]}"
            raise RuntimeError(msg)
        return out.decode()

    async def eval(self, erlang: str) -> str:
        """Evaluate Erlang in the node, within milliseconds, and return its value; RuntimeError if it raises."""
        if self._place.enter:  # its 127.0.0.1 isn't ours
            return (await self.ctl("eval", erlang)).rstrip("\n")
        async with asyncio.timeout(60):
            reader, writer = await asyncio.open_connection("127.0.0.1", self._console_port)
            try:
                writer.write(len(erlang.encode()).to_bytes(4, "big") + erlang.encode())
                size = int.from_bytes(await reader.readexactly(4), "big")
                verdict, _, value = (await reader.readexactly(size)).decode().partition(" ")
            finally:
                writer.transport.abort()
        if verdict != "ok":
            msg = f"{erlang} ended with {value}"
            raise RuntimeError(msg)
        return value

    async def close(self) -> None:
        """End the node and its epmd at once, and remove its folder."""
        for process in (self._process, self._epmd):
            if process is not None:
                kill_group(process)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        if self.pid is not None:
            os.kill(self.pid, number)

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        argv = [*self._place.enter, *self._installation.argv(self.folder, *command)]
        return spawn(argv, env=self._environ(), output=self.folder / "stdout")

    async def _until_answers(self, process: subprocess.Popen[bytes], port: int, header: bytes) -> None:
        if failed := await why_not_up(process, partial(_answers, self._place.address, port, header), _BOOT_S):
            log = tail(self.folder / "stdout", *sorted((self.folder / "log").glob("*.log")))
            await self.close()
            raise RuntimeError(f"RabbitMQ on port {port} {failed}: {log}")

    def _environ(self) -> dict[str, str]:
        inside = self._installation.inside(self.folder)
        interface = f"-kernel inet_dist_use_interface {{{self._place.address.replace('.', ',')}}}"
        console = f'-eval file:script("{inside}/console")'  # an argument: the start script splits at blanks
        return {
            "PATH": os.environ["PATH"] if self._installation.root is None else "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": inside,
            "LANG": "C.UTF-8",
            "RUNNING_UNDER_SYSTEMD": "true",  # the start script then execs: the child is the Erlang machine itself
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": self._place.address,
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_USE_LONGNAME": "true" if "." in self.name else "false",
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_CONFIG_FILE": f"{inside}/rabbitmq.conf",
            "RABBITMQ_CONF_ENV_FILE": f"{inside}/none",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{inside}/advanced.config",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{inside}/plugins",
            "RABBITMQ_MNESIA_BASE": f"{inside}/data",
            "RABBITMQ_LOG_BASE": f"{inside}/log",
            "RABBITMQ_PID_FILE": f"{inside}/pid",
            "RABBITMQ_GENERATED_CONFIG_DIR": f"{inside}/gen",
            "RABBITMQ_SCHEMA_DIR": f"{inside}/schema",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"{interface} net_ticktime {self._place.ticktime_s} +S 2:2 {console}",
            "RABBITMQ_CTL_ERL_ARGS": f"{interface} +S 1:1",
            "RABBITMQ_CTL_DIST_PORT_MIN": str(self._ctl_port),
            "RABBITMQ_CTL_DIST_PORT_MAX": str(self._ctl_port + 10),
        }


def _member(queue: str) -> str:
    """Return the Erlang term that names this node's member of a quorum queue of the default vhost."""
    return f'{{list_to_atom("%2F_{queue}"), node()}}'


async def _answers(host: str, port: int, header: bytes) -> bool:
    """Return whether the port accepts connections and, if `header` is AMQP's, answers with Connection.Start."""
    try:
        async with asyncio.timeout(1):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(header)
                return not header or await reader.read(1) == b"\x01"
            finally:
                writer.transport.abort()
    except (OSError, TimeoutError):
        return False


def local_installation() -> Installation | None:
    """Return this machine's rabbitmq-server; None if it has none."""
    # Debian's /usr/sbin/rabbitmq-server is a wrapper that only root or the user rabbitmq may run; everybody may run the script that it calls.
    if Path("/usr/lib/rabbitmq/bin/rabbitmq-server").exists():
        return Installation("/usr/lib/rabbitmq/bin")
    server = shutil.which("rabbitmq-server")
    return Installation(str(Path(server).resolve().parent)) if server else None


def unpacked_root(version: str) -> Path:
    """Return the folder that Debian's package is unpacked into."""
    cache = os.environ.get("LEVERET_RABBIT_CACHE") or Path.home() / ".cache" / "leveret-rabbit"
    return Path(cache, SUITES[version])


def installation_of(version: str) -> Installation:
    """Return RabbitMQ `version`, one of `SUITES`: this machine's own if it is that one, else Debian's, unpacked at first use.

    Raises:
        Unavailable: No such version is known, or it can't be had here; the message says which version and why.
    """
    if (local := local_installation()) and local.version.startswith(f"{version}."):
        return local
    if version not in SUITES:
        msg = f"no RabbitMQ {version}: the tests know {', '.join(SUITES)}"
        raise Unavailable(msg)
    if not unpacks():
        msg = f"no RabbitMQ {version}: {_HELP}"
        raise Unavailable(msg)
    root = unpack(f"RabbitMQ {version}", unpacked_root(version), SUITES[version], "rabbitmq-server")
    return Installation("/usr/lib/rabbitmq/bin", root)


async def in_container() -> Rabbit:
    """Start RabbitMQ in a container. Testcontainers' reaper ends it after the tests."""
    # Not tried yet: no machine that ran these tests had Docker. A container has no levers, so tests that need one skip.
    from testcontainers.core.container import DockerContainer

    container = DockerContainer(_IMAGE).with_exposed_ports(5672).start()
    host, port = container.get_container_host_ip(), int(container.get_exposed_port(5672))
    async with asyncio.timeout(_BOOT_S):
        while not await _answers(host, port, _AMQP_HEADER):
            await asyncio.sleep(0.1)
    url = f"amqp://guest:guest@{host}:{port}/"
    return Rabbit(url, why_no_levers="RabbitMQ runs in a container, which these tests can't stop and start")


def choose() -> Choice[Rabbit | Installation]:
    """Return the RabbitMQ to use, without starting or downloading anything.

    In this order: the broker of LEVERET_TEST_AMQP; the version that LEVERET_TEST_RABBIT names (3.10, 4.0 or 4.3);
    a local rabbitmq-server; Docker; 3.10 as an unpacked package.
    """
    if url := os.environ.get("LEVERET_TEST_AMQP"):
        why = "LEVERET_TEST_AMQP names a foreign broker, which the tests must not stop"
        return Choice(f"{redact(url)} (LEVERET_TEST_AMQP)", lambda: Rabbit(url, why_no_levers=why))
    version = os.environ.get("LEVERET_TEST_RABBIT") or "3.10"
    local = local_installation()
    if local and ("LEVERET_TEST_RABBIT" not in os.environ or local.version.startswith(f"{version}.")):
        return Choice(f"private nodes of {local.tools}", lambda: local)
    if "LEVERET_TEST_RABBIT" not in os.environ and has_docker():
        return Choice(f"a container of {_IMAGE}, pulled if it isn't here", lambda: asyncio.run(in_container()))
    return Choice(_package(version), partial(installation_of, version))


def _package(version: str) -> str:
    if not unpacks() or version not in SUITES:
        return f"none of {version}, so the tests that need one are skipped, or fail with CI=true\n{_HELP}"
    root = unpacked_root(version)
    there = (root / ".ready").exists()
    what = (
        "private nodes of Debian's package" if there else "Debian's package, downloaded by the first test that needs it"
    )
    return f"{version}: {what}, in\n{root} (239 MB; to remove it: rm -r that folder)"


def find_rabbit() -> Rabbit | Installation:
    """Return what `choose` chooses; Unavailable if it can't be had."""
    return choose().find()
