"""What a publisher encodes is what a handler gets, whatever it is."""

from contextlib import suppress
from datetime import date, datetime, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from leveret.codec import Decoder, UndecodableError, content_type, encoder
from leveret.envelope import Envelope
from leveret.headers import check_headers, is_brokers_own, pack_headers, unpack_headers
from leveret.job import Job, Priority, Queue


class Line(msgspec.Struct):
    """A nested record."""

    sku: str
    count: int


class Order(Job, name="order", queue=Queue("orders")):
    """Every kind of field that people use."""

    number: int
    text: str
    price: Decimal
    ratio: float
    raw: bytes
    lines: list[Line]
    by_name: dict[str, int | None]
    when: datetime
    day: date
    key: UUID
    pair: tuple[str, int]
    flags: set[str]
    choice: str | int | None = None


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
int64 = st.integers(-(1 << 63), (1 << 63) - 1)
orders = st.builds(
    Order,
    number=int64,
    text=texts,
    price=st.decimals(allow_nan=False, allow_infinity=False, places=3),
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    raw=st.binary(max_size=60),
    lines=st.lists(st.builds(Line, sku=texts, count=int64), max_size=4),
    by_name=st.dictionaries(texts, st.none() | int64, max_size=4),
    when=st.datetimes(timezones=st.just(timezone.utc)),
    day=st.dates(),
    key=st.uuids(),
    pair=st.tuples(texts, int64),
    flags=st.sets(texts, max_size=4),
    choice=st.none() | texts | int64,
)
decoder = Decoder(Order)


@given(orders, st.sampled_from(["json", "msgpack"]))
def test_a_job_survives_the_round_trip(order: Order, encoding: Any) -> None:
    """A handler would run with other data than was published."""
    assert decoder.decode(encoder(Order, encoding)(order), content_type(encoding)) == order


@given(st.binary(max_size=200), st.sampled_from(["json", "msgpack"]))
def test_random_bytes_are_a_job_or_undecodable(body: bytes, encoding: Any) -> None:
    """Any other exception would be a crash of the consumer, not a dead letter."""
    with suppress(UndecodableError):
        assert isinstance(decoder.decode(body, content_type(encoding)), Order)


@given(orders, st.data())
def test_a_body_that_was_cut_or_changed_is_a_job_or_undecodable(order: Order, data: st.DataObject) -> None:
    """Nearly right input goes further into the decoder than noise does."""
    body = bytearray(encoder(Order, "json")(order))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with suppress(UndecodableError):
        assert isinstance(
            decoder.decode(bytes(body[: data.draw(st.integers(0, len(body)))]), "application/json"), Order
        )


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: not name.startswith("lv-") and not is_brokers_own(name)
)
values = texts | int64 | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
counts = st.integers(0, 1 << 53)
envelopes = st.builds(
    Envelope,
    job_id=texts,
    job=texts,
    queue=texts,
    priority=st.sampled_from(Priority),
    headers=st.dictionaries(names, values, max_size=5),
    attempt=st.integers(1, 1 << 53),
    passes=counts,
    version=counts,
    first_seen_ms=st.none() | st.integers(0, 253_402_300_799_999),
    due_ms=st.none() | counts,
    expires_at_ms=st.none() | counts,
    unknown_since_ms=st.none() | counts,
    bury_since_ms=st.none() | counts,
    errors=texts,
    origin=st.none() | st.just("orders"),
)


@given(envelopes)
def test_what_travels_in_headers_survives_the_round_trip(envelope: Envelope) -> None:
    """Attempts would begin anew, deadlines be forgotten, users' headers be lost: on every broker alike."""
    fields, problem = unpack_headers(pack_headers(envelope))
    assert problem is None
    # the level travels in a header only where the queue doesn't tell it
    level = {} if envelope.origin is not None else {"priority": envelope.priority}
    assert (
        Envelope(**{"job_id": envelope.job_id, "job": envelope.job, "queue": envelope.queue, **level, **fields})
        == envelope
    )


anything = st.recursive(
    st.none() | values | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
leverets = st.sampled_from(
    [
        "lv-attempt",
        "lv-pass",
        "lv-version",
        "lv-first-seen",
        "lv-due",
        "lv-expires-at",
        "lv-unknown-since",
        "lv-errors",
        "lv-origin",
        "lv-priority",
    ]
)


@given(st.dictionaries(leverets | texts, anything, max_size=8))
def test_whatever_a_foreign_producer_puts_into_headers_is_read_or_named(table: dict[str, Any]) -> None:
    """One odd header would stop the consumer, and with it everyone's jobs."""
    fields, problem = unpack_headers(table)
    envelope = Envelope(job_id="", job="", queue="orders", **fields)
    assert envelope.attempt >= 1
    assert problem is None or problem.startswith("header lv-")
    assert all(not name.startswith("lv-") and not is_brokers_own(name) for name in envelope.headers)


@given(st.dictionaries(names, values, max_size=5))
def test_headers_that_were_accepted_are_sent_as_they_are(headers: dict[str, Any]) -> None:
    """A header that changes on the way is worse than one that is refused."""
    envelope = Envelope(job_id="", job="", queue="orders").with_headers(check_headers(headers))
    assert unpack_headers(pack_headers(envelope))[0].get("headers", {}) == headers
