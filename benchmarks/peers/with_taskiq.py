"""Taskiq on taskiq-aio-pika: 100 tasks, qos 200, orjson, ack when executed, delays in its broker-held delay queue."""
# pyright: reportMissingImports=false, reportRedeclaration=false
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from taskiq import Context, SimpleRetryMiddleware, TaskiqDepends, gather
from taskiq.serializers import ORJSONSerializer
from taskiq_aio_pika import AioPikaBroker
from taskiq_aio_pika.exchange import Exchange
from taskiq_aio_pika.queue import Queue, QueueType

from benchmarks.peers.shape import (
    KEPT_S,
    KIND,
    MAX_PRIORITY,
    MODE,
    PREFETCH,
    PRIORITY,
    QUEUE,
    READ_S,
    RESULT,
    STORE,
    URL,
    FailedOnceError,
    Sender,
    fields,
    ran,
)

kind = QueueType.QUORUM if KIND == "quorum" else QueueType.CLASSIC
broker: Any = AioPikaBroker(
    URL,
    qos=PREFETCH,
    exchange=Exchange(name=QUEUE),
    task_queues=[Queue(name=QUEUE, type=kind, max_priority=MAX_PRIORITY if KIND == "classic" else None)],
    dead_letter_queue=Queue(name=f"{QUEUE}.dead_letter", type=kind),
    delay_queue=Queue(name=f"{QUEUE}.delay", type=kind),
).with_serializer(ORJSONSerializer())
labels: dict[str, Any] = {"priority": PRIORITY} if KIND == "classic" else {}
if STORE is not None:
    from taskiq_redis import RedisAsyncResultBackend

    # the task's own serializer; by default results are pickled
    results = RedisAsyncResultBackend[Any](STORE, result_ex_time=KEPT_S, serializer=ORJSONSerializer())
    broker = broker.with_result_backend(results)

if MODE == "fails":
    broker = broker.with_middlewares(SimpleRetryMiddleware(default_retry_count=5, default_retry_label=True))

    async def send_invoice(
        at: int,
        order_id: int,
        email: str,
        text: str,
        tags: list[str],
        context: Context = TaskiqDepends(),  # noqa: B008
    ) -> None:
        """Fail the first time."""
        if not int(context.message.labels.get("_retries", 0)):
            ran.begin()
            raise FailedOnceError
        ran.one(at)

else:

    async def send_invoice(  # type: ignore[misc]
        at: int, order_id: int, email: str, text: str, tags: list[str]
    ) -> dict[str, Any] | None:
        """Do nothing."""
        ran.one(at)
        return RESULT if MODE == "results" else None


task = broker.register_task(send_invoice, task_name="invoice.send", **labels)


@asynccontextmanager
async def sending() -> AsyncGenerator[Sender]:
    """Publish by `kiq`."""
    await broker.startup()

    async def one(at: int, delay_s: float | None) -> Any:
        if delay_s is None:
            return await task.kiq(**fields(at))
        return await task.kicker().with_labels(delay=delay_s).kiq(**fields(at))

    async def read(tasks: list[Any]) -> list[Any]:
        return [found.return_value for found in await gather(*tasks, timeout=READ_S, periodicity=0.01)]

    try:
        yield Sender(one, None, read=read)
    finally:
        await broker.shutdown()
