"""`Delivery.bury`: dead letters."""

from __future__ import annotations

import asyncio
import os
import re

import msgspec
import pytest

from leveret.failure import Failure, failures_of
from leveret.job import Priority
from tests.contract.broker.jobs import publish, rest_of
from tests.contract.harness import PATIENCE_S, Harness, consume, depth, received, soon, timed


async def test_a_buried_job_is_kept_byte_for_byte_with_its_origin(harness: Harness) -> None:
    """The dead letters are where a person finds out what went wrong, and from where it is replayed."""
    broker, queue, admin = harness.open(), harness.queue(), harness.admin()
    body = os.urandom(500)
    await publish(broker, queue, body, priority=Priority.LOW, headers={"x-tenant-id": "a"}, correlation_id="c")

    consumption, sink = await consume(broker, queue)
    delivery = await sink.next()
    errors = msgspec.json.encode([Failure(attempt=4, at_ms=1, host="h", error="ValueError", message="no")]).decode()
    buried = msgspec.structs.replace(
        delivery.envelope, attempt=4, passes=3, errors=errors, origin=queue.name, cause="bury", deadline=soon()
    )
    await delivery.bury(timed(buried, soon()))
    await consumption.close()

    async with admin.dead(queue) as letters:
        [letter] = [letter async for letter in letters]
    assert letter.envelope == received(buried)
    assert (letter.envelope.queue, letter.envelope.priority) == (queue.name, Priority.LOW)
    assert await rest_of(harness, queue) == []


@pytest.mark.features(bounds_headers=True)
async def test_a_message_too_large_to_be_published_again_is_buried_with_its_size(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator who reads "rejected" alone looks for a program that rejects: the log and the letter name id, size and limit."""
    queue, admin = harness.queue(), harness.admin()
    _, sink = await consume(harness.open(), queue)

    await harness.put(queue, b"{}", job_id="too-large", headers={"x": "y" * 100_000})
    await publish(harness.open(), queue, b"behind")
    assert (await sink.next()).envelope.body == b"behind"
    async with asyncio.timeout(PATIENCE_S):
        while (await depth(admin, queue)).dead == 0:
            await asyncio.sleep(0.05)
    async with admin.dead(queue) as letters:
        [letter] = [letter async for letter in letters]

    [failure] = failures_of(letter.envelope)
    [said] = [record.getMessage() for record in caplog.records if "too large to be published again" in record.message]
    size = re.search(r"too large to be published again: 100\d{3} bytes of properties, limit \d+", said)
    assert said.startswith(f"job too-large from queue {queue.name} "), said
    assert size is not None, said
    assert size.group() in failure.message
