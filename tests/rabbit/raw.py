"""Plain AMQP for tests: publish as a foreign producer does, and read a queue byte for byte."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aio_pika
import aiormq
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

_DEADLINE_S = 20.0


@dataclass(frozen=True)
class Found:
    """A message as it was in a queue."""

    body: bytes
    properties: Basic.Properties  # unset ones are None
    exchange: str
    routing_key: str
    redelivered: bool

    @property
    def headers(self) -> Mapping[str, Any]:  # Any: AMQP's field table holds whatever was sent
        """The message's headers; empty if it has none."""
        return self.properties.headers or {}


class Raw:
    """One plain connection. Each call has its own channel, since an error closes the channel, and at most 20 s."""

    def __init__(self, connection: aio_pika.abc.AbstractConnection) -> None:
        self._connection = connection

    @asynccontextmanager
    async def channel(self) -> AsyncGenerator[aiormq.abc.AbstractChannel]:
        """Open a channel with confirms, for calls that have no method here."""
        async with asyncio.timeout(_DEADLINE_S):
            channel = self._connection.channel(on_return_raises=True)
            await channel.initialize()
            try:
                yield await channel.get_underlay_channel()
            finally:
                await channel.close()

    async def publish(
        self, routing_key: str, body: bytes, *, exchange: str = "", properties: Basic.Properties | None = None
    ) -> None:
        """Publish without adding any property; return once confirmed, raise DeliveryError if no queue takes the message."""
        async with self.channel() as channel:
            await channel.basic_publish(
                body,
                exchange=exchange,
                routing_key=routing_key,
                properties=properties or Basic.Properties(),
                mandatory=True,
            )

    async def declare(self, queue: str, arguments: Mapping[str, Any] | None = None) -> None:
        """Declare a durable queue."""
        async with self.channel() as channel:
            await channel.queue_declare(queue, durable=True, arguments=dict(arguments or {}))

    async def take_all(self, queue: str) -> list[Found]:
        """Take all ready messages out of the queue, in order."""
        found: list[Found] = []
        async with self.channel() as channel:
            while not isinstance((one := await channel.basic_get(queue, no_ack=True)).delivery, Basic.GetEmpty):
                found.append(_found(one))
        return found

    async def look(self, queue: str) -> list[Found]:
        """Return all ready messages and leave them in the queue, with `redelivered` set."""
        found: list[Found] = []
        # closing the channel gives the messages back in order; on 3.10 a nack with requeue doesn't keep the order
        async with self.channel() as channel:
            while not isinstance((one := await channel.basic_get(queue)).delivery, Basic.GetEmpty):
                found.append(_found(one))
        return found

    async def count(self, queue: str) -> int | None:
        """Return the number of ready messages; None if the queue doesn't exist."""
        try:
            async with self.channel() as channel:
                return (await channel.queue_declare(queue, passive=True)).message_count
        except aiormq.exceptions.ChannelNotFoundEntity:
            return None

    async def until_count(self, queue: str, expected: int | None) -> None:
        """Wait until `count` returns `expected`; TimeoutError with the last count after 20 s."""
        count = None
        try:
            async with asyncio.timeout(_DEADLINE_S):
                while (count := await self.count(queue)) != expected:
                    await asyncio.sleep(0.05)  # AMQP has no event for a depth
        except TimeoutError:
            msg = f"{queue} held {count} messages after {_DEADLINE_S:.0f} s, not {expected}"
            raise TimeoutError(msg) from None

    async def delete(self, queue: str) -> None:
        """Delete the queue and its messages, if it exists."""
        async with self.channel() as channel:
            await channel.queue_delete(queue)

    async def delete_exchange(self, exchange: str) -> None:
        """Delete the exchange, if it exists."""
        async with self.channel() as channel:
            await channel.exchange_delete(exchange)


def _found(one: DeliveredMessage) -> Found:
    assert isinstance(one.delivery, Basic.GetOk)
    return Found(
        body=bytes(one.body),
        properties=one.header.properties,
        exchange=one.delivery.exchange or "",
        routing_key=one.delivery.routing_key or "",
        redelivered=bool(one.delivery.redelivered),
    )


@asynccontextmanager
async def connect(url: str) -> AsyncGenerator[Raw]:
    """Open a plain connection for the block."""
    connection = await aio_pika.connect(url, timeout=_DEADLINE_S)
    try:
        yield Raw(connection)
    finally:
        async with asyncio.timeout(_DEADLINE_S):
            await connection.close()
