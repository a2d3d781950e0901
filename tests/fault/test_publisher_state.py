"""What a publisher says of itself while its broker blocks it, and how long it takes to leave one."""

import asyncio
import logging
import time
from contextlib import AsyncExitStack

import pytest

from leveret import App, PublishTimeout
from tests.fault.bench import eventually
from tests.fault.test_sick_queue import Shop
from tests.rabbit.node import Rabbit

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]


async def test_an_alarm_is_a_state_and_one_line_at_its_beginning_and_its_end(
    rabbit: Rabbit, caplog: pytest.LogCaptureFixture
) -> None:
    """R18: publishes that end at their deadline with nothing in the log look like a bug of the service."""
    caplog.set_level(logging.INFO, "leveret")
    shop = Shop(rabbit.url)
    blocking = App("shop", broker=rabbit.url).blocking_publisher()
    async with shop.app.publisher() as publisher:
        await publisher.publish(shop.Well())
        await asyncio.to_thread(blocking.publish, shop.Well())
        await rabbit.alarm(on=True)
        try:
            with pytest.raises(PublishTimeout, match="blocked"):
                await publisher.publish(shop.Well(), timeout_s=1)
            blocked = publisher.state()
            assert (blocked.name, bool(blocked.why)) == ("blocked", True)
            with pytest.raises(PublishTimeout, match="blocked"):
                await asyncio.to_thread(blocking.publish, shop.Well(), timeout_s=1)
            assert blocking.state().name == "blocked"
        finally:
            await rabbit.alarm(on=False)
        await eventually(lambda: publisher.state().name == blocking.state().name == "ready")
        assert publisher.state().since > blocked.since
        await publisher.publish(shop.Well())
    assert publisher.state().name == "closed"
    await asyncio.to_thread(blocking.close)
    assert blocking.state().name == "closed"
    assert caplog.text.count("blocks publishers") == caplog.text.count("takes publishes again") == 2, (
        "once for each app"
    )


async def test_a_publisher_is_left_at_once_beside_a_queue_that_confirms_nothing(rabbit: Rabbit) -> None:
    """A service that takes three seconds longer to stop misses the deadline of its deploy, for a publish that it gave up."""
    shop = Shop(rabbit.url)
    for known in (True, False):
        async with AsyncExitStack() as sick:
            async with shop.app.publisher() as publisher:
                await publisher.publish_many([shop.Sick(), shop.Well()] if known else [shop.Well()])
                await sick.enter_async_context(shop.suspended(rabbit))
                with pytest.raises(PublishTimeout):
                    await publisher.publish(shop.Sick(), timeout_s=0.5)
                began = time.monotonic()
            assert time.monotonic() - began < 0.5
