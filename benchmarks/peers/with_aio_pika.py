"""Raw aio-pika, no framework: confirms, persistent, mandatory, one task a message, late acks. Run it to consume."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aio_pika import DeliveryMode, Message, connect
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from benchmarks.peers.shape import KIND, MAX_PRIORITY, MODE, PREFETCH, PRIORITY, QUEUE, TEXT, URL, Sender, ran

WAIT = f"{QUEUE}.wait"


class Invoice(msgspec.Struct):
    """The job."""

    at: int
    order_id: int = 7
    email: str = "a@example.org"
    text: str = TEXT
    tags: tuple[str, ...] = ("a", "b")


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Invoice).decode


async def declare(channel: AbstractChannel) -> None:
    """Declare the queue, and one that holds delayed messages until their time to live is over."""
    arguments: dict[str, Any] = {"x-max-priority": MAX_PRIORITY} if KIND == "classic" else {"x-queue-type": "quorum"}
    await channel.declare_queue(QUEUE, durable=True, arguments=arguments)
    back = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": QUEUE}
    await channel.declare_queue(WAIT, durable=True, arguments={**({} if KIND == "classic" else arguments), **back})


@asynccontextmanager
async def sending() -> AsyncGenerator[Sender]:
    """Open a channel with confirms."""
    connection = await connect(URL)
    try:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        await declare(channel)

        async def one(at: int, delay_s: float | None) -> None:
            message = Message(
                encode(Invoice(at)),
                content_type="application/json",
                delivery_mode=DeliveryMode.PERSISTENT,
                message_id="7",
                type="invoice.send",
                priority=PRIORITY if KIND == "classic" else None,
                expiration=delay_s,
            )
            await channel.default_exchange.publish(message, QUEUE if delay_s is None else WAIT, mandatory=True)

        yield Sender(one, None)
    finally:
        await connection.close()


async def on_message(message: AbstractIncomingMessage) -> None:
    """Decode, run, ack."""
    job = decode(message.body)
    if MODE == "fails" and not message.redelivered:
        ran.begin()
        await message.reject(requeue=True)
        return
    ran.one(job.at)
    await message.ack()


async def consume() -> None:
    """Consume until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    connection = await connect(URL)
    channel = await connection.channel()
    await channel.set_qos(PREFETCH)
    await declare(channel)
    queue = await channel.get_queue(QUEUE)
    tag = await queue.consume(on_message)
    await stop.wait()
    await queue.cancel(tag)
    await connection.close()


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(consume())
