"""Octets that nobody vouches for, into the parser of frames: `python -m tests.property.fuzz`, or `make fuzz`.

Half of them are real frames with damages, which reach deep; the rest is noise, most of it behind a true frame head. Each stream comes in pieces
of any size. For each, the parser may call its receiver or raise ProtocolError with a reason; it may not hang, keep what it was fed, or fail otherwise.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator

import pamqp.frame
from pamqp import commands
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from leveret.brokers.rabbitmq.frames import OVERHEAD, Parser, ProtocolError, decode_properties, table_of

BODY_MAX, FRAME_MAX = 1 << 16, 1 << 14
_SLOW_S = 5.0
"""Thousands of times what any stream takes here: a piece that takes longer hangs."""
_CODES = {501, 502, 503, 504, 505}

_PROPERTIES = commands.Basic.Properties(
    content_type="application/json",
    headers={"x-death": [{"queue": "emails", "count": 3}], "nested": {"a": {"b": [1, True, None, 2.5]}}},
    delivery_mode=2,
    priority=5,
    correlation_id="c",
    expiration="250",
    message_id="id-1",
    message_type="a.b",
)
_METHODS: tuple[Frame, ...] = (
    commands.Connection.Start(server_properties={"product": "RabbitMQ", "capabilities": {"basic.nack": True}}),
    commands.Connection.Tune(2047, 131_072, 60),
    commands.Connection.OpenOk(),
    commands.Connection.Blocked(reason="low on memory"),
    commands.Connection.Unblocked(),
    commands.Connection.Close(320, "CONNECTION_FORCED", 0, 0),
    commands.Channel.OpenOk(),
    commands.Channel.Close(404, "NOT_FOUND", 60, 20),
    commands.Queue.DeclareOk(queue="emails", message_count=1, consumer_count=2),
    commands.Queue.DeleteOk(message_count=1),
    commands.Basic.ConsumeOk(consumer_tag="c1"),
    commands.Basic.Cancel(consumer_tag="c1"),
    commands.Basic.GetEmpty(),
    commands.Basic.Ack(delivery_tag=3, multiple=True),
    commands.Basic.Nack(delivery_tag=4, multiple=False),
    commands.Confirm.SelectOk(),
)
_CONTENTS: tuple[Frame, ...] = (
    commands.Basic.Deliver("c1", 7, redelivered=True, exchange="lv.jobs", routing_key="emails.normal"),
    commands.Basic.GetOk(8, redelivered=False, exchange="", routing_key="emails", message_count=4),
    commands.Basic.Return(312, "NO_ROUTE", "lv.jobs", "gone.normal"),
)


class _Receiver:
    """Counts what it hears, and decodes the properties of each message as a consumer does."""

    def __init__(self) -> None:
        self.heard = Counter[str]()

    def on_method(self, channel: int, method: Frame) -> None:
        self.heard["method"] += 1

    def on_confirm(self, channel: int, tag: int, multiple: bool, ack: bool) -> None:
        self.heard["confirm"] += 1

    def on_deliver(
        self, channel: int, consumer: bytes, tag: int, redelivered: bool, properties: bytes, body: bytes
    ) -> None:
        self._message("deliver", properties, body)

    def on_got(self, channel: int, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        self._message("get", properties, body)

    def on_return(self, channel: int, code: int, text: str, key: bytes, properties: bytes) -> None:
        self._message("return", properties, b"")

    def _message(self, kind: str, properties: bytes, body: bytes) -> None:
        assert len(body) <= BODY_MAX
        self.heard[kind] += 1
        try:
            if table := decode_properties(properties).get("headers"):
                table_of(table)
        except ValueError:  # such a job is buried with its body
            self.heard["unreadable properties"] += 1


def _frames(chance: random.Random) -> bytes:
    """Return some real frames, as pamqp builds them."""
    octets = bytearray()
    for _ in range(chance.randrange(1, 8)):
        channel = chance.choice((0, 1, 2, 65535))
        if chance.random() < 0.5:
            method = chance.choice(_METHODS)
            octets += pamqp.frame.marshal(Heartbeat() if chance.random() < 0.1 else method, channel)
        else:
            body = chance.randbytes(chance.choice((0, 1, 14, 300, 5000)))
            octets += pamqp.frame.marshal(chance.choice(_CONTENTS), channel)
            octets += pamqp.frame.marshal(ContentHeader(body_size=len(body), properties=_PROPERTIES), channel)
            step = chance.choice((100, FRAME_MAX - OVERHEAD))
            for at in range(0, len(body), step):
                octets += pamqp.frame.marshal(ContentBody(body[at : at + step]), channel)
    return bytes(octets)


def _damaged(octets: bytes, chance: random.Random) -> bytes:
    """Return the octets with some changed, some gone, some twice, or the rest missing."""
    damaged = bytearray(octets)
    for _ in range(chance.randrange(4)):
        at, length = chance.randrange(len(damaged) + 1), chance.choice((1, 1, 2, 4, 8, 50))
        match chance.randrange(5):
            case 0:
                damaged[at : at + length] = chance.randbytes(length)
            case 1:
                del damaged[at : at + length]
            case 2:
                damaged[at:at] = damaged[at : at + length]
            case 3:
                damaged[at : at + length] = bytes([chance.choice((0, 1, 0x7F, 0x80, 0xCE, 0xFF))]) * length
            case _:
                del damaged[len(damaged) - chance.randrange(min(len(damaged), 50) + 1) :]
    return bytes(damaged)


def _noise(chance: random.Random) -> bytes:
    """Return noise, or a frame whose head and end are right."""
    noise = chance.randbytes(chance.randrange(2000))
    if chance.random() < 0.2:
        return noise
    head = bytes([chance.choice((1, 2, 3, 8))]) + chance.choice((0, 1, 65535)).to_bytes(2, "big")
    known = chance.choice(((10, 10), (20, 40), (60, 60), (60, 50), (60, 80), (60, 0), (50, 11)))
    payload = b"".join(part.to_bytes(2, "big") for part in known) * (chance.random() < 0.7) + noise
    return head + len(payload).to_bytes(4, "big") + payload + b"\xce"


def _streams(chance: random.Random) -> Iterator[bytes]:
    while True:
        yield _damaged(_frames(chance), chance) if chance.random() < 0.5 else _noise(chance)


def fuzz(octets: int, seed: int) -> Counter[str]:
    """Feed `octets` to parsers; return what was heard and refused. AssertionError, with the seed and the place, for what may not be."""
    chance, fed, streams = random.Random(seed), 0, 0
    receiver = _Receiver()
    for stream in _streams(chance):
        parser, began, streams = Parser(receiver, frame_max=FRAME_MAX, body_max=BODY_MAX), time.monotonic(), streams + 1
        place = f"seed {seed}, stream {streams}, {stream[:60].hex()}…"
        at = 0
        try:
            while at < len(stream):
                piece = stream[at : at + chance.choice((1, 7, 100, 1400, 1 << 20))]
                at += len(piece)
                parser.feed(piece)
                kept = len(parser._rest) + sum(len(one.body) for one in parser._contents.values())
                assert kept <= FRAME_MAX + 4 * BODY_MAX, f"{place}: {kept} octets are kept"
        except ProtocolError as error:
            if error.code not in _CODES or not str(error):
                raise AssertionError(f"{place}: closed with {error.code} {error}") from error
            receiver.heard[f"refused {error.code}"] += 1
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{place}: {error!r}") from error
        assert time.monotonic() - began < _SLOW_S, f"{place}: it takes {time.monotonic() - began:.1f} s"
        fed += at
        if fed >= octets:
            return receiver.heard + Counter(octets=fed, streams=streams)
    raise AssertionError("unreachable")


def main() -> int:
    """Fuzz, and print what was reached."""
    parser = argparse.ArgumentParser(prog="python -m tests.property.fuzz", description=__doc__)
    parser.add_argument("--octets", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    began = time.monotonic()
    for what, count in sorted(fuzz(arguments.octets, arguments.seed).items()):
        print(f"{what:24}{count:12}")
    print(f"{time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
