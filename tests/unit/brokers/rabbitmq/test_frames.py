"""AMQP frames: recorded octets in and out, cut anywhere, fuzzed; the parser calls its receiver or raises ProtocolError."""

from __future__ import annotations

import contextlib
import itertools
from datetime import datetime, timezone
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

from leveret.brokers.rabbitmq.frames import (
    HEARTBEAT,
    OVERHEAD,
    Parser,
    ProtocolError,
    ack_frame,
    content_frames,
    decode_properties,
    nack_frame,
    publish_frame,
    reject_frame,
    table_of,
)

FRAME_MIN = 4096
"""A peer must take frames of at least this size (section 4.9)."""


class Heard:
    """A receiver that writes down what it hears."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_method(self, channel: int, method: Frame) -> None:
        self.events.append(("method", channel, method.name, dict(method)))

    def on_confirm(self, channel: int, tag: int, multiple: bool, ack: bool) -> None:
        self.events.append(("confirm", channel, tag, multiple, ack))

    def on_deliver(
        self, channel: int, consumer: bytes, tag: int, redelivered: bool, properties: bytes, body: bytes
    ) -> None:
        self.events.append(("deliver", channel, consumer, tag, redelivered, properties, body))

    def on_got(self, channel: int, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        self.events.append(("got", channel, tag, redelivered, properties, body))

    def on_return(self, channel: int, code: int, text: str, key: bytes, properties: bytes) -> None:
        self.events.append(("return", channel, code, text, key, properties))


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


PROPERTIES = commands.Basic.Properties(
    content_type="application/json", delivery_mode=2, message_id="id-1", message_type="a.b"
)


def content(method: Frame, body: bytes, channel: int = 1, step: int = 1 << 20) -> bytes:
    """Return a whole content as pamqp builds it, its body in frames of `step`."""
    frames = [marshal(method, channel), marshal(ContentHeader(body_size=len(body), properties=PROPERTIES), channel)]
    frames += [marshal(ContentBody(body[at : at + step]), channel) for at in range(0, len(body), step)]
    return b"".join(frames)


RAW_PROPERTIES = PROPERTIES.marshal()
DELIVER = commands.Basic.Deliver(
    consumer_tag="c1", delivery_tag=7, redelivered=True, exchange="lv.jobs", routing_key="emails.normal"
)
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
    ("return", 2, 312, "NO_ROUTE", b"gone.normal", RAW_PROPERTIES),
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


def heard_of(pieces: list[bytes]) -> tuple[list[tuple[Any, ...]], int | None]:
    """Return what a receiver hears of `pieces`, and the code of the error that ended it."""
    heard = Heard()
    parser = Parser(heard)
    try:
        for piece in pieces:
            parser.feed(piece)
    except ProtocolError as error:
        return heard.events, error.code
    return heard.events, None


@settings(max_examples=300)
@given(st.integers(0, len(STREAM) - 1), st.integers(0, 255))
def test_a_damaged_stream_is_read_alike_whole_and_octet_by_octet(at: int, octet: int) -> None:
    """Whole deliveries are read in one go: a damage that only the general way sees would be a job with another's body."""
    damaged = bytearray(STREAM)
    damaged[at] = octet
    octets = bytes(damaged)
    assert heard_of([octets]) == heard_of([octets[at : at + 1] for at in range(len(octets))])


@pytest.mark.parametrize(
    ("octets", "code", "says"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", 501, "is this an AMQP port"),
        (b"AMQP\x00\x01\x00\x00", 501, "another version"),
        (b"\x01\x00\x01\x7f\xff\xff\xff\x00", 501, "the limit is 131072"),
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


@pytest.mark.parametrize(
    "size", [0, 1, FRAME_MIN - OVERHEAD - 1, FRAME_MIN - OVERHEAD, FRAME_MIN - OVERHEAD + 1, 3 * FRAME_MIN]
)
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


TEXTS = st.text(max_size=40).filter(lambda text: len(text.encode()) <= 255)
EVERY: dict[str, tuple[st.SearchStrategy[Any], str | None]] = {  # by pamqp's names; by ours, None for what isn't read
    "content_type": (TEXTS, "content_type"),
    "content_encoding": (TEXTS, "content_encoding"),
    "headers": (
        st.dictionaries(
            st.text("abc-", min_size=1, max_size=5), st.integers(0, 2**40) | TEXTS | st.booleans(), max_size=4
        ),
        "headers",
    ),
    "delivery_mode": (st.sampled_from([1, 2]), None),
    "priority": (st.integers(0, 255), "priority"),
    "correlation_id": (TEXTS, "correlation_id"),
    "reply_to": (TEXTS, "reply_to"),
    "expiration": (TEXTS, "expiration"),
    "message_id": (TEXTS, "message_id"),
    "timestamp": (st.integers(1, 1 << 32).map(lambda at: datetime.fromtimestamp(at, timezone.utc)), "timestamp"),
    "message_type": (TEXTS, "type"),
    "user_id": (TEXTS, None),
    "app_id": (TEXTS, "app_id"),
    "cluster_id": (st.just(""), None),
}


@st.composite
def properties(draw: st.DrawFn) -> dict[str, Any]:
    """Return some of the properties, or all, by pamqp's names; pamqp takes an empty one for one that isn't there."""
    names = draw(st.sets(st.sampled_from(sorted(EVERY))) | st.just(set(EVERY)))
    return {name: draw(EVERY[name][0]) for name in names}


def agree(written: dict[str, Any]) -> None:
    """Compare what is read with what pamqp was given."""
    found = decode_properties(commands.Basic.Properties(**written).marshal())
    expected = {
        ours: written[name]
        for name, (_, ours) in EVERY.items()
        if ours and written.get(name) is not None and written[name] not in ("", {})
    }
    if "timestamp" in expected:
        expected["timestamp"] = int(expected["timestamp"].timestamp())
    if "headers" in found:
        found["headers"] = table_of(found["headers"])
    assert {name: value for name, value in found.items() if value not in ("", {})} == expected


@pytest.mark.parametrize("name", sorted(EVERY))
@given(data=st.data())
def test_every_property_alone_is_read_as_pamqp_writes_it(name: str, data: st.DataObject) -> None:
    """A wrong flag or length shifts every property after it: a job under another's id."""
    agree({name: data.draw(EVERY[name][0])})


@given(properties())
def test_properties_together_are_read_as_pamqp_writes_them(written: dict[str, Any]) -> None:
    """They stand one after another, in an order that nothing in the octets names."""
    agree(written)


@given(properties())
def test_properties_cut_anywhere_are_refused(written: dict[str, Any]) -> None:
    """Properties that end too early would be read as shorter ones, and the job's id with them."""
    octets = commands.Basic.Properties(**written).marshal()
    for cut in range(len(octets)):
        with pytest.raises(ValueError):
            decode_properties(octets[:cut])


@given(
    st.binary(max_size=80)
    | st.tuples(properties(), st.integers(0, 300), st.integers(0, 255)).map(lambda given: damaged(*given))
)
def test_whatever_stands_for_properties_is_read_or_a_value_error(octets: bytes) -> None:
    """A foreign message with broken properties is buried; any other exception closes the connection over it, for ever."""
    with contextlib.suppress(ValueError):
        found = decode_properties(octets)
        table_of(found.get("headers", b""))


def damaged(written: dict[str, Any], at: int, octet: int) -> bytes:
    """Return encoded properties with one octet changed."""
    octets = bytearray(commands.Basic.Properties(**written).marshal())
    octets[at % len(octets)] = octet
    return bytes(octets)


RECORDED = bytes.fromhex(  # all that RabbitMQ 3.10.8 on Erlang 25.2.3 sent on a connection, from its first octet to its last
    "010000000001ee000a000a0009000001c90c6361706162696c697469657346000000c7127075626c69736865725f636f6e6669726d7374011a65786368616e67655f65786368"
    "616e67655f62696e64696e677374010a62617369632e6e61636b740116636f6e73756d65725f63616e63656c5f6e6f74696679740112636f6e6e656374696f6e2e626c6f636b"
    "6564740113636f6e73756d65725f7072696f72697469657374011c61757468656e7469636174696f6e5f6661696c7572655f636c6f73657401107065725f636f6e73756d6572"
    "5f716f7374010f6469726563745f7265706c795f746f74010c636c75737465725f6e616d6553000000077465737440766d09636f707972696768745300000037436f70797269"
    "6768742028632920323030372d3230323220564d776172652c20496e632e206f722069747320616666696c69617465732e0b696e666f726d6174696f6e53000000394c696365"
    "6e73656420756e64657220746865204d504c20322e302e20576562736974653a2068747470733a2f2f7261626269746d712e636f6d08706c6174666f726d530000001145726c"
    "616e672f4f54502032352e322e330770726f6475637453000000085261626269744d510776657273696f6e5300000006332e31302e380000000e414d51504c41494e20504c41"
    "494e00000005656e5f5553ce0100000000000c000a001e07ff00020000003cce01000000000005000a002900ce010001000000080014000b00000000ce010001000000040055"
    "000bce010001000000130032000b06656d61696c730000000000000000ce0100010000000d003c0050000000000000000100ce0100010000000d003c00500000000000000002"
    "00ce0100010000000d003c0078000000000000000303ce01000100000015003c00320138084e4f5f524f5554450004676f6e65ce02000100000044003c000000000000000000"
    "0ab8a0106170706c69636174696f6e2f6a736f6e0000000d0a6c762d617474656d7074620202030469642d310c696e766f6963652e73656e64ce0300010000000a7878787878"
    "7878787878ce0100010000000d003c0050000000000000000400ce01000100000019003c00470000000000000001000006656d61696c7300000001ce02000100000044003c00"
    "00000000000000000eb8a0106170706c69636174696f6e2f6a736f6e0000000d0a6c762d617474656d7074620202030469642d310c696e766f6963652e73656e64ce03000100"
    "00000e7b226f726465725f6964223a377dce01000100000007003c0015026331ce01000100000018003c003c0263310000000000000002010006656d61696c73ce0200010000"
    "0044003c0000000000000000000eb8a0106170706c69636174696f6e2f6a736f6e0000000d0a6c762d617474656d7074620202030469642d310c696e766f6963652e73656e64"
    "ce0300010000000e7b226f726465725f6964223a377dce01000100000018003c003c0263310000000000000003000006656d61696c73ce02000100000044003c000000000000"
    "00000000b8a0106170706c69636174696f6e2f6a736f6e0000000d0a6c762d617474656d7074620202030469642d310c696e766f6963652e73656e64ce010002000000080014"
    "000b00000000ce010002000000080032002900000000ce01000100000008003c001e02633101ce01000200000033001400280194284e4f545f464f554e44202d206e6f207175"
    "6575652027676f6e652720696e2076686f737420272f270032000ace01000000000004000a0033ce"
)
RECORDED_PROPERTIES = commands.Basic.Properties(
    content_type="application/json",
    delivery_mode=2,
    message_id="id-1",
    message_type="invoice.send",
    headers={"lv-attempt": 2},
    priority=3,
).marshal()
RECORDED_HEARD = [
    ("Connection.Start", 0), ("Connection.Tune", 0), ("Connection.OpenOk", 0),
    ("Channel.OpenOk", 1), ("Confirm.SelectOk", 1), ("Queue.DeclareOk", 1),
    ("confirm", 1, 1, False, True), ("confirm", 1, 2, False, True), ("confirm", 1, 3, True, False),
    ("return", 1, 312, "NO_ROUTE", b"gone", RECORDED_PROPERTIES), ("confirm", 1, 4, False, True),
    ("got", 1, 1, False, RECORDED_PROPERTIES, b'{"order_id":7}'),
    ("Basic.ConsumeOk", 1),
    ("deliver", 1, b"c1", 2, True, RECORDED_PROPERTIES, b'{"order_id":7}'), ("deliver", 1, b"c1", 3, False, RECORDED_PROPERTIES, b""),
    ("Channel.OpenOk", 2), ("Queue.DeleteOk", 2), ("Basic.Cancel", 1), ("Channel.Close", 2), ("Connection.CloseOk", 0),
]  # fmt: skip


def shortened(events: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return methods by name and channel alone."""
    return [(event[2], event[1]) if event[0] == "method" else event for event in events]


def test_a_recorded_connection_is_read_whole() -> None:
    """What a real broker sends is the protocol; a library's idea of it may share our mistakes."""
    events = parse(RECORDED)
    assert shortened(events) == RECORDED_HEARD
    assert events[0][3]["server_properties"]["version"] == "3.10.8"
    assert events[1][3] == {"channel_max": 2047, "frame_max": 131_072, "heartbeat": 60}
    assert decode_properties(RECORDED_PROPERTIES)["message_id"] == "id-1"
    assert (events[18][3]["reply_code"], events[17][3]["consumer_tag"]) == (404, "c1")


def test_a_recorded_connection_may_be_cut_at_every_place() -> None:
    """TCP cuts where it likes, in the broker's real frames too."""
    for cut in range(len(RECORDED) + 1):
        assert shortened(parse(RECORDED[:cut], RECORDED[cut:])) == RECORDED_HEARD, cut


@settings(max_examples=200)
@given(st.integers(0, len(RECORDED) - 1), st.integers(0, 255), st.integers(0, len(RECORDED) - 1), st.integers(0, 255))
def test_a_damaged_recorded_connection_is_parsed_or_a_protocol_error(
    at: int, octet: int, also_at: int, also: int
) -> None:
    """Tables, strings and arrays of the handshake are where a decoder that trusts lengths falls over."""
    octets = bytearray(RECORDED)
    octets[at], octets[also_at] = octet, also
    feed_whatever(bytes(octets))
