"""AMQP 0-9-1 frames. Hot methods (deliver, content, confirms, publish, acks) are parsed and built here, all others by pamqp.

    frame   = type octet, channel short, size long, payload, frame-end octet 0xCE           (section 4.2.3)
    content = a method frame, one header frame (class, weight, body size, properties), body frames until the size is reached

The parser takes the bytes of the socket, cut anywhere. For any input, it either calls a `Receiver` or raises `ProtocolError`,
which has the code for closing the connection (section 4.10.2).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Protocol, cast

import pamqp.frame
from pamqp import commands
from pamqp.base import Frame

FRAME_END = 0xCE
OVERHEAD = 8
"""Octets of a frame besides its payload."""
PROPERTIES_OVERHEAD = OVERHEAD + 12
"""Octets of a header frame besides its properties: class, weight and body size, too."""
_MAX_NESTING = 32

_METHOD, _HEADER, _BODY, _HEARTBEAT = 1, 2, 3, 8
_DELIVER, _RETURN, _ACK, _NACK, _GET_OK = (struct.pack(">HH", 60, method) for method in (60, 50, 80, 120, 71))
_frame_head = struct.Struct(">BHI")
_u64 = struct.Struct(">Q")
_unpack_head = _frame_head.unpack_from
_content_head = struct.Struct(">BHIHHQ")
_unpack_content = _content_head.unpack_from
_CONTENT_HEAD = _content_head.size
"""Octets of a header frame before its property flags."""
_unpack_u64 = _u64.unpack_from
_END = b"\xce"

HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"
PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"


class ProtocolError(Exception):
    """The peer broke the protocol; `code` is the reply code for closing the connection."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Receiver(Protocol):
    """Receives the parsed methods and messages; its methods must not block or raise."""

    def on_method(self, channel: int, method: Frame) -> None:
        """A method that isn't on a hot path."""
        ...

    def on_confirm(self, channel: int, tag: int, multiple: bool, ack: bool) -> None:
        """A basic.ack or basic.nack by the broker, for a publish."""
        ...

    def on_deliver(
        self, channel: int, consumer: bytes, tag: int, redelivered: bool, properties: bytes, body: bytes
    ) -> None:
        """A whole basic.deliver; `properties` are the flags and values of the header frame, still encoded."""
        ...

    def on_got(self, channel: int, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        """A whole basic.get-ok."""
        ...

    def on_return(self, channel: int, code: int, text: str, key: bytes, properties: bytes) -> None:
        """A whole basic.return: no queue took the message."""
        ...


class _Content:
    """An incomplete content: the arguments of its method, its properties, and the body so far."""

    __slots__ = ("body", "method", "properties", "size")

    def __init__(self, method: tuple[Any, ...]) -> None:
        self.method = method
        self.properties: bytes | None = None
        self.size = 0
        self.body = bytearray()


class Parser:
    """Cuts a stream of octets into frames, and passes their methods and messages to a `Receiver`.

    `frame_max` is the largest frame that is accepted, 0 for any. `body_max` is the largest body that is kept in memory: a
    longer one is a protocol error too, since a broker of 4.x never sends one.
    """

    __slots__ = ("_contents", "_receiver", "_rest", "body_max", "frame_max")

    def __init__(self, receiver: Receiver, *, frame_max: int = 131_072, body_max: int = 1 << 29) -> None:
        self._receiver = receiver
        self._rest = b""
        self._contents: dict[int, _Content] = {}
        self.frame_max = frame_max
        self.body_max = body_max

    def forget(self, channel: int) -> None:
        """Drop the incomplete content of `channel`, which was closed."""
        self._contents.pop(channel, None)

    def feed(self, data: bytes) -> None:  # noqa: C901, PLR0915 - one loop: a call per frame costs as much as its parse
        """Parse received bytes; a ProtocolError ends the connection."""
        if self._rest:
            data = self._rest + data
        position, size = 0, len(data)
        contents, receiver = self._contents, self._receiver
        largest = self.frame_max - OVERHEAD if self.frame_max else 1 << 32
        whole = min(largest, self.body_max)
        try:
            while size - position >= OVERHEAD:
                kind, channel, length = _unpack_head(data, position)
                if length > largest or kind not in _KINDS:
                    self._refuse(kind, length, data[position : position + 8])
                start = position + 7
                end = start + length
                if end >= size:
                    break
                if data[end] != FRAME_END:
                    raise ProtocolError(501, f"a frame of {length} octets on channel {channel} doesn't end with 0xCE")
                if kind == _METHOD:
                    if channel in contents:
                        raise ProtocolError(505, f"a method on channel {channel} in the middle of a content")
                    method = data[start : start + 4]
                    if method == _DELIVER:
                        at = start + 5 + data[start + 4]
                        consumer = data[start + 5 : at]
                        if at + 9 > end:
                            raise ProtocolError(502, "a basic.deliver that ends too early")
                        tag, redelivered = _unpack_u64(data, at)[0], data[at + 8] & 1
                        # Nearly always the whole delivery is here, in three frames, and needs no joining. Any other case
                        # takes the general path below, which also reports the errors.
                        if size - end > _CONTENT_HEAD:
                            kind, on, length, _, _, body_size = _unpack_content(data, end + 1)
                            ends = end + 8 + length
                            if (
                                kind == _HEADER
                                and on == channel
                                and 14 <= length <= largest
                                and 0 < body_size <= whole
                                and size - ends > OVERHEAD
                            ):
                                kind, on, length = _unpack_head(data, ends + 1)
                                last = ends + 8 + length
                                if (
                                    kind == _BODY
                                    and on == channel
                                    and length == body_size
                                    and last < size
                                    and data[ends] == FRAME_END == data[last]
                                ):
                                    receiver.on_deliver(
                                        channel,
                                        consumer,
                                        tag,
                                        bool(redelivered),
                                        data[end + 20 : ends],
                                        data[ends + 8 : last],
                                    )
                                    position = last + 1
                                    continue
                        contents[channel] = _Content((consumer, tag, redelivered))
                    elif method in (_ACK, _NACK):
                        if length < 13:
                            raise ProtocolError(502, "a confirm that ends too early")
                        receiver.on_confirm(
                            channel, _unpack_u64(data, start + 4)[0], bool(data[start + 12] & 1), method == _ACK
                        )
                    elif method == _RETURN:
                        contents[channel] = _Content(_returned(data[start:end]))
                    elif method == _GET_OK:
                        contents[channel] = _Content((_unpack_u64(data, start + 4)[0], data[start + 12] & 1))
                    else:
                        receiver.on_method(channel, _method(data[position : end + 1]))
                elif kind == _HEADER:
                    content = contents.get(channel)
                    if content is None or content.properties is not None:
                        raise ProtocolError(505, f"a content header on channel {channel} without its method")
                    if length < 14:
                        raise ProtocolError(502, "a content header that ends too early")
                    content.size = _unpack_u64(data, start + 4)[0]
                    if content.size > self.body_max:
                        raise ProtocolError(501, f"a body of {content.size} octets; the limit is {self.body_max}")
                    content.properties = data[start + 12 : end]
                    if not content.size:
                        del contents[channel]
                        self._complete(channel, content, b"")
                elif kind == _BODY:
                    content = contents.get(channel)
                    if content is None or content.properties is None:
                        raise ProtocolError(505, f"a content body on channel {channel} without its header")
                    if length == content.size and not content.body:
                        del contents[channel]
                        self._complete(channel, content, data[start:end])
                    else:
                        content.body += data[start:end]
                        if len(content.body) >= content.size:
                            if len(content.body) > content.size:
                                raise ProtocolError(501, f"a body longer than the {content.size} octets in its header")
                            del contents[channel]
                            self._complete(channel, content, bytes(content.body))
                elif length or channel:
                    raise ProtocolError(501, "a heartbeat with a payload or a channel")
                position = end + 1
        except (IndexError, struct.error) as error:
            raise ProtocolError(502, f"a frame whose fields don't fit into it: {error}") from error
        self._rest = data[position:] if position else data

    def _complete(self, channel: int, content: _Content, body: bytes) -> None:
        properties = content.properties or b""
        if len(content.method) == 3:
            consumer, tag, redelivered = content.method
            self._receiver.on_deliver(channel, consumer, tag, bool(redelivered), properties, body)
        elif len(content.method) == 2:
            tag, redelivered = content.method
            self._receiver.on_got(channel, tag, bool(redelivered), properties, body)
        else:
            code, text, _, key = content.method
            self._receiver.on_return(channel, code, text, key, properties)

    def _refuse(self, kind: int, length: int, head: bytes) -> None:
        if head[:4] == b"AMQP":
            raise ProtocolError(501, f"the peer speaks another version of AMQP: it answered {head!r}")
        if kind not in _KINDS:
            raise ProtocolError(501, f"no AMQP frame begins with {head!r}; is this an AMQP port?")
        raise ProtocolError(501, f"a frame of {length} octets; the limit is {self.frame_max}")


_KINDS = frozenset((_METHOD, _HEADER, _BODY, _HEARTBEAT))


def _method(frame: bytes) -> Frame:
    try:
        _, _, method = pamqp.frame.unmarshal(frame)
    except Exception as error:  # pamqp raises its own errors, struct.error, KeyError, UnicodeDecodeError …
        raise ProtocolError(502, f"a method that can't be read: {error!r:.120}") from error
    if not isinstance(method, Frame):
        raise ProtocolError(502, f"a method frame that holds {type(method).__name__}")
    return method


def _returned(payload: bytes) -> tuple[int, str, bytes, bytes]:
    code = int.from_bytes(payload[4:6], "big")
    at, texts = 6, list[bytes]()
    for _ in range(3):
        until = at + 1 + payload[at]
        if until > len(payload):
            raise ProtocolError(502, "a basic.return that ends too early")
        texts.append(payload[at + 1 : until])
        at = until
    return code, texts[0].decode("utf-8", "replace"), texts[1], texts[2]


def method_frame(channel: int, method: Frame) -> bytes:
    """Return the frame of a method that isn't on a hot path."""
    return pamqp.frame.marshal(method, channel)


def publish_frame(channel: int, exchange: str, key: str) -> bytes:
    """Return the method frame of a mandatory basic.publish; callers keep it, since every publish to the same key uses the same frame."""
    return method_frame(channel, commands.Basic.Publish(exchange=exchange, routing_key=key, mandatory=True))


_pack_content = _content_head.pack
_end_and_body = struct.Struct(">BBHI").pack
"""The end of a frame, and the head of the body frame after it."""


def content_frames(channel: int, properties: bytes, body: bytes, frame_max: int) -> list[bytes | memoryview]:
    """Return the pieces of the header frame and of the body frames, each within `frame_max`; the writer joins them."""
    size = len(body)
    head = _pack_content(_HEADER, channel, 12 + len(properties), 60, 0, size)
    room = frame_max - OVERHEAD if frame_max else size
    if 0 < size <= room:
        return [head, properties, _end_and_body(FRAME_END, _BODY, channel, size), body, _END]
    out: list[bytes | memoryview] = [head, properties]
    view = memoryview(body)
    for at in range(0, size, room or 1):
        piece = view[at : at + room]
        out += (_end_and_body(FRAME_END, _BODY, channel, len(piece)), piece)
    out.append(_END)
    return out


_ack = struct.Struct(">BHIHHQBB").pack


def ack_frame(channel: int, tag: int, *, multiple: bool) -> bytes:
    """Return a basic.ack."""
    return _ack(_METHOD, channel, 13, 60, 80, tag, multiple, FRAME_END)


def nack_frame(channel: int, tag: int) -> bytes:
    """Return a basic.nack that requeues one delivery."""
    return _ack(_METHOD, channel, 13, 60, 120, tag, 0b10, FRAME_END)


def reject_frame(channel: int, tag: int) -> bytes:
    """Return a basic.reject that dead-letters one delivery."""
    return _ack(_METHOD, channel, 13, 60, 90, tag, 0, FRAME_END)


# In the order of the wire, with their flag bits (section 4.2.6.1).
CONTENT_TYPE, CONTENT_ENCODING, HEADERS, DELIVERY_MODE, PRIORITY = 1 << 15, 1 << 14, 1 << 13, 1 << 12, 1 << 11
CORRELATION_ID, REPLY_TO, EXPIRATION, MESSAGE_ID, TIMESTAMP = 1 << 10, 1 << 9, 1 << 8, 1 << 7, 1 << 6
TYPE, USER_ID, APP_ID, CLUSTER_ID, _MORE = 1 << 5, 1 << 4, 1 << 3, 1 << 2, 1


_LENGTHS = [bytes((length,)) for length in range(256)]


def short(text: str) -> bytes:
    """Return a shortstr; ValueError above 255 bytes."""
    raw = text.encode()
    if len(raw) > 255:
        msg = f"{text[:40]!r}… has {len(raw)} bytes; AMQP's short strings have at most 255"
        raise ValueError(msg)
    return _LENGTHS[len(raw)] + raw


_TEXTS = ((CORRELATION_ID, "correlation_id"), (REPLY_TO, "reply_to"), (EXPIRATION, "expiration"))


def decode_properties(raw: bytes) -> dict[str, Any]:  # noqa: PLR0915 - the properties of section 4.2.6.1 in turn
    """Return the properties by AMQP's names; `headers` as the table's octets, `timestamp` in Unix seconds.

    ValueError for text that isn't UTF-8 or lengths that don't fit: the body is still whole, only the properties can't be read.
    """
    found: dict[str, Any] = {}
    try:
        flags = raw[0] << 8 | raw[1]
        at = 2
        if flags & _MORE:
            msg = "more than 15 property flags"
            raise ValueError(msg)
        if flags & CONTENT_TYPE:
            end = at + 1 + raw[at]
            found["content_type"] = raw[at + 1 : end].decode()
            at = end
        if flags & CONTENT_ENCODING:
            end = at + 1 + raw[at]
            found["content_encoding"] = raw[at + 1 : end].decode()
            at = end
        if flags & HEADERS:
            end = at + 4 + int.from_bytes(raw[at : at + 4], "big")
            found["headers"] = raw[at + 4 : end]
            at = end
        if flags & DELIVERY_MODE:
            at += 1
        if flags & PRIORITY:
            found["priority"] = raw[at]
            at += 1
        if flags & (CORRELATION_ID | REPLY_TO | EXPIRATION):
            for flag, name in _TEXTS:
                if flags & flag:
                    end = at + 1 + raw[at]
                    found[name] = raw[at + 1 : end].decode()
                    at = end
        if flags & MESSAGE_ID:
            end = at + 1 + raw[at]
            found["message_id"] = raw[at + 1 : end].decode()
            at = end
        if flags & TIMESTAMP:
            found["timestamp"] = _unpack_u64(raw, at)[0]
            at += 8
        if flags & TYPE:
            end = at + 1 + raw[at]
            found["type"] = raw[at + 1 : end].decode()
            at = end
        if flags & USER_ID:
            at += 1 + raw[at]
        if flags & APP_ID:
            end = at + 1 + raw[at]
            found["app_id"] = raw[at + 1 : end].decode()
            at = end
        if flags & CLUSTER_ID:
            at += 1 + raw[at]
    except (IndexError, struct.error):
        msg = "they end too early"
        raise ValueError(msg) from None
    if at > len(raw):
        msg = "they end too early"
        raise ValueError(msg)
    return found


def table_of(octets: bytes) -> Mapping[str, Any]:
    """Return the table in `octets` (without its length); ValueError if it can't be read."""
    from pamqp import decode

    try:
        _, table = decode.field_table(len(octets).to_bytes(4, "big") + octets)
    except Exception as error:
        msg = f"the headers table can't be read: {error!r:.120}"
        raise ValueError(msg) from error
    _check_nesting(table, _MAX_NESTING)
    return table


def _check_nesting(value: Mapping[str, Any] | list[Any], left: int) -> None:
    """Raise ValueError for a table that is nested so deeply that encoding it again would end in a RecursionError."""
    if not left:
        msg = f"the headers table is nested more than {_MAX_NESTING} levels deep"
        raise ValueError(msg)
    for inner in value.values() if isinstance(value, Mapping) else value:
        if isinstance(inner, (Mapping, list)):
            _check_nesting(cast("Mapping[str, Any] | list[Any]", inner), left - 1)


def message_id_of(raw: bytes) -> str | None:
    """Return the message id in encoded properties; None if they have none or can't be read."""
    try:
        found = decode_properties(raw)
    except ValueError:
        return None
    return found.get("message_id")
