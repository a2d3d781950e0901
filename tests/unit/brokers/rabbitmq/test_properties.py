"""Envelope ↔ AMQP properties: every field there and back, and whatever a foreign producer sends."""

from __future__ import annotations

import struct
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, decode
from pamqp.header import ContentHeader

from leveret.brokers.rabbitmq import properties
from leveret.brokers.rabbitmq.topology import PRIORITY_PROPERTY
from leveret.envelope import JSON, MSGPACK, Envelope
from leveret.failure import Failure
from leveret.job import LEVELS, Priority, Queue

QUEUE = "emails"
UTF8_ID = commands.Basic.Properties.flags["message_id"]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
shorts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
header_names = shorts.filter(lambda name: not name.startswith(("lv-", "x-")) and name not in ("CC", "BCC"))
counts = st.integers(1, (1 << 63) - 1)
moments = st.none() | st.integers(0, 253_402_300_799_999)
stamps = st.none() | st.integers(0, (1 << 63) - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
envelopes = st.builds(
    Envelope,
    job_id=shorts,
    job=texts,
    queue=st.just(QUEUE),
    priority=st.sampled_from(LEVELS),
    body=st.binary(max_size=40),
    content_type=st.sampled_from([JSON, MSGPACK, "text/plain"]),
    content_encoding=st.none() | shorts,
    created_s=st.integers(0, (1 << 32) - 1),  # above, pamqp takes it for milliseconds
    app=st.none() | shorts,
    correlation_id=st.none() | shorts,
    reply_to=st.none() | shorts,
    headers=st.dictionaries(
        header_names, texts | st.integers(-(1 << 63), (1 << 63) - 1) | finite | st.booleans(), max_size=4
    ),
    attempt=counts,
    passes=st.integers(0, 1 << 40),
    version=counts,
    first_seen_ms=moments,
    due_ms=stamps,
    expires_at_ms=stamps,
    unknown_since_ms=stamps,
    bury_since_ms=stamps,
    errors=texts,
)


def amqp(**fields: Any) -> bytes:
    """Return properties as a foreign client encodes them: pamqp, an implementation of its own."""
    return commands.Basic.Properties(**fields).marshal()


def raw(flags: int, values: bytes) -> bytes:
    """Return properties that no client would encode."""
    return struct.pack(">H", flags) + values


def read_by_pamqp(octets: bytes) -> commands.Basic.Properties:
    """Return what another client makes of properties that leveret sent."""
    header = ContentHeader()
    header.unmarshal(struct.pack(">HHQ", 60, 0, 0) + octets)
    return header.properties


@given(envelopes)
def test_what_is_published_is_what_is_delivered(envelope: Envelope) -> None:
    """A field lost on the way is lost at every retry: attempts start anew, an expiry never comes."""
    for priority, level in ((PRIORITY_PROPERTY[envelope.priority], None), (None, envelope.priority)):
        octets = properties.encode(envelope, priority)
        assert properties.from_job_queue(octets, envelope.body, QUEUE, level) == (envelope, None)


@given(envelopes)
def test_a_buried_job_is_read_as_it_was_buried(envelope: Envelope) -> None:
    """`dead replay` publishes what is read here: to its own queue, at its own level."""
    buried = msgspec.structs.replace(envelope, origin=QUEUE)
    assert properties.from_dead_queue(properties.encode(buried, None), buried.body, QUEUE) == (buried, None)


@given(envelopes)
def test_another_client_can_read_what_leveret_sends(envelope: Envelope) -> None:
    """A foreign consumer, and the management page, are promised plain AMQP."""
    found = read_by_pamqp(properties.encode(envelope, 4))
    assert (found.message_id, found.delivery_mode, found.priority) == (envelope.job_id, 2, 4)
    assert (found.message_type or "", found.content_type, found.app_id) == (
        envelope.job,
        envelope.content_type,
        envelope.app,
    )
    table = found.headers or {}
    assert {name: table[name] for name in envelope.headers} == dict(envelope.headers)
    if envelope.created_s:
        assert found.timestamp == datetime.fromtimestamp(envelope.created_s, tz=timezone.utc)


def test_a_plain_job_has_no_headers_table() -> None:
    """The table is most of the cost of a message."""
    assert read_by_pamqp(properties.encode(Envelope(job_id="1", job="a.b", queue=QUEUE), None)).headers is None


def test_a_quorum_queues_job_is_sent_without_a_priority_and_a_classic_ones_with_its_level() -> None:
    """A priority of 0 isn't none: on 4.3 it puts a job behind, or before, its peers."""
    quorum, classic, one = Queue("a"), Queue("a", type="classic"), Queue("a", type="classic", priorities=False)
    assert [properties.priority_property(quorum, level) for level in LEVELS] == [None] * 4
    assert {level: properties.priority_property(classic, level) for level in LEVELS} == {
        Priority.LOW: 3,
        Priority.NORMAL: 4,
        Priority.HIGH: 5,
        Priority.URGENT: 6,
    }
    assert properties.priority_property(one, Priority.NORMAL) is None
    assert read_by_pamqp(properties.encode(Envelope(job_id="1", job="a.b", queue=QUEUE), None)).priority is None


def test_expiration_and_user_id_of_a_foreign_message_are_not_sent_on() -> None:
    """`expiration` would make the dead-letter exchange take an expiry for a failure; another's `user_id` is a 406."""
    octets = amqp(message_id="1", expiration="60000", user_id="joe", reply_to="answers", correlation_id="c")
    envelope, _ = properties.from_job_queue(octets, b"{}", QUEUE, Priority.NORMAL)

    again = read_by_pamqp(properties.encode(envelope, None))

    assert (again.expiration, again.user_id) == (None, None)
    assert (again.message_id, again.reply_to, again.correlation_id) == ("1", "answers", "c")


def test_the_brokers_own_headers_are_not_sent_on_and_users_are() -> None:
    """A copied `x-death` makes RabbitMQ before 4.0 drop the job on its second pass."""
    headers = {
        "x-death": [{"queue": "q"}],
        "x-first-death-queue": "q",
        "x-delivery-count": 3,
        "CC": ["other"],
        "x-tenant-id": "t-1",
        "n": None,
    }
    envelope, _ = properties.from_job_queue(amqp(message_id="1", headers=headers), b"{}", QUEUE, Priority.NORMAL)

    assert read_by_pamqp(properties.encode(envelope, None)).headers == {"x-tenant-id": "t-1", "n": None}


def test_a_message_without_any_properties_has_the_documented_defaults() -> None:
    """A foreign producer need know nothing but a queue's name: JSON, an id of ours, the queue's only job."""
    envelope, problem = properties.from_job_queue(amqp(), b"{}", QUEUE, Priority.NORMAL)
    assert problem is None
    assert (envelope.content_type, envelope.job, envelope.attempt, envelope.created_s) == (JSON, "", 1, 0)
    assert len(envelope.job_id) == 36


@pytest.mark.parametrize(
    ("sent", "level"),
    [
        (None, "normal"),
        (0, "low"),
        (3, "low"),
        (4, "normal"),
        (5, "high"),
        (6, "urgent"),
        (7, "urgent"),
        (255, "urgent"),
    ],
)
def test_any_priority_of_a_foreign_message_in_a_classic_queue_is_a_level(sent: int | None, level: str) -> None:
    """Without a level it couldn't be published again."""
    envelope, problem = properties.from_job_queue(amqp(priority=sent), b"{}", QUEUE, None)
    assert (envelope.priority, problem) == (Priority(level), None)


def test_in_a_job_queue_the_queue_says_the_level_and_headers_of_dead_letters_do_not() -> None:
    """Somebody moved a dead letter back by hand: with its `lv-origin` kept, each retry of it would look buried."""
    octets = amqp(headers={"lv-origin": "other", "lv-priority": "low"})
    envelope, _ = properties.from_job_queue(octets, b"{}", QUEUE, Priority.HIGH)
    assert (envelope.priority, envelope.origin, envelope.queue) == (Priority.HIGH, None, QUEUE)


@pytest.mark.parametrize(
    "headers",
    [
        {"lv-attempt": "two"},
        {"lv-attempt": 0},
        {"lv-due": "soon"},
        {"lv-first-seen": (1 << 63) - 1},
        {"lv-errors": 7},
        {"lv-priority": "huge"},
    ],
    ids=str,
)
def test_a_header_of_leverets_with_another_type_is_a_problem_and_no_crash(headers: dict[str, Any]) -> None:
    """Whoever writes `lv-attempt: two` must not stop the good jobs behind it."""
    envelope, problem = properties.from_job_queue(amqp(message_id="1", headers=headers), b"{}", QUEUE, Priority.NORMAL)
    assert problem is not None
    assert next(iter(headers)) in problem
    assert (envelope.job_id, envelope.body, envelope.attempt) == ("1", b"{}", 1)


@pytest.mark.parametrize(
    "octets",
    [
        raw(UTF8_ID, b"\x03\xff\xfe\xfd"),
        raw(UTF8_ID, b"\x30too short"),
        raw(commands.Basic.Properties.flags["timestamp"], b"\x00\x01"),
        raw(commands.Basic.Properties.flags["headers"], b"\x00\x00\x00\x04\x01aQ1"),
        raw(1, b""),
        b"",
        b"\x80",
    ],
    ids=["not-utf-8", "string-too-short", "timestamp-too-short", "unknown-field-type", "more-flags", "none", "half"],
)
def test_properties_that_cannot_be_read_are_a_problem_and_the_body_is_kept(octets: bytes) -> None:
    """RabbitMQ doesn't look into them: raised while reading, one such message ends the connection, again and again."""
    for read in (
        lambda: properties.from_job_queue(octets, b"body", QUEUE, Priority.HIGH),
        lambda: properties.from_dead_queue(octets, b"body", QUEUE),
    ):
        envelope, problem = read()
        assert problem is not None
        assert envelope.body == b"body"
        assert envelope.job_id


def test_a_table_nested_beyond_the_stack_is_a_problem() -> None:
    """It fits into one frame, and a RecursionError isn't among the errors that a parser expects."""
    table = b""
    for _ in range(10_000):
        table = b"\x01aF" + struct.pack(">I", len(table)) + table
    octets = raw(commands.Basic.Properties.flags["headers"], struct.pack(">I", len(table)) + table)
    envelope, problem = properties.from_job_queue(octets, b"body", QUEUE, Priority.NORMAL)
    assert problem is not None
    assert envelope.body == b"body"


@given(st.binary(max_size=200))
def test_no_octets_make_reading_raise(octets: bytes) -> None:
    """Whatever comes is buried with its reason; an exception here would leave it unacked, and the window smaller by one."""
    envelope, _ = properties.from_job_queue(octets, b"body", QUEUE, Priority.NORMAL)
    assert (envelope.body, envelope.queue) == (b"body", QUEUE)
    letter, _ = properties.from_dead_queue(octets, b"body", QUEUE)
    assert letter.body == b"body"


def death(queue: str, reason: str) -> dict[str, Any]:
    return {"queue": queue, "reason": reason, "count": 1, "exchange": "lv.jobs", "routing-keys": ["k"]}


def test_what_the_broker_dead_lettered_itself_has_its_queue_level_and_reason() -> None:
    """Over the limits or the delivery limit, nothing of leveret's touched it: it must still be shown and replayed."""
    waited = death("lv.delay.3", "expired")
    octets = amqp(
        message_id="1",
        headers={"x-death": [death("emails.high", "delivery_limit"), waited], "x-first-death-queue": "lv.delay.3"},
    )
    envelope, problem = properties.from_dead_queue(octets, b"{}", QUEUE)
    [failure] = msgspec.json.decode(envelope.errors, type=list[Failure])
    assert (envelope.queue, envelope.origin, envelope.priority, problem) == (QUEUE, QUEUE, Priority.HIGH, None)
    assert "delivery_limit" in failure.message


def test_a_classic_queues_dead_letter_has_the_level_of_its_priority() -> None:
    """Its queue's name says no level: replayed at NORMAL, an urgent job waits behind the backlog."""
    envelope, _ = properties.from_dead_queue(
        amqp(priority=6, headers={"x-death": [death(QUEUE, "rejected")]}), b"{}", QUEUE
    )
    assert envelope.priority is Priority.URGENT


@pytest.mark.parametrize(
    "headers", [None, {}, {"x-death": "odd"}, {"x-death": []}, {"x-death": [7, {"queue": 7}]}], ids=str
)
def test_a_message_put_into_a_dead_letter_queue_by_hand_belongs_to_that_queue(headers: dict[str, Any] | None) -> None:
    """`dead list` must show it, whatever headers it has."""
    envelope, _ = properties.from_dead_queue(amqp(headers=headers), b"{}", QUEUE)
    assert (envelope.queue, envelope.priority) == (QUEUE, Priority.NORMAL)


@pytest.mark.parametrize(
    "value",
    [
        0,
        -5,
        1 << 62,
        -(1 << 63),
        0.1,
        1e300,
        True,
        False,
        "",
        "ü",
        None,
        b"\xff\xfe",
        bytearray(b"\x00\xff"),
        [],
        [1, "a", None, {"x": [1.5]}],
        {"a": {"b": 2}},
        datetime(2020, 1, 1, tzinfo=timezone.utc),
        Decimal("1.25"),
    ],
    ids=repr,
)
def test_a_foreign_header_of_any_amqp_type_keeps_its_value_at_a_retry(value: object) -> None:
    """In pamqp's own encoder 0.1 becomes a 32-bit float, and can't encode what its decoder reads of a string that isn't UTF-8."""
    octets = bytes(properties.encode_table({"h": value}))
    _, table = decode.field_table(struct.pack(">I", len(octets)) + octets)
    assert table == {"h": value}


@pytest.mark.parametrize("value", [Path("x"), 1 << 63, {1, 2}, Decimal("NaN"), ["deep", [Path("x")]]], ids=repr)
def test_a_header_that_amqp_has_no_type_for_is_refused_before_anything_is_sent(value: object) -> None:
    """Sent in another shape, it would be read as something else."""
    with pytest.raises(TypeError, match="no type"):
        properties.encode_table({"h": value})
