"""A small FastAPI service that runs its own jobs: its lifespan holds a publisher and a worker.

The service then needs no second process. Serve it with `LEVERET_BROKER=… uvicorn examples.embedded_worker:api`; run by itself it
tries itself out.
"""

import asyncio
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI, Request

from leveret import App, Job, Queue
from leveret.middleware import Retries, Timeout

folder = tempfile.TemporaryDirectory()
sent = asyncio.Event()


class SendInvoice(Job, name="invoice.send", queue=Queue("emails")):
    order_id: int


app = App("shop", default_broker=f"sqlite:///{folder.name}/shop.db", middleware=[Retries(), Timeout(30)])


@app.handler
async def send_invoice(invoice: SendInvoice) -> None:
    sent.set()


@asynccontextmanager
async def lifespan(service: FastAPI) -> AsyncGenerator[None, None]:
    async with app.publisher() as publisher, app.worker(queues=["emails"], concurrency=10, grace_s=20):
        service.state.publisher = publisher
        yield  # when the service stops, running jobs get 20 s to finish


api = FastAPI(lifespan=lifespan)


@api.post("/orders/{order_id}", status_code=202)
async def take_order(order_id: int, request: Request) -> dict[str, str]:
    receipt = await request.app.state.publisher.publish(SendInvoice(order_id), timeout_s=2)
    return {"job": receipt.job_id}


async def try_out() -> None:
    async with (
        api.router.lifespan_context(api),
        httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://shop") as client,
    ):
        answer = await client.post("/orders/7")
        assert answer.status_code == 202, answer.text
        await asyncio.wait_for(sent.wait(), 30)


if __name__ == "__main__":
    asyncio.run(try_out())
