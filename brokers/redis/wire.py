"""One connection to a Redis server: commands go out in order, replies come back in order, and notices come between them.

It parses with hiredis and needs no other client library: redis-py takes 10 MB and 0.3 s of each process, and its cluster client
sends a command again by itself, which publishes a job twice if the command was a script.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias, cast, final

import hiredis
import msgspec

Part: TypeAlias = bytes | str | int
"""A word of a command."""
_NOTHING: Final = object()
_ANSWERS: Final = (b"ssubscribe", b"sunsubscribe")


@final
class Refused(Exception):
    """An error reply of the server: the command wasn't executed, or a script stopped where it says."""

    @property
    def code(self) -> str:
        """The first word of the error: "OOM", "MOVED", "ERR"."""
        return str(self).partition(" ")[0]


@final
class Lost(ConnectionError):
    """The connection ended: nobody knows which of the unanswered commands were executed."""


@final
class Script:
    """A Lua script; a server that doesn't know its digest gets the text first."""

    __slots__ = ("begin", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.begin: bytes = packed_words(("EVALSHA", digest))
        """The first two words of each call."""


def packed_words(parts: Iterable[Part]) -> bytes:
    """Return words as the protocol writes them, without the count that begins a command."""
    words: list[bytes] = []
    for part in parts:
        word = part if isinstance(part, bytes) else str(part).encode()
        words.append(b"$%d\r\n%b\r\n" % (len(word), word))
    return b"".join(words)


def packed(*parts: Part) -> bytes:
    """Return a command as the protocol writes it."""
    return b"*%d\r\n%b" % (len(parts), packed_words(parts))


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """What a server said of itself; None for what it doesn't let us read."""

    product: str = ""
    version: tuple[int, int] = (0, 0)
    run_id: str = ""
    """Another one after each restart; empty if it says none."""
    aof: bool | None = None
    """Whether it writes an append-only file."""
    sync: str | None = None
    """When it syncs that file: always (before it answers), everysec or no."""
    policy: str | None = None
    replicas: int | None = None

    def __str__(self) -> str:
        return f"{self.product} {self.version[0]}.{self.version[1]}"

    @property
    def syncs(self) -> bool:
        """Whether each answer comes after the write is on the disk."""
        return bool(self.aof and self.sync == "always")


@final
class Wire(asyncio.Protocol):
    """An open connection. The loop calls the methods from `connection_made` to `connection_lost`."""

    def __init__(self) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Ends when the connection does."""
        self.server = Server()
        """What the server said of itself when it was connected to."""
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader(replyError=Refused, notEnoughData=_NOTHING)
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._channels: dict[bytes, Callable[[bytes], object]] = {}
        self._subscribing: set[asyncio.Future[Any]] = set()
        """The futures of commands that a push answers."""
        self._loop = asyncio.get_running_loop()

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self.lost.done()

    def call(self, *parts: Part) -> asyncio.Future[Any]:
        """Send a command, and return the future of its reply: `Refused` if it is an error, `Lost` if the connection ends before."""
        return self.send(packed(*parts))

    def send(self, command: bytes) -> asyncio.Future[Any]:
        """Send a command that is packed already. Calls without an await between them reach the server in one piece."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._transport is None or self.lost.done():
            future.set_exception(Lost("the connection is closed"))
        else:
            self._waiting.append(future)
            self._transport.write(command)
        return future

    async def evaluate(self, script: Script, words: bytes, count: int) -> Any:
        """Call `script` with `count` packed words, of which the first is the number of keys. A script that isn't loaded is loaded first."""
        command = b"*%d\r\n%b%b" % (count + 2, script.begin, words)
        try:
            return await self.send(command)
        except Refused as error:
            if error.code != "NOSCRIPT":
                raise
            await self.call("SCRIPT", "LOAD", script.text)
            return await self.send(command)

    async def subscribe(self, channel: bytes, notice: Callable[[bytes], object]) -> None:
        """Call `notice` with each message of a sharded channel, and with b"" once if the server ends the subscription."""
        self._channels[channel] = notice
        try:
            await self._send_for_push("SSUBSCRIBE", channel)
        except Refused:
            self._channels.pop(channel, None)
            raise

    async def unsubscribe(self, channel: bytes) -> None:
        """End a subscription."""
        if self._channels.pop(channel, None) is not None:
            await self._send_for_push("SUNSUBSCRIBE", channel)

    def _send_for_push(self, verb: str, channel: bytes) -> asyncio.Future[Any]:
        future = self.call(verb, channel)
        if not future.done():
            self._subscribing.add(future)
        return future

    def close(self, why: str = "the connection was given up") -> None:
        """End the connection at once; what is unanswered ends as `Lost`."""
        self._end(why)
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's doesn't inherit from it

    def data_received(self, data: bytes) -> None:
        """As `asyncio.Protocol`."""
        reader = self._reader
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _NOTHING:
                if isinstance(reply, hiredis.PushNotification):
                    self._push(reply)
                elif isinstance(reply, Refused):
                    self._refuse(reply)
                else:
                    self._answer(reply)
        except (hiredis.HiredisError, IndexError) as error:
            self.close(f"the server's answer can't be read: {error}")

    def _answer(self, reply: Any) -> None:
        future = self._waiting.popleft()
        if not future.done():  # its caller may have stopped waiting
            future.set_result(reply)

    def _refuse(self, error: Refused) -> None:
        future = self._waiting.popleft()
        self._subscribing.discard(future)
        if not future.done():
            future.set_exception(error)

    def _push(self, push: list[Any]) -> None:
        kind = push[0]
        if kind == b"smessage" and (notice := self._channels.get(push[1])) is not None:
            notice(push[2])
        elif self._waiting and self._waiting[0] in self._subscribing and kind in _ANSWERS:
            self._subscribing.discard(self._waiting[0])
            self._answer(None)
        elif kind == b"sunsubscribe" and (notice := self._channels.pop(push[1], None)) is not None:
            notice(b"")  # the slot has moved to another server

    def connection_lost(self, exc: Exception | None) -> None:
        """As `asyncio.Protocol`."""
        self._end(f"the connection was lost: {exc}" if exc else "the server closed the connection")

    def _end(self, why: str) -> None:
        if self.lost.done():
            return
        self.lost.set_result(None)
        for future in self._waiting:
            if not future.done():
                future.set_exception(Lost(why))
        self._waiting.clear()
        channels, self._channels = self._channels, {}
        for notice in channels.values():
            notice(b"")
