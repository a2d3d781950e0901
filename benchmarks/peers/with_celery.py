"""Celery: solo pool, late acks, confirms, prefetch 200. On quorum queues ETAs wait in the broker (native delayed delivery)."""
# pyright: reportMissingImports=false
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from celery import Celery
from celery.result import ResultSet
from kombu import Exchange, Queue

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

arguments: Any = {"quorum": {"x-queue-type": "quorum"}, "classic": {"x-max-priority": MAX_PRIORITY}, "plain": {}}[KIND]
app = Celery("bench", broker=URL, backend=STORE)
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_transport_options={"confirm_publish": True},
    task_acks_late=True,
    task_default_queue=QUEUE,
    task_default_exchange=QUEUE,
    task_default_routing_key=QUEUE,
    result_backend_thread_safe=True,  # else a ResultSet never sees the results of what other threads published
    result_expires=KEPT_S,
    task_ignore_result=STORE is None,
    # a topic exchange: native delayed delivery needs one
    task_queues=[Queue(QUEUE, Exchange(QUEUE, type="topic"), routing_key=QUEUE, queue_arguments=arguments)],
    worker_prefetch_multiplier=PREFETCH,
)
options: dict[str, Any] = {"priority": PRIORITY} if KIND == "classic" else {}


@app.task(name="invoice.send", bind=True, default_retry_delay=0, max_retries=5)
def send_invoice(self: Any, at: int, order_id: int, email: str, text: str, tags: list[str]) -> dict[str, Any] | None:
    """Do nothing, or fail the first time."""
    if MODE == "fails" and not self.request.retries:
        ran.begin()
        raise self.retry(exc=FailedOnceError(), countdown=0)
    ran.one(at)
    return RESULT if MODE == "results" else None


@asynccontextmanager
async def sending() -> AsyncGenerator[Sender]:
    """Publish by `apply_async`, which blocks."""

    async def one(at: int, delay_s: float | None) -> Any:
        return send_invoice.apply_async(kwargs=fields(at), countdown=delay_s, **options)

    async def read(results: list[Any]) -> list[Any]:
        return list(ResultSet(results).join_native(timeout=READ_S))

    yield Sender(one, None, blocking=True, read=read)
    app.close()
