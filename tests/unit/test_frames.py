"""AMQP frames: recorded octets in and out, cut anywhere, fuzzed; the parser calls its receiver or raises ProtocolError."""

from __future__ import annotations

import contextlib
import itertools
import random
from typing import Any

import pamqp.frame
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp import commands
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from leveret.brokers.frames import (
    FRAME_MIN,
    HEARTBEAT,
    OVERHEAD,
    Parser,
    ProtocolError,
    ack_frame,
    content_frames,
    nack_frame,
    publish_frame,
    reject_frame,
)


class Heard:
    """A receiver that writes down what it hears."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_method(self, channel: int, method: Frame) -> None:
        self.events.append(("method", channel, method.name, dict(method)))

    def on_confirm(self, channel: int, tag: int, multiple: bool, ack: bool) -> None:
        self.events.append(("confirm", channel, tag, multiple, ack))

    def on_deliver(self, channel: int, consumer: bytes, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        self.events.append(("deliver", channel, consumer, tag, redelivered, properties, body))

    def on_got(self, channel: int, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        self.events.append(("got", channel, tag, redelivered, properties, body))

    def on_return(self, channel: int, code: int, text: str, exchange: bytes, key: bytes, properties: bytes) -> None:
        self.events.append(("return", channel, code, text, exchange, key, properties))


def parse(*pieces: bytes, frame_max: int = 131_072) -> list[tuple[Any, ...]]:
    """Return what a receiver hears of `pieces`."""
    heard = Heard()
    parser = Parser(heard, frame_max=frame_max)
    for piece in pieces:
        parser.feed(piece)
    return heard.events


def marshal(frame: Any, channel: int = 1) -> bytes:
    """Return a frame as pamqp, an implementation of its own, builds it."""
    return pamqp.frame.marshal(frame, channel)


PROPERTIES = commands.Basic.Properties(content_type="application/json", delivery_mode=2, message_id="id-1", message_type="a.b")


def content(method: Frame, body: bytes, channel: int = 1, step: int = 1 << 20) -> bytes:
    """Return a whole content as pamqp builds it, its body in frames of `step`."""
    frames = [marshal(method, channel), marshal(ContentHeader(body_size=len(body), properties=PROPERTIES), channel)]
    frames += [marshal(ContentBody(body[at : at + step]), channel) for at in range(0, len(body), step)]
    return b"".join(frames)


RAW_PROPERTIES = PROPERTIES.marshal()
DELIVER = commands.Basic.Deliver(consumer_tag="c1", delivery_tag=7, redelivered=True, exchange="lv.jobs", routing_key="emails.normal")
RETURN = commands.Basic.Return(reply_code=312, reply_text="NO_ROUTE", exchange="lv.jobs", routing_key="gone.normal")
STREAM = b"".join(
    [
        marshal(commands.Channel.OpenOk(), 1),
        content(DELIVER, b'{"order_id":7}'),
        marshal(Heartbeat(), 0),
        marshal(commands.Basic.Ack(delivery_tag=3, multiple=True), 2),
        content(DELIVER, b""),
        content(RETURN, b"x" * 300, 2, step=100),
        marshal(commands.Basic.Nack(delivery_tag=4, multiple=False), 2),
        content(DELIVER, bytes(range(256)) * 20, 3, step=1000),
        marshal(commands.Basic.Cancel(consumer_tag="c1"), 1),
        marshal(commands.Connection.Blocked(reason="low on memory"), 0),
    ]
)
HEARD = [
    ("method", 1, "Channel.OpenOk", {"channel_id": "0"}),
    ("deliver", 1, b"c1", 7, True, RAW_PROPERTIES, b'{"order_id":7}'),
    ("confirm", 2, 3, True, True),
    ("deliver", 1, b"c1", 7, True, RAW_PROPERTIES, b""),
    ("return", 2, 312, "NO_ROUTE", b"lv.jobs", b"gone.normal", RAW_PROPERTIES),
    ("confirm", 2, 4, False, False),
    ("deliver", 3, b"c1", 7, True, RAW_PROPERTIES, bytes(range(256)) * 20),
    ("method", 1, "Basic.Cancel", {"consumer_tag": "c1", "nowait": False}),
    ("method", 0, "Connection.Blocked", {"reason": "low on memory"}),
]


def test_a_recorded_delivery_is_read_octet_for_octet() -> None:
    """Every field that a handler or an ack needs comes from these octets, as RabbitMQ 3.10.8 sent them."""
    assert parse(STREAM) == HEARD


def test_contents_of_several_channels_may_be_interleaved() -> None:
    """The protocol allows it (section 4.2.6): one channel's body would end up in another's job."""
    one, two = content(DELIVER, b"1" * 10, 1, step=5), content(DELIVER, b"2" * 10, 2, step=5)
    cut_one, cut_two = len(one) - 13, len(two) - 13
    events = parse(one[:cut_one], two[:cut_two], one[cut_one:], two[cut_two:])
    assert [(event[1], event[6]) for event in events] == [(1, b"1" * 10), (2, b"2" * 10)]


def test_the_stream_may_be_cut_at_every_place() -> None:
    """TCP cuts where it likes: a frame in two reads would be lost, or read as another."""
    for cut in range(len(STREAM) + 1):
        assert parse(STREAM[:cut], STREAM[cut:]) == HEARD, cut


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_the_stream_may_be_cut_at_any_places(cuts: list[int]) -> None:
    """The same, in many pieces, empty ones too."""
    edges = [0, *sorted(cuts), len(STREAM)]
    assert parse(*(STREAM[a:b] for a, b in itertools.pairwise(edges))) == HEARD


def test_octet_by_octet() -> None:
    """The slowest link there is."""
    assert parse(*(STREAM[at : at + 1] for at in range(len(STREAM)))) == HEARD


def feed_whatever(octets: bytes) -> None:
    """Feed octets that nobody vouches for; anything but ProtocolError is a bug."""
    with contextlib.suppress(ProtocolError):
        Parser(Heard(), body_max=1 << 20).feed(octets)


@given(st.binary(max_size=200))
def test_any_octets_are_parsed_or_a_protocol_error(octets: bytes) -> None:
    """A broken broker, or a port that isn't AMQP's, would crash the process instead of closing a connection."""
    feed_whatever(octets)


@settings(max_examples=300)
@given(st.integers(0, len(STREAM) - 1), st.integers(0, 255), st.integers(0, len(STREAM) - 1), st.integers(0, 255))
def test_a_damaged_stream_is_parsed_or_a_protocol_error(at: int, octet: int, also_at: int, also: int) -> None:
    """Real frames with a wrong octet reach deeper than random ones."""
    damaged = bytearray(STREAM)
    damaged[at], damaged[also_at] = octet, also
    feed_whatever(bytes(damaged))


def test_a_million_damaged_octets_hang_nothing() -> None:
    """A hang here is a worker that is stuck."""
    chance = random.Random(7)
    for _ in range(1500):
        damaged = bytearray(STREAM)
        for _ in range(chance.randrange(1, 6)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        feed_whatever(bytes(damaged))


@pytest.mark.parametrize(
    ("octets", "code", "says"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", 501, "is that port AMQP's"),
        (b"AMQP\x00\x01\x00\x00", 501, "another version"),
        (b"\x01\x00\x01\x7f\xff\xff\xff\x00", 501, "the agreed limit"),
        (marshal(Heartbeat(), 0)[:-1] + b"\x00", 501, "doesn't end with 0xCE"),
        (marshal(ContentBody(b"x"), 1), 505, "without its header"),
        (marshal(ContentHeader(body_size=1, properties=PROPERTIES), 1), 505, "without its method"),
        (marshal(DELIVER, 1) + marshal(commands.Channel.OpenOk(), 1), 505, "in the middle of a content"),
        (content(DELIVER, b"xx")[:-10] + marshal(ContentBody(b"xxx"), 1), 501, "longer than the 2 octets"),
        (b"\x01\x00\x01\x00\x00\x00\x04\x00\x3c\x00\x3c\xce", 502, "ends too early"),
        (b"\x01\x00\x01\x00\x00\x00\x04\x00\x3c\x00\x50\xce", 502, "a confirm that ends too early"),
        (b"\x01\x00\x01\x00\x00\x00\x04\x00\x99\x00\x99\xce", 502, "can't be read"),
        (b"\x08\x00\x00\x00\x00\x00\x01x\xce", 501, "heartbeat with a payload"),
    ],
)
def test_a_broken_protocol_has_its_code(octets: bytes, code: int, says: str) -> None:
    """The reason in the broker's log and in ours is what finds the fault."""
    with pytest.raises(ProtocolError, match=says) as broken:
        parse(octets)
    assert broken.value.code == code


def test_a_body_above_the_limit_is_refused_before_it_is_kept() -> None:
    """A broken size would fill the memory."""
    parser = Parser(Heard(), body_max=100)
    with pytest.raises(ProtocolError, match="the limit is 100"):
        parser.feed(content(DELIVER, b"x" * 101))


def frames_of(octets: bytes) -> list[tuple[int, Any]]:
    """Return the frames in `octets`, read by pamqp."""
    found: list[tuple[int, Any]] = []
    while octets:
        size, channel, frame = pamqp.frame.unmarshal(octets)
        found.append((channel, frame))
        octets = octets[size:]
    return found


@pytest.mark.parametrize("size", [0, 1, FRAME_MIN - OVERHEAD - 1, FRAME_MIN - OVERHEAD, FRAME_MIN - OVERHEAD + 1, 3 * FRAME_MIN])
def test_a_body_is_split_at_frame_max(size: int) -> None:
    """One octet too much and the broker closes the connection with 501."""
    body = bytes(at % 251 for at in range(size))
    octets = publish_frame(5, "lv.jobs", "emails.normal") + b"".join(content_frames(5, RAW_PROPERTIES, body, FRAME_MIN))
    (_, method), (_, header), *bodies = frames_of(octets)
    assert (method.exchange, method.routing_key, method.mandatory) == ("lv.jobs", "emails.normal", True)
    assert header.body_size == size
    assert header.properties.message_id == "id-1"
    assert b"".join(frame.value for _, frame in bodies) == body
    assert all(len(frame.value) + OVERHEAD <= FRAME_MIN for _, frame in bodies)


def test_settlements_are_what_pamqp_reads() -> None:
    """A wrong bit acks everything, or requeues what was to be dead-lettered."""
    (_, one), (_, many), (_, back), (_, dead) = frames_of(
        ack_frame(3, 9, multiple=False) + ack_frame(3, 10, multiple=True) + nack_frame(3, 11) + reject_frame(3, 12)
    )
    assert (one.name, one.delivery_tag, one.multiple) == ("Basic.Ack", 9, False)
    assert (many.name, many.delivery_tag, many.multiple) == ("Basic.Ack", 10, True)
    assert (back.name, back.delivery_tag, back.multiple, back.requeue) == ("Basic.Nack", 11, False, True)
    assert (dead.name, dead.delivery_tag, dead.requeue) == ("Basic.Reject", 12, False)
    assert frames_of(HEARTBEAT)[0][1].name == "Heartbeat"
