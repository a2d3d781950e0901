"""A process's access to Redis: it finds the server for a key, connects to it, and says what its errors mean.

There is one connection for each server that is needed, and all queues share it. It is opened at first use and anew after a loss.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from binascii import crc_hqx
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final, Literal, TypeAlias, cast, final

from leveret.errors import BrokerUnavailable, ConfigurationError, LeveretError
from leveret.runtime import Runtime
from leveret.waits import first_of

from .address import Address, Node, shown
from .wire import Part, Refused, Server, Wire

log = logging.getLogger("leveret.redis")

_OLDEST: Final = (7, 0)
_WAITS_FOR_DISK: Final = (7, 2)
"""The first version that has WAITAOF."""
_SLOTS: Final = 16384
_SILENT_S: Final = 1.0
"""A server that is silent to TLS for this long is asked whether it speaks without, seconds."""

Meaning: TypeAlias = Literal["lost", "moved", "busy", "full", "blocked", "wrong"]
"""What an error says of the command and of the server:

- lost: the connection can't be used any more. If it was lost under a command, nobody knows whether that was executed.
- moved: nothing was executed; the server for the key is another one now.
- busy: nothing was executed, and another try in a moment will do.
- full: nothing was executed: the server has no memory left.
- blocked: nothing was executed: the server takes no writes now.
- wrong: waiting won't help.
"""
_CODES: Final[dict[str, Meaning]] = {
    "MOVED": "moved",
    "CLUSTERDOWN": "moved",
    "READONLY": "moved",
    "LOADING": "moved",
    "MASTERDOWN": "moved",
    "ASK": "busy",
    "TRYAGAIN": "busy",
    "BUSY": "busy",
    "OOM": "full",
    "MISCONF": "blocked",
    "NOREPLICAS": "blocked",
    "UNBLOCKED": "lost",
    "NOPERM": "wrong",
    "WRONGPASS": "wrong",
    "NOAUTH": "wrong",
    "WRONGTYPE": "wrong",
}
_NOAUTH: Final = "NOAUTH: the server wants a password, and the URL has none for it (a sentinel's is sentinel_password=)"
_WRONG_BY_WORDS: Final = (
    "unknown command",
    "user_script",
    "can't run this command",
    "DB index",
    "without any password",
)
"""What a server says under the code that it has for all other errors."""


def meaning_of(error: Exception) -> Meaning | None:
    """Return what an error of a connection says; None if it isn't one."""
    if isinstance(error, ConfigurationError):
        return "wrong"
    if isinstance(error, Refused):
        return _CODES.get(error.code) or (
            "wrong" if any(words in str(error) for words in _WRONG_BY_WORDS) else "blocked"
        )
    return "lost" if isinstance(error, (OSError, EOFError, LeveretError)) else None  # TimeoutError is an OSError


def tag_of(key: str) -> str:
    """Return the part of a key that decides on its slot."""
    found = re.search(r"\{([^}]+)\}", key)
    return key if found is None else found[1]


@final
class Link:
    """The connections to the servers of `address`. `name` is what the servers' lists of clients show."""

    def __init__(self, address: Address, runtime: Runtime, *, name: str = "leveret") -> None:
        self.address = address
        self.server: Server | None = None
        """What the last server that was connected to said of itself; None before the first connection."""
        self._runtime = runtime
        self._name = name
        self._wires: dict[tuple[Node, str], Wire] = {}
        self._opening: dict[tuple[Node, str], asyncio.Task[Wire]] = {}
        self._slots: list[tuple[int, int, Node]] = []
        """The ranges of a cluster's slots, each with its server."""
        self._seen: tuple[Node, ...] = ()
        """The servers of the cluster that were known last: those of the URL may be gone."""
        self._primary: Node | None = None
        self._asking = asyncio.Lock()
        self._answered: Node | None = None
        """The sentinel or node that said last where the servers are."""
        self._said: set[str] = set()

    @property
    def synced(self) -> bool:
        """Whether the server that was connected to last syncs its disk before it answers, and so do the others of a cluster."""
        if self.server is None:
            return False
        return self.server.syncs and all(wire.server.syncs for wire in self._wires.values() if not wire.closed)

    @property
    def silence(self) -> str:
        """What to say of a server that didn't answer a new connection in time."""
        hint = "" if self.address.tls is None else "; if it speaks no TLS, begin its URL with redis instead of rediss"
        return f"no answer in time{hint}"

    async def wire(self, key: str, *, alone: bool = False) -> Wire:
        """Return the connection to the server of `key`; with `alone` one that no other key uses, since its commands wait.

        Raises ConfigurationError if waiting won't help, else BrokerUnavailable, within the setting `connect_timeout_s`.
        """
        tag = tag_of(key)
        return await self._to((await self._node(tag), tag if alone else ""))

    async def primaries(self) -> Sequence[Node]:
        """Return the nodes of a cluster that have slots."""
        await self._node("")
        return self._seen

    async def to(self, node: Node) -> Wire:
        """Return the connection to a node of a cluster. Raises as `wire`."""
        return await self._to((node, ""))

    async def _to(self, place: tuple[Node, str]) -> Wire:
        found = self._wires.get(place)
        if found is not None and not found.closed:
            return found
        task = self._opening.get(place)
        if task is None:
            task = self._opening[place] = asyncio.get_running_loop().create_task(self._open(place))
            task.add_done_callback(lambda ended: self._opened(place, ended))
        return await asyncio.shield(task)

    def known(self, key: str, *, alone: bool = False) -> Wire | None:
        """Return the connection to the server of `key`, if it is open; it costs nothing."""
        tag = tag_of(key)
        node = self._owner(tag) if self.address.kind == "cluster" else self._primary
        found = None if node is None else self._wires.get((node, tag if alone else ""))
        return None if found is None or found.closed else found

    def failed(self, wire: Wire | None, error: Exception) -> None:
        """Note an error of a command on `wire`, so that the next `wire` is another one where that is needed."""
        meaning = meaning_of(error)
        if meaning == "moved":
            self._slots, self._primary = [], None
        if wire is not None and (
            meaning == "lost" or (isinstance(error, Refused) and error.code in {"READONLY", "LOADING", "MASTERDOWN"})
        ):
            wire.close()
            self._primary = None

    def close(self) -> None:
        """End all connections."""
        for task in self._opening.values():
            task.cancel()
        for wire in self._wires.values():
            wire.close()
        self._wires.clear()

    def _opened(self, place: tuple[Node, str], ended: asyncio.Task[Wire]) -> None:
        self._opening.pop(place, None)
        if not ended.cancelled() and ended.exception() is None:
            self._wires[place] = ended.result()

    async def _open(self, place: tuple[Node, str]) -> Wire:
        node, _ = place
        try:
            async with asyncio.timeout(self._runtime.settings.connect_timeout_s):
                wire, hello = await self._greet(node, self.address.user, self.address.password, self._name)
                try:
                    await self._examine(wire, node, hello)
                except BaseException:
                    wire.close()
                    raise
        except Exception as error:
            self._slots, self._primary = [], None  # another server may have taken over
            raise self._refusal(error, node) from error
        return wire

    async def _greet(
        self, node: Node, user: str | None, password: str | None, name: str
    ) -> tuple[Wire, dict[bytes, Any]]:
        """Return a new connection, and what the server says of itself."""
        wire = await self._connect(node)
        words: list[Part] = ["HELLO", 3]
        if password is not None:
            words += ["AUTH", user or "default", password]
        words += ["SETNAME", re.sub(r"[^!-~]", "-", name)]
        try:
            hello = await wire.call(*words)
            if not isinstance(hello, dict):
                msg = f"{shown(node)} answers HELLO 3 in an older protocol, as some proxies do; leveret needs Redis 7.0 or later, or Valkey"
                raise ConfigurationError(msg)
            return wire, cast("dict[bytes, Any]", hello)
        except BaseException as error:
            wire.close()
            if isinstance(error, Refused) and "unknown command" in str(error):
                msg = f"{shown(node)} doesn't know the command HELLO; leveret needs Redis 7.0 or later, or Valkey"
                raise ConfigurationError(msg) from error
            raise

    async def _connect(self, node: Node) -> Wire:
        (host, port), loop = node, asyncio.get_running_loop()
        if self.address.tls is None:
            _, wire = await loop.create_connection(Wire, host, port)
        else:
            opening = asyncio.ensure_future(loop.create_connection(Wire, host, port, ssl=self.address.tls.context()))
            await first_of(opening, self._find_no_tls(node))
            _, wire = opening.result()
        return wire

    async def _find_no_tls(self, node: Node) -> None:
        """Raise ConfigurationError if a server that is silent to TLS answers without: it waits for the rest of a command."""
        await asyncio.sleep(_SILENT_S)
        host, port = node
        with suppress(OSError):
            _, wire = await asyncio.get_running_loop().create_connection(Wire, host, port)
            try:
                with suppress(Refused):  # it may want a password
                    await wire.call("PING")
            finally:
                wire.close()
            msg = f"{shown(node)} speaks no TLS; begin its URL with redis instead of rediss"
            raise ConfigurationError(msg)
        await asyncio.get_running_loop().create_future()  # the handshake says what is wrong, or takes too long

    async def _examine(self, wire: Wire, node: Node, hello: dict[bytes, Any]) -> None:
        """Find out whether the server can be used, and how durable it is."""
        version = _version(hello.get(b"version", b""))
        if version < _OLDEST:
            msg = f"{self._at(node)} is {_text(hello, b'server')} {_text(hello, b'version')}; leveret needs Redis 7.0 or later, or Valkey"
            raise ConfigurationError(msg)
        mode = hello.get(b"mode")
        if mode == b"sentinel":
            msg = f"{self._at(node)} is a sentinel; begin its URL with redis+sentinel:// and end it with the service's name, such as /mymaster"
            raise ConfigurationError(msg)
        clustered = mode == b"cluster"
        if clustered != (self.address.kind == "cluster"):
            what, scheme = ("a node of a cluster", "redis+cluster") if clustered else ("no node of a cluster", "redis")
            msg = f"{self._at(node)} is {what}; begin its URL with {scheme}://"
            raise ConfigurationError(msg)
        if hello.get(b"role") != b"master":
            msg = f"{self._at(node)} is a replica, which takes no writes"
            raise BrokerUnavailable(msg)
        if self.address.db:
            await wire.call("SELECT", self.address.db)
        server = await self._settings(wire, _text(hello, b"server"), version)
        self._judge(server, node)
        wire.server = self.server = server

    async def _settings(self, wire: Wire, product: str, version: tuple[int, int]) -> Server:
        found: dict[bytes, bytes] = {}
        told = await info(wire, "server", "memory", "persistence", "replication")
        try:
            found = await wire.call("CONFIG", "GET", "maxmemory-policy", "appendonly", "appendfsync")
        except Refused:  # a hosted server forbids CONFIG; INFO says a part of it
            if "maxmemory_policy" in told:
                found[b"maxmemory-policy"] = told["maxmemory_policy"].encode()
            if "aof_enabled" in told:
                found[b"appendonly"] = b"yes" if told["aof_enabled"] == "1" else b"no"
        policy, aof, sync = (found.get(name) for name in (b"maxmemory-policy", b"appendonly", b"appendfsync"))
        return Server(
            product=product.capitalize(),
            version=version,
            run_id=told.get("run_id", ""),
            aof=None if aof is None else aof == b"yes",
            sync=None if sync is None else sync.decode(errors="replace"),
            policy=None if policy is None else policy.decode(errors="replace"),
            replicas=int(told["connected_slaves"]) if "connected_slaves" in told else None,
        )

    def _judge(self, server: Server, node: Node) -> None:
        """Refuse a server that would lose jobs without a word, and say what it can't promise."""
        where = self._at(node)
        if server.policy not in {None, "noeviction"}:
            msg = f"{where} has maxmemory-policy {server.policy}: it would delete jobs when its memory is full; set maxmemory-policy noeviction"
            raise ConfigurationError(msg)
        if self.address.confirm == "fsync" and not server.syncs:
            if server.aof is False:
                msg = f"{where} writes no append-only file, so confirm=fsync can't be kept; set appendonly yes, or write confirm=memory"
                raise ConfigurationError(msg)
            if server.version < _WAITS_FOR_DISK:
                msg = f"{where} is {server}, which can't wait for its disk; for confirm=fsync set appendfsync always, or take Redis 7.2 or Valkey"
                raise ConfigurationError(msg)
        unread = [
            name
            for name, value in (
                ("maxmemory-policy", server.policy),
                ("appendonly", server.aof),
                ("appendfsync", server.sync),
            )
            if value is None
        ]
        if unread:
            self._say_once(
                logging.INFO,
                f"{self.address} doesn't let CONFIG be read: nobody checked {', '.join(unread)} (jobs are safe with noeviction, yes and always)",
            )
        if server.aof is False:
            self._say_once(
                logging.WARNING,
                f"{self.address} writes no append-only file: a restart of it loses jobs; set appendonly yes",
            )
        if self.address.confirm == "replica" and server.replicas == 0:
            self._say_once(
                logging.WARNING,
                f"{where} has no replica now: with confirm=replica no job is confirmed until one has it",
            )

    def _say_once(self, level: int, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            log.log(level, "%s", line)

    def _at(self, node: Node) -> str:
        """Return the address, and which of its servers unless it names that one alone."""
        alone = self.address.nodes == (node,) and not self.address.service
        return str(self.address) if alone else f"{self.address}: {shown(node)}"

    def _refusal(self, error: Exception, node: Node) -> LeveretError:
        """Return what stands in the way of a connection, as one line: ConfigurationError where waiting won't help."""
        if isinstance(error, LeveretError):
            return type(error)(f"{self.address}: {error}") if str(self.address) not in str(error) else error
        said = " ".join(str(error).split()) or type(error).__name__
        wrong = isinstance(error, ssl.SSLError) and not isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError))
        if isinstance(error, TimeoutError):
            said = self.silence
        elif isinstance(error, Refused):
            wrong = meaning_of(error) == "wrong"
            if error.code == "NOAUTH":  # what Redis says here is about HELLO
                said = _NOAUTH
        msg = f"{self._at(node)}: {said}"
        return ConfigurationError(msg) if wrong else BrokerUnavailable(msg)

    async def _node(self, tag: str) -> Node:
        """Return the server of a tag."""
        if self.address.kind == "server":
            self._primary = self.address.nodes[0]
            return self._primary
        async with self._asking:
            if self.address.kind == "sentinel":
                if self._primary is None:
                    await self._ask_each(self._read_primary)
                assert self._primary is not None
                return self._primary
            if not self._slots:
                await self._ask_each(self._read_slots)
        owner = self._owner(tag)
        if owner is None:
            self._slots = []
            msg = f"{self.address}: no node serves the slot of {tag!r}"
            raise BrokerUnavailable(msg)
        return owner

    def _owner(self, tag: str) -> Node | None:
        slot = crc_hqx(tag.encode(), 0) % _SLOTS
        place = bisect_right(self._slots, slot, key=_first) - 1
        if place < 0 or slot > self._slots[place][1]:
            return None
        return self._slots[place][2]

    async def _ask_each(self, ask: Callable[[Node, Wire], Awaitable[bool]]) -> None:
        """Ask sentinels or nodes of a cluster one after another, until one knows the answer.

        The one that knew it last is asked last: it may be wrong for as long as the others can't reach it.
        """
        nodes = list(dict.fromkeys((*self._seen, *self.address.nodes)))
        if self._answered in nodes:
            first = nodes.index(self._answered) + 1
            nodes = nodes[first:] + nodes[:first]
        errors: list[LeveretError] = []
        limit_s = self._runtime.settings.connect_timeout_s / len(nodes)
        for node in nodes:
            try:
                async with asyncio.timeout(limit_s):
                    wire = await self._to_ask(node)
                    try:
                        if await ask(node, wire):
                            self._answered = node
                            return
                    finally:
                        wire.close()
            except Exception as error:  # noqa: BLE001 - `_refusal` sorts them
                errors.append(self._refusal(error, node))
        why = "; ".join(map(str, errors)) or f"{self.address}: nobody knows where the primary is"
        if errors and all(isinstance(error, ConfigurationError) for error in errors):
            raise ConfigurationError(why)
        raise BrokerUnavailable(why)

    async def _to_ask(self, node: Node) -> Wire:
        address = self.address
        if address.kind == "sentinel":
            user, password = address.sentinel_user, address.sentinel_password
        else:
            user, password = address.user, address.password
        wire, _ = await self._greet(node, user, password, self._name)
        return wire

    async def _read_primary(self, node: Node, wire: Wire) -> bool:
        try:
            found = await wire.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.address.service)
        except Refused as error:
            if "unknown command" in str(error):
                msg = f"{shown(node)} is no sentinel; name the sentinels, or begin the URL with redis://"
                raise ConfigurationError(msg) from error
            raise
        if found is None:
            msg = f"the sentinel knows no service {self.address.service!r}"
            raise ConfigurationError(msg)
        self._primary = bytes(found[0]).decode(), int(found[1])
        return True

    async def _read_slots(self, node: Node, wire: Wire) -> bool:
        try:
            ranges = await wire.call("CLUSTER", "SLOTS")
        except Refused as error:
            if "cluster support disabled" in str(error):
                msg = f"{self._at(node)} is no node of a cluster; begin its URL with redis://"
                raise ConfigurationError(msg) from error
            raise
        # an empty name stands for the node that was asked
        slots = [
            (first, last, (bytes(primary[0] or b"").decode() or node[0], primary[1]))
            for first, last, primary, *_ in ranges
        ]
        self._slots = sorted(slots)
        self._seen = tuple(dict.fromkeys(owner for _, _, owner in self._slots))
        return bool(self._slots)


async def info(wire: Wire, *sections: str) -> dict[str, str]:
    """Return what a server says of itself; nothing if it forbids that."""
    try:
        text: bytes = await wire.call("INFO", *sections)
    except Refused:
        return {}
    return dict(line.split(":", 1) for line in text.decode(errors="replace").splitlines() if ":" in line)


def _first(slots: tuple[int, int, Node]) -> int:
    return slots[0]


def _version(text: bytes) -> tuple[int, int]:
    numbers = [int(number) for number in re.findall(rb"\d+", text)[:2]]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)


def _text(hello: dict[bytes, Any], name: bytes) -> str:
    return bytes(hello.get(name, b"?")).decode(errors="replace")
