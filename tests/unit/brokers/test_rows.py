"""The row in which a store keeps a job: what went in comes out, and what a foreign producer put there stops nobody."""

from __future__ import annotations

import json
import math
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from leveret.brokers.rows import BODY, COLUMNS, JOB_ID, delay_ms, headers_text, pack, packed, unpack, when_ms
from leveret.clock import ManualClock
from leveret.envelope import Envelope
from leveret.errors import InvalidJob
from leveret.job import Priority, Queue
from tests.contract.harness import make_envelope

QUEUE = Queue("jobs")


def read(envelope: Envelope, **columns: Any) -> tuple[Envelope, str | None]:
    """Pack and unpack, as a store that keeps other values in `columns`."""
    queue, level, _, *fields = pack(QUEUE.name, envelope, None)
    row = dict(zip(COLUMNS, (queue, level, *fields), strict=True)) | columns
    return unpack(list(row.values()))


def test_an_envelope_comes_back_as_it_was() -> None:
    """What a store loses, a job loses on every store."""
    sent = msgspec.structs.replace(
        make_envelope(QUEUE, b"\xff body", headers={"x-mine": "1"}), priority=Priority.HIGH, attempt=3, reply_to="there"
    )

    assert read(sent) == (sent, None)


@pytest.mark.parametrize("publish", [1, -1, 2**63 - 1, -(2**63), 10**18])
def test_a_publish_comes_back_whether_or_not_another_header_is_beside_it(publish: int) -> None:
    """Its waiter would ask for another publish. A header alone takes a shorter way, which must lead to the same text."""
    alone = msgspec.structs.replace(make_envelope(QUEUE), publish=publish)
    beside = msgspec.structs.replace(alone, attempt=2)

    assert (read(alone), read(beside)) == ((alone, None), (beside, None))
    assert headers_text({"lv-publish": publish}) == json.dumps({"lv-publish": publish}, separators=(",", ":"))


@pytest.mark.parametrize(
    "text",
    ['{"lv-publish":07}', '{"lv-publish":+7}', '{"lv-publish":7', '{"lv-publish":7}}', '{"lv-publish":1_0}'],
)
def test_what_only_looks_like_a_publish_is_no_json(text: str) -> None:
    """Two ways to read a header would differ in what they take, and so would two stores."""
    found, problem = read(make_envelope(QUEUE), headers=text)

    assert found.publish == 0
    assert problem is not None
    assert problem.startswith("the headers can't be read: ")


@pytest.mark.parametrize(
    "value",
    [b"\xff\x00", datetime(2026, 1, 2, tzinfo=timezone.utc), Decimal("1.10"), "\ud800", [{"a": [b"1", None]}]],
    ids=["bytes", "datetime", "decimal", "surrogate", "nested"],
)
def test_a_header_that_json_does_not_have_comes_back_as_it_was(value: object) -> None:
    """A job that crosses from RabbitMQ keeps what its producer wrote."""
    got, problem = read(make_envelope(QUEUE, headers={"x": value}))

    assert (got.headers, problem) == ({"x": value}, None)


def test_a_header_that_is_not_a_number_comes_back() -> None:
    """NaN is no JSON, and valid in a table of AMQP."""
    got, _ = read(make_envelope(QUEUE, headers={"x": math.nan}))

    assert math.isnan(got.headers["x"])  # type: ignore[arg-type]


def test_a_header_that_cannot_be_stored_names_the_job() -> None:
    """A caller who publishes thousands must learn which one it was."""
    with pytest.raises(InvalidJob, match="job one for queue 'jobs': its headers hold <object") as refused:
        packed(QUEUE.name, make_envelope(QUEUE, job_id="one", headers={"x": object()}), None)

    assert refused.value.job_id == "one"


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"level": "asap"}, "its level 'asap' is unknown"),
        ({"headers": "{"}, "the headers can't be read"),
        ({"headers": headers_text({"lv-attempt": "x"})}, "lv-attempt"),
        ({"app": b"\xff"}, "its column app isn't UTF-8 text"),
        ({"app": b"\xff", "headers": b"\xfe"}, "its column app isn't UTF-8 text"),
    ],
)
def test_a_row_that_cannot_be_read_is_an_envelope_with_its_problem(columns: dict[str, Any], problem: str) -> None:
    """Such a row must reach the dead letters with its body unchanged: an error here would stop all jobs behind it."""
    envelope, found = read(make_envelope(QUEUE, b"\xfe", job_id="bad"), **columns)

    assert problem in str(found)
    assert (envelope.body, envelope.job_id) == (b"\xfe", "bad")


def test_the_places_in_a_row_are_those_of_its_columns() -> None:
    """An error names the job by its id, and a transaction is bounded by its bodies."""
    row = pack(QUEUE.name, make_envelope(QUEUE, b"body", job_id="one"), 7)

    assert (row[2], row[JOB_ID], row[BODY]) == (7, "one", b"body")


def test_only_a_moment_to_come_delays_a_job() -> None:
    """A delayed job joins the end of its line: one whose moment has passed would lose its place."""
    clock = ManualClock(1000.0)
    jobs = [msgspec.structs.replace(make_envelope(QUEUE), due_ms=due_ms) for due_ms in (None, 999_000, 1_001_000)]

    assert [when_ms(job, clock) for job in jobs] == [None, None, 1_001_000]


@pytest.mark.parametrize(("now_ms", "left_ms"), [(749.6, 251), (750.0, 250), (750.0002, 250), (1000.4, 0)])
def test_a_delay_in_whole_milliseconds_is_no_shorter_than_what_is_left(now_ms: float, left_ms: int) -> None:
    """A server that counts it from a later moment would let the job start before it was asked for."""
    assert delay_ms(1000, now_ms) == left_ms
