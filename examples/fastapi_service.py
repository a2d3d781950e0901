"""A FastAPI service that publishes: the publisher lives as long as the service does.

Serve it with `LEVERET_BROKER=… uvicorn examples.fastapi_service:api`; run by itself it tries itself out.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel

from leveret import App, Job, PublishError, Queue
from leveret.testing import running

emails = Queue("emails")


class SendInvoice(Job, name="invoice.send", queue=emails):
    order_id: int
    email: str


app = App("shop", default_broker="sqlite:///shop.db")


@app.handler
async def send_invoice(invoice: SendInvoice) -> None:
    print(f"invoice {invoice.order_id} to {invoice.email}")


@asynccontextmanager
async def lifespan(service: FastAPI) -> AsyncGenerator[None, None]:
    async with app.publisher() as publisher:  # doesn't wait for the broker: the service starts during an outage too
        service.state.publisher = publisher
        yield


api = FastAPI(lifespan=lifespan)


class Order(BaseModel):
    id: int
    email: str


@api.post("/orders", status_code=202)
async def take_order(order: Order, request: Request) -> dict[str, str]:
    try:
        receipt = await request.app.state.publisher.publish(SendInvoice(order.id, order.email), timeout_s=2)
    except PublishError as error:  # not confirmed: say so, rather than lose an order
        raise HTTPException(503, "try again in a moment") from error
    return {"job": receipt.job_id}


async def try_out() -> None:
    async with (
        running(app) as lab,  # the app's publishers go to a memory broker meanwhile
        api.router.lifespan_context(api),
        httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://shop") as client,
    ):
        answer = await client.post("/orders", json={"id": 7, "email": "a@example.org"})
        assert answer.status_code == 202, answer.text
        await lab.drain()
        [run] = lab.attempts(answer.json()["job"])
        assert run.job == SendInvoice(order_id=7, email="a@example.org")


if __name__ == "__main__":
    asyncio.run(try_out())
