"""FastStream: persist=True, confirms, prefetch 200, ack after the handler, orjson. It has no delays; a retry is a requeue."""
# pyright: reportMissingImports=false
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from faststream import AckPolicy, FastStream
from faststream.rabbit import Channel, RabbitBroker, RabbitQueue
from faststream.rabbit.schemas.queue import QueueType

from benchmarks.peers.shape import (
    KIND,
    MAX_PRIORITY,
    MODE,
    PREFETCH,
    PRIORITY,
    QUEUE,
    URL,
    FailedOnceError,
    Sender,
    fields,
    ran,
)

broker = RabbitBroker(
    URL, default_channel=Channel(prefetch_count=PREFETCH, publisher_confirms=True, on_return_raises=True), logger=None
)
app = FastStream(broker, logger=None)
made: Any = {
    "quorum": {"queue_type": QueueType.QUORUM},
    "classic": {"arguments": {"x-max-priority": MAX_PRIORITY}},
    "plain": {},
}[KIND]
queue = RabbitQueue(QUEUE, durable=True, **made)
options: dict[str, Any] = {"priority": PRIORITY} if KIND == "classic" else {}

if MODE == "fails":
    from faststream.rabbit.annotations import RabbitMessage

    @broker.subscriber(queue, ack_policy=AckPolicy.NACK_ON_ERROR)
    async def fail_once(job: dict[str, Any], message: RabbitMessage) -> None:
        """Fail the first time."""
        if not message.raw_message.redelivered:
            ran.begin()
            raise FailedOnceError
        ran.one(job["at"])

else:

    @broker.subscriber(queue)
    async def send_invoice(job: dict[str, Any]) -> None:
        """Do nothing."""
        ran.one(job["at"])


@asynccontextmanager
async def sending() -> AsyncGenerator[Sender]:
    """Publish by `RabbitBroker.publish`."""
    await broker.connect()
    await broker.declare_queue(queue)

    async def one(at: int, delay_s: float | None) -> None:
        if delay_s is not None:
            msg = "FastStream has no delays"
            raise NotImplementedError(msg)
        await broker.publish(fields(at), queue, persist=True, mandatory=True, message_type="invoice.send", **options)

    try:
        yield Sender(one, None)
    finally:
        await broker.stop()
