"""A quorum queue that confirms nothing, as one without its majority: what isn't for it goes on. Its process is suspended in a real node."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, cast

import pytest

from leveret import App, Attempt, Job, PublishTimeout, Queue
from leveret.brokers.rabbitmq.broker import RabbitBroker
from leveret.brokers.rabbitmq.confirms import WINDOW
from leveret.consuming.worker import working
from leveret.middleware import Retries
from tests.fault.bench import eventually
from tests.rabbit.node import Rabbit

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]


class Shop:
    """An app with a queue that will confirm nothing and one that is well."""

    def __init__(self, url: str) -> None:
        name = uuid.uuid4().hex[:12]
        self.app = App("shop", broker=url, middleware=[Retries(base_s=0.01, cap_s=0.01)])
        self.sick = Queue(f"sick-{name}")
        self.well = Queue(f"well-{name}")

        class Sick(Job, name="sick", queue=self.sick):
            n: int = 0

        class Well(Job, name="well", queue=self.well):
            n: int = 0

        self.Sick, self.Well = Sick, Well

    @asynccontextmanager
    async def suspended(self, rabbit: Rabbit) -> AsyncGenerator[None]:
        """Let the sick queue confirm nothing: to its publishers it is as one whose other members are gone."""
        process = f"whereis('%2F_{self.sick.name}')"
        await rabbit.eval(f"ok = sys:suspend({process}).")
        try:
            yield
        finally:
            await rabbit.eval(f"ok = sys:resume({process}).")


async def connections(rabbit: Rabbit) -> list[str]:
    """Return the names that the app's connections have in RabbitMQ."""
    listed = await rabbit.eval("rabbit_networking:connection_info_all([client_properties]).")
    return re.findall(r'<<"(leveret shop[^"]*)">>', listed)


@pytest.mark.parametrize("fresh", [False, True], ids=["", "from its first publish on"])
@pytest.mark.versions
async def test_publishes_to_other_queues_go_on_beside_a_queue_that_confirms_nothing(
    rabbit: Rabbit, caplog: pytest.LogCaptureFixture, fresh: bool
) -> None:
    """RabbitMQ soon confirms nothing more on that connection: one queue without its majority then ends all publishing of a service."""
    caplog.set_level(logging.WARNING, "leveret")
    shop = Shop(rabbit.url)
    late, failed, began = 0, 0, 0.0

    async def insist() -> None:
        nonlocal late
        while time.monotonic() < began + 8:
            with pytest.raises(PublishTimeout):
                await publisher.publish(shop.Sick(), timeout_s=0.5)
            late += 1

    async with shop.app.publisher() as publisher:
        await publisher.publish_many([shop.Sick(), shop.Well()])
    async with AsyncExitStack() as stack:
        if fresh:  # RabbitMQ takes the first publish of a channel to such a queue as a call, which it waits for
            await stack.enter_async_context(shop.suspended(rabbit))
        publisher = await stack.enter_async_context(shop.app.publisher())
        await publisher.publish_many([shop.Well()] if fresh else [shop.Sick(), shop.Well()])
        if not fresh:
            await stack.enter_async_context(shop.suspended(rabbit))
        began = time.monotonic()
        async with asyncio.TaskGroup() as insisting:
            for _ in range(50):
                insisting.create_task(insist())
            while time.monotonic() < began + 8:
                try:
                    await publisher.publish(shop.Well(), timeout_s=2)
                except PublishTimeout:
                    failed += 1
                await asyncio.sleep(0.02)
        assert late > 450, "too few to hold up a connection: it proves nothing"
        assert failed <= fresh, "only one that was on its way in the second until it was noticed"
        assert f"confirms no publish to {shop.sick.name}.normal: " in caplog.text


async def test_a_full_window_of_a_queue_that_confirms_nothing_stays_its_own(rabbit: Rabbit) -> None:
    """Who waits for room there holds up the others too; and woken all at once, they would be written to a socket that nobody reads."""
    shop = Shop(rabbit.url)
    async with shop.app.publisher() as publisher:
        await publisher.publish_many([shop.Sick(), shop.Well()])
        assert publisher._sender is not None
        links = cast("RabbitBroker", publisher._sender._broker)._publishing._links
        async with shop.suspended(rabbit):
            sick = [asyncio.create_task(publisher.publish(shop.Sick(n), timeout_s=60)) for n in range(3 * WINDOW)]
            await asyncio.sleep(0)
            began = time.monotonic()
            await publisher.publish(shop.Well(), timeout_s=10)
            assert time.monotonic() - began < 3
            [left] = links._leaving
            assert len(left.window._unconfirmed) <= WINDOW
            assert not any(one.done() for one in sick)
        await asyncio.gather(*sick)


async def test_a_queue_that_confirms_again_has_no_connection_of_its_own(
    rabbit: Rabbit, caplog: pytest.LogCaptureFixture
) -> None:
    """Each incident would leave connections behind, until RabbitMQ has no more; and a busy queue would keep its own for ever."""
    shop, well_again = Shop(rabbit.url), asyncio.Event()

    async def busy() -> None:
        while not well_again.is_set():
            await publisher.publish(shop.Sick(), timeout_s=60)

    async with shop.app.publisher() as publisher:
        await publisher.publish_many([shop.Sick(), shop.Well()])
        async with asyncio.TaskGroup() as publishing:
            async with shop.suspended(rabbit):
                for _ in range(40):
                    publishing.create_task(busy())
                async with asyncio.timeout(20):
                    while f"confirms no publish to {shop.sick.name}" not in caplog.text:
                        with suppress(PublishTimeout):  # it may be behind those that nobody confirms
                            await publisher.publish(shop.Well(), timeout_s=3)
                    while len(await connections(rabbit)) < 2:
                        await asyncio.sleep(0.1)
            async with asyncio.timeout(20):
                while len(await connections(rabbit)) > 1:
                    await asyncio.sleep(0.1)  # a connection's end has no event here
            well_again.set()
        await publisher.publish_many([shop.Sick(), shop.Well()])
        assert len(await connections(rabbit)) == 1


async def test_retries_go_on_while_handlers_publish_to_a_queue_that_confirms_nothing(rabbit: Rabbit) -> None:
    """A worker whose retries wait behind what its handlers publish stands still, with every slot taken, for as long as that queue is sick."""
    shop = Shop(rabbit.url)
    flooding, done = asyncio.Event(), 0

    @shop.app.handler(job=shop.Well)
    async def handle(job: Any, attempt: Attempt[Any]) -> None:
        nonlocal done
        if job.n == 0:
            flooding.set()
            await asyncio.gather(
                *(attempt.publish(shop.Sick(n), timeout_s=30) for n in range(900)), return_exceptions=True
            )
        elif attempt.number == 1:
            raise LookupError
        else:
            done += 1

    async with working(shop.app, grace_s=0) as worker, shop.app.publisher() as publisher:
        await publisher.publish_many([shop.Sick(-1)])
        async with shop.suspended(rabbit):
            await publisher.publish(shop.Well(0))
            await flooding.wait()
            links = cast("RabbitBroker", cast("Any", worker.consumer._publisher)._sender._broker)._publishing._links
            await eventually(lambda: links.current is not None and len(links.current.window._unconfirmed) >= 900)
            began = time.monotonic()
            await publisher.publish_many([shop.Well(n) for n in range(1, 201)])
            await eventually(lambda: done == 200, lambda: f"{done} of 200 retries ran", timeout_s=15)
            assert time.monotonic() - began < 10
