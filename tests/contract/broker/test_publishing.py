"""`Broker.publishing`: whether jobs can be published."""

from __future__ import annotations

import asyncio

import pytest

from tests.contract.broker.jobs import publish
from tests.contract.harness import PATIENCE_S, Harness


async def test_a_broker_says_how_publishing_is(harness: Harness) -> None:
    """A service that is asked whether it is ready must know without publishing a job."""
    broker, queue = harness.open(), harness.queue()

    before = broker.publishing
    assert (before.name, before.why != "") in [("connecting", True), ("ready", False)]
    await publish(broker, queue, b"x")
    ready = broker.publishing
    assert (ready.name, ready.why) == ("ready", "")
    await publish(broker, queue, b"x")
    assert broker.publishing == ready, "`since` is when the state began"
    await broker.close()

    closed = broker.publishing
    assert (closed.name, closed.why, closed.since >= ready.since) == ("closed", "", True)


@pytest.mark.features(connected=True)
async def test_a_lost_publishing_connection_is_told_and_opened_again(harness: Harness) -> None:
    """A service that isn't ready gets no traffic: if only a publish could bring it back, it would never be ready again."""
    broker, queue = harness.open(), harness.queue()
    connects = broker.publishing.name == "connecting"
    await publish(broker, queue, b"x")
    ready = broker.publishing

    harness.cut()
    async with asyncio.timeout(PATIENCE_S):
        while connects and broker.publishing.since == ready.since:
            await asyncio.sleep(0.001)
        while broker.publishing.name != "ready":
            assert broker.publishing.why
            await asyncio.sleep(0.001)
