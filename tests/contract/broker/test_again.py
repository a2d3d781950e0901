"""`Delivery.again`, and what it has in common with `bury`: confirmed first, then settled."""

from __future__ import annotations

import time

import msgspec
import pytest

from leveret.errors import PublishError
from leveret.job import Priority
from tests.contract.broker.jobs import declare_delays, publish, rest_of
from tests.contract.harness import Harness, consume, depth, received, soon, timed


@pytest.mark.parametrize("delay_s", [0.0, 0.5])
async def test_again_delivers_the_new_envelope_and_the_original_is_gone(harness: Harness, delay_s: float) -> None:
    """A retry that keeps the original runs twice; one that comes early hammers what just failed."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, b"1", headers={"x-tenant-id": "a"}, priority=Priority.HIGH)
    await declare_delays(broker, harness)

    consumption, sink = await consume(broker, queue)
    first = await sink.next()
    changed = msgspec.structs.replace(first.envelope, attempt=2, passes=1, errors="[]", cause="retry")
    started = time.monotonic()
    retried = timed(changed, soon(), delay_s=delay_s)
    await first.again(retried)
    second = await sink.next()
    took_s = time.monotonic() - started

    assert second.envelope == received(retried)
    assert second.queue == queue
    assert delay_s <= took_s < delay_s * (1 + 1 / 64) + 1
    second.done()
    await consumption.close()
    assert await rest_of(harness, queue) == []
    assert (await depth(harness.admin(), queue)).ready == 0


@pytest.mark.parametrize("verb", ["again", "again later", "bury"])
async def test_a_settlement_that_cannot_be_confirmed_leaves_the_delivery_unsettled(harness: Harness, verb: str) -> None:
    """Acked before its republication is confirmed, a job is lost for good."""
    broker, queue = harness.open(), harness.queue()
    await publish(broker, queue, b"1", b"other")
    consumption, sink = await consume(broker, queue)
    delivery, other = await sink.take(2)
    await other.again(timed(other.envelope, soon()))  # so that it is connected and everything declared
    (await sink.next()).done()
    envelope = msgspec.structs.replace(delivery.envelope, passes=1, origin=queue.name if verb == "bury" else None)

    envelope = timed(envelope, soon(), delay_s=0.25 if verb == "again later" else 0)

    async def settle(deadline: float) -> None:
        await (delivery.bury if verb == "bury" else delivery.again)(timed(envelope, deadline))

    await harness.break_publishing()
    started = time.monotonic()
    with pytest.raises(PublishError):
        await settle(started + 1)
    assert time.monotonic() - started < 2
    assert delivery.live
    await harness.heal()
    await settle(soon())

    if verb == "bury":
        async with harness.admin().dead(queue) as letters:
            found = {letter.envelope.job_id async for letter in letters}
        assert found == {delivery.envelope.job_id}
    else:
        assert (await sink.next()).envelope == received(envelope)
    await consumption.close()
