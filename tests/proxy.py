"""A TCP proxy that makes a link faulty: slow, dribbling, silent, cut.

async with FaultProxy(node.port) as link:     # connect the program to link.url_of(node.url)
    link.latency_s, link.jitter_s = 0.2, 0.1  # each chunk, each way
    link.rate = 32_000                        # bytes per second, each way
    link.piece, link.gap_s = 7, 0.002         # dribble: frames arrive in pieces
    link.freeze(); link.thaw()                # half-open: TCP stays up, nothing passes
    link.freeze("up")                         # one way: what the client sends is lost; "down": confirms and deliveries
    late = link.strand()                      # what the present connections send is held, also after their end, until `late.set()`
    link.reset()                              # RST to both sides of every connection
    link.turn_to(port)                        # new connections go to another server
    link.refuse = True                        # new connections are reset at once
    link.mute = True                          # new connections are accepted and never answered; those before go on
    link.cut_after("down", 1000)              # RST once 1000 more bytes went that way: in the middle of a frame
    link.freeze_after("down", 300)            # half an answer, then silence
"""

import asyncio
import contextlib
import random
import socket
import struct
from types import TracebackType
from typing import Literal, Self

from tests.nodes import url_at

Way = Literal["up", "down"]


class FaultProxy:
    """Listens on a free port of 127.0.0.1 and passes bytes on to `port` of `host`, until a lever stops it."""

    def __init__(self, port: int, *, host: str = "127.0.0.1", rng: random.Random | None = None) -> None:
        self.latency_s = self.jitter_s = self.gap_s = 0.0
        self.rate: float | None = None
        self.piece: int | None = None
        self.refuse = self.mute = False
        self.accepted = 0
        self.passed: dict[Way, int] = {"up": 0, "down": 0}
        self._target = (host, port)
        self._rng = rng or random.Random(0)
        self._open: dict[Way, asyncio.Event] = {"up": asyncio.Event(), "down": asyncio.Event()}
        self._arrival = _set()
        self._left: dict[Way, int] = {}
        self._freezing: set[Way] = set()
        self._links: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.thaw()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A connection that was accepted last has its transport and its task some turns of the loop later; asyncio leaks the
        # socket if the server is closed before that.
        self.refuse = True
        for listening in self._server.sockets:
            asyncio.get_running_loop().remove_reader(listening.fileno())
        for _ in range(5):
            await asyncio.sleep(0)
        self._server.close()
        self.reset()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def url_of(self, url: str) -> str:
        """Return a server's URL with this proxy in the place of its host and port."""
        return url_at(url, self.port)

    def freeze(self, *ways: Way) -> None:
        """Stop passing bytes, on both ways or on `ways`; connections stay up, and new ones are accepted."""
        for way in ways or ("up", "down"):
            self._open[way].clear()

    def thaw(self) -> None:
        """End `freeze`, and pass the bytes that were held."""
        for event in self._open.values():
            event.set()

    def strand(self) -> asyncio.Event:
        """Hold what the clients of the present connections send, until the returned event is set; new connections pass."""
        stranded, self._arrival = self._arrival, _set()
        stranded.clear()
        return stranded

    def reset(self) -> None:
        """Cut every connection with a RST to both sides."""
        for link in list(self._links):
            for writer in link:
                _reset(writer)

    def turn_to(self, port: int) -> None:
        """Lead new connections to another port, as an address that moves to another server does."""
        self._target = (self._target[0], port)

    def cut_after(self, way: Way, count: int) -> None:
        """Cut all connections once `count` more bytes went the way `way`; those bytes arrive."""
        self._left[way] = count
        self._freezing.discard(way)

    def freeze_after(self, way: Way, count: int) -> None:
        """Freeze the way `way` once `count` more bytes went it; those bytes arrive."""
        self._left[way] = count
        self._freezing.add(way)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # were this a coroutine, asyncio would make the task, and Python 3.11 reports the cancel of such a task as an error
        task = asyncio.create_task(self._carry_on(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            _reset(writer)
            return
        self.accepted += 1
        if self.mute:
            try:
                while await reader.read(16384):
                    pass
            finally:
                _reset(writer)
            return
        try:
            target_reader, target_writer = await asyncio.open_connection(*self._target)
        except OSError:  # the server is down
            _reset(writer)
            return
        except asyncio.CancelledError:
            _reset(writer)
            raise
        link = (writer, target_writer)
        self._links.add(link)
        try:
            await asyncio.gather(self._carry("up", reader, target_writer), self._carry("down", target_reader, writer))
        except OSError:
            self._links.discard(link)  # one side is closed; the other is closed below
        finally:
            self._links.discard(link)
            for one in link:
                one.close()

    async def _carry(self, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read at once and write when due, so that latency is added to each chunk instead of summed over all chunks."""
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)
        sending = asyncio.ensure_future(self._send(way, chunks, writer, self._arrival if way == "up" else _set()))
        try:
            while data := await reader.read(16384):
                due = asyncio.get_running_loop().time() + self.latency_s + self._rng.random() * self.jitter_s
                await chunks.put((due, data))
            await chunks.put((0.0, b""))
            await sending
        finally:
            sending.cancel()

    async def _send(
        self, way: Way, chunks: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, arrival: asyncio.Event
    ) -> None:
        loop = asyncio.get_running_loop()
        while (item := await chunks.get())[1]:
            due, data = item
            await asyncio.sleep(max(0.0, due - loop.time()))
            await self._open[way].wait()
            await arrival.wait()
            if self.rate:
                await asyncio.sleep(len(data) / self.rate)
            rest = b""
            if over := way in self._left and len(data) >= self._left[way]:
                count = self._left.pop(way)
                data, rest = data[:count], data[count:]
            elif way in self._left:
                self._left[way] -= len(data)
            await self._write(way, data, writer)
            if over and way in self._freezing:
                self.freeze(way)
                await self._open[way].wait()
                await self._write(way, rest, writer)
            elif over:
                await asyncio.sleep(0.01)  # a RST overtakes the bytes that the kernel still holds
                self.reset()
                return
        if writer.can_write_eof():
            with contextlib.suppress(OSError):
                writer.write_eof()

    async def _write(self, way: Way, data: bytes, writer: asyncio.StreamWriter) -> None:
        step = self.piece or max(len(data), 1)
        for start in range(0, len(data), step):
            writer.write(data[start : start + step])
            await writer.drain()
            if self.piece:
                await asyncio.sleep(self.gap_s)
        self.passed[way] += len(data)


def _set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.transport.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
