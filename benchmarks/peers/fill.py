"""Fills a queue with copies of a message, faster than any peer publishes: one socket, frames marshalled once."""

from __future__ import annotations

import socket
import struct
from typing import Any
from urllib.parse import unquote, urlsplit

from pamqp import body as content
from pamqp import commands, frame, header

WINDOW = 2000
FRAME_BYTES = 131_072 - 8
_METHOD, _ACK, _CLASS = 1, 80, 60


class Wire:
    """A plain AMQP connection with one channel in confirm mode."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "amqp":
            msg = f"benchmarks fill queues over amqp:// only, not {parts.scheme}://"
            raise ValueError(msg)
        self._socket = socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 5672), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self._socket.sendall(b"AMQP\x00\x00\x09\x01")
        self.server: dict[str, Any] = self._expect(commands.Connection.Start).server_properties
        response = f"\0{unquote(parts.username or 'guest')}\0{unquote(parts.password or 'guest')}"
        self._send(0, commands.Connection.StartOk({}, "PLAIN", response, "en_US"))
        self._expect(commands.Connection.Tune)
        self._send(0, commands.Connection.TuneOk(8, 131_072, 0))
        self._send(0, commands.Connection.Open(unquote(parts.path[1:]) or "/"))
        self._expect(commands.Connection.OpenOk)
        self._send(1, commands.Channel.Open())
        self._expect(commands.Channel.OpenOk)
        self._send(1, commands.Confirm.Select())
        self._expect(commands.Confirm.SelectOk)
        self._published = 0
        self._low = 0
        self._confirmed: set[int] = set()

    def _send(self, channel: int, method: Any) -> None:
        self._socket.sendall(frame.marshal(method, channel))

    def _frame(self) -> tuple[int, bytes]:
        while len(self._buffer) < 7 or len(self._buffer) < 8 + int.from_bytes(self._buffer[3:7], "big"):
            if not (received := self._socket.recv(1 << 16)):
                msg = "the broker closed the connection"
                raise ConnectionError(msg)
            self._buffer += received
        end = 7 + int.from_bytes(self._buffer[3:7], "big")
        kind, payload = self._buffer[0], self._buffer[: end + 1]
        self._buffer = self._buffer[end + 1 :]
        return kind, payload

    def _expect(self, method: type) -> Any:
        _, raw = self._frame()
        got = frame.unmarshal(raw)[2]
        if not isinstance(got, method):
            msg = f"the broker sent {got!r}, not {method.__name__}"
            raise ConnectionError(msg)
        return got

    def _confirm(self) -> None:
        kind, raw = self._frame()
        if kind != _METHOD or struct.unpack_from(">HH", raw, 7) != (_CLASS, _ACK):
            msg = f"a copy wasn't confirmed: the broker sent {frame.unmarshal(raw)[2]!r}"
            raise ConnectionError(msg)
        tag, multiple = struct.unpack_from(">QB", raw, 11)
        self._confirmed.update(range(self._low + 1, tag + 1) if multiple else (tag,))
        while self._low + 1 in self._confirmed:
            self._low += 1
            self._confirmed.discard(self._low)

    @property
    def _open(self) -> int:
        return self._published - self._low - len(self._confirmed)

    def fill(self, queue: str, properties: commands.Basic.Properties, body: bytes, copies: int) -> None:
        """Publish `copies`, each with a message id of its own where the message has one; return when all are confirmed."""
        head = frame.marshal(commands.Basic.Publish(routing_key=queue, mandatory=True), 1)
        bodies = b"".join(
            frame.marshal(content.ContentBody(body[at : at + FRAME_BYTES]), 1)
            for at in range(0, len(body), FRAME_BYTES)
        )
        first = properties.message_id
        plain = frame.marshal(header.ContentHeader(0, len(body), properties), 1)
        batch = max(1, min(100, (1 << 20) // len(body)))
        for begun in range(0, copies, batch):
            some: list[bytes] = []
            for n in range(begun, min(copies, begun + batch)):
                described = plain
                if first:
                    properties.message_id = f"{first}-{n}"
                    described = frame.marshal(header.ContentHeader(0, len(body), properties), 1)
                some += (head, described, bodies)
                self._published += 1
            self._socket.sendall(b"".join(some))
            while self._open >= WINDOW:
                self._confirm()
        while self._open:
            self._confirm()
        properties.message_id = first

    def close(self) -> None:
        """Close the connection."""
        self._send(0, commands.Connection.Close(200, "done", 0, 0))
        self._expect(commands.Connection.CloseOk)
        self._socket.close()
