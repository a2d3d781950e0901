"""Messages of producers that aren't leveret."""

from __future__ import annotations

import msgspec
import pytest

from tests.contract.broker.jobs import publish
from tests.contract.harness import Harness, consume, soon, timed


async def test_a_foreign_message_without_properties_arrives(harness: Harness) -> None:
    """A producer in another language sends a body and no more; it is a job all the same."""
    broker, queue = harness.open(), harness.queue()
    _, sink = await consume(broker, queue)

    await harness.put(queue, b'{"n": 1}')
    delivery = await sink.next()

    assert (delivery.envelope.body, delivery.envelope.job, delivery.envelope.attempt) == (b'{"n": 1}', "", 1)
    assert delivery.problem is None


async def test_content_type_and_encoding_arrive_as_they_were_sent(harness: Harness) -> None:
    """The decoder refuses what it can't read by these two."""
    broker, queue = harness.open(), harness.queue()
    _, sink = await consume(broker, queue)

    await harness.put(
        queue,
        b"\x1f\x8b",
        content_type="text/plain; charset=latin-1",
        content_encoding="gzip",
        job="n",
        job_id="foreign-1",
    )
    delivery = await sink.next()

    assert (delivery.envelope.content_type, delivery.envelope.content_encoding) == (
        "text/plain; charset=latin-1",
        "gzip",
    )
    assert (delivery.envelope.job, delivery.envelope.job_id) == ("n", "foreign-1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lv-attempt", "many"),
        ("lv-attempt", 0),
        ("lv-attempt", -3),
        ("lv-pass", 1.5),
        ("lv-crashes", -1),
        ("lv-errors", 7),
        ("lv-due", "soon"),
        ("lv-expires-at", True),
    ],
)
async def test_a_header_of_leverets_own_that_makes_no_sense_is_a_problem_not_a_crash(
    harness: Harness, name: str, value: object
) -> None:
    """One odd message must not stop the queue; it is buried with its reason, and those behind it run."""
    broker, queue = harness.open(), harness.queue()
    _, sink = await consume(broker, queue)

    await harness.put(queue, b"odd", headers={name: value, "x-tenant-id": "a"})
    await publish(broker, queue, b"good")
    odd, good = await sink.take(2)

    assert name in (odd.problem or "")
    assert (odd.envelope.body, odd.envelope.headers, odd.envelope.attempt) == (b"odd", {"x-tenant-id": "a"}, 1)
    assert (good.envelope.body, good.problem) == (b"good", None)


async def test_foreign_headers_of_any_type_survive_a_retry_and_a_burial(harness: Harness) -> None:
    """Leveret may not understand them; who sent them will, when the job comes back out."""
    broker, queue, admin = harness.open(), harness.queue(), harness.admin()
    _, sink = await consume(broker, queue)
    headers = {
        "x-list": [1, "a", True],
        "x-bytes": bytearray(b"\x00\xff"),
        "x-none": None,
        "x-table": {"deep": {"er": 1}},
        "x-float": 2.5,
    }

    await harness.put(queue, b"1", job_id="foreign-1", headers=headers)
    first = await sink.next()
    assert first.envelope.headers == headers
    await first.again(timed(msgspec.structs.replace(first.envelope, attempt=2), soon()))
    second = await sink.next()
    await second.bury(timed(msgspec.structs.replace(second.envelope, origin=queue.name), soon()))

    assert second.envelope.headers == headers
    async with admin.dead(queue) as letters:
        [letter] = [letter async for letter in letters]
    assert letter.envelope.headers == headers
