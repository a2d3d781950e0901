"""Dramatiq: 8 threads a process, confirm_delivery, prefetch 200, its default middleware. It declares classic queues only."""
# pyright: reportMissingImports=false
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from benchmarks.peers.shape import KIND, MAX_PRIORITY, MODE, PRIORITY, QUEUE, URL, FailedOnceError, Sender, fields, ran

broker = RabbitmqBroker(url=URL, confirm_delivery=True, max_priority=MAX_PRIORITY if KIND == "classic" else None)
dramatiq.set_broker(broker)
fails: dict[str, Any] = {}
if MODE == "fails":
    from dramatiq.middleware import CurrentMessage

    broker.add_middleware(CurrentMessage())
    fails = {"max_retries": 5, "min_backoff": 1, "max_backoff": 1}


@dramatiq.actor(actor_name="invoice.send", queue_name=QUEUE, **fails)
def send_invoice(at: int, order_id: int, email: str, text: str, tags: list[str]) -> None:
    """Do nothing, or fail the first time."""
    if MODE == "fails" and not CurrentMessage.get_current_message().options.get("retries"):
        ran.begin()
        raise FailedOnceError
    ran.one_of_threads(at)


@asynccontextmanager
async def sending() -> AsyncGenerator[Sender]:
    """Publish by `send_with_options`, which blocks."""

    async def one(at: int, delay_s: float | None) -> None:
        delay = None if delay_s is None else int(delay_s * 1000)
        send_invoice.send_with_options(
            kwargs=fields(at), delay=delay, broker_priority=PRIORITY if KIND == "classic" else None
        )

    yield Sender(one, None, blocking=True)
    broker.close()
