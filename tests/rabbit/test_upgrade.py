"""What a version before left in RabbitMQ is still read."""

from __future__ import annotations

import asyncio

import pytest
from pamqp.commands import Basic

from leveret import App, Job, Queue
from tests.rabbit.node import Rabbit
from tests.rabbit.raw import Raw

pytestmark = pytest.mark.rabbit

upgraded = Queue("tests.upgraded")


class Kept(Job, name="upgrade.kept", queue=upgraded):
    """A job that was published before the upgrade, or after it."""

    text: str


async def test_what_version_0_1_0_delayed_is_run_when_it_is_due(rabbit: Rabbit, raw: Raw) -> None:
    """Its ladder of bits holds jobs for up to 48 days: an upgrade must not strand them."""
    app, ran = App("upgraded", broker=rabbit.url), asyncio.Queue[str]()

    @app.handler
    async def kept(job: Kept) -> None:
        await ran.put(job.text)

    async with raw.channel() as channel:  # the lowest level of that ladder, as 0.1.0 declared it
        await channel.exchange_declare(exchange="lv.delay.0", exchange_type="topic", durable=True)
        await channel.queue_declare(
            "lv.delay.0",
            durable=True,
            arguments={
                "x-queue-type": "quorum",
                "x-delivery-limit": 1_000_000,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",
                "x-dead-letter-exchange": "lv.delay.due",
                "x-message-ttl": 250,
            },
        )
        await channel.queue_bind("lv.delay.0", "lv.delay.0", ".".join([*["*"] * 23, "1", "*"]))
    try:
        async with asyncio.timeout(60), app.worker(queues=[upgraded.name]):
            async with app.publisher() as publisher:
                await publisher.publish(Kept("now"), timeout_s=15)
            assert await ran.get() == "now"
            for level in ("low", "normal", "high", "urgent"):
                properties = Basic.Properties(
                    message_id=f"old-{level}",
                    message_type="upgrade.kept",
                    content_type="application/json",
                    delivery_mode=2,
                )
                key = ".".join([*["0"] * 23, "1", f"q/tests/upgraded/{level}"])
                await raw.publish(key, f'{{"text":"{level}"}}'.encode(), exchange="lv.delay.0", properties=properties)
            assert {await ran.get() for _ in range(4)} == {"low", "normal", "high", "urgent"}
    finally:
        for name in (
            "tests.upgraded",
            "tests.upgraded.low",
            "tests.upgraded.high",
            "tests.upgraded.urgent",
            "tests.upgraded.dead",
            "lv.delay.0",
        ):
            await raw.delete(name)
        await raw.delete_exchange("lv.delay.0")
