"""pydantic models as fields of jobs: two hooks on a base class, which every job of the service inherits.

The models are validated by pydantic, at the publisher and in the worker.
"""

import asyncio
from decimal import Decimal
from typing import Any

from pydantic import BaseModel, Field

from leveret import App, InvalidJob, Job, Queue
from leveret.testing import running


class Line(BaseModel):
    sku: str
    price: Decimal = Field(gt=0)


class Customer(BaseModel):
    name: str = Field(min_length=1)


def encode(model: Any) -> Any:
    return model.model_dump(mode="json")


def decode(kind: type[Any], value: Any) -> Any:
    return kind.model_validate(value)


class ShopJob(Job, enc_hook=encode, dec_hook=decode): ...


class SendInvoice(ShopJob, name="invoice.send", queue=Queue("emails")):
    customer: Customer
    lines: list[Line]


app = App("shop")
sent: list[tuple[str, Decimal]] = []


@app.handler
async def send_invoice(invoice: SendInvoice) -> None:
    sent.append((invoice.customer.name, sum((line.price for line in invoice.lines), Decimal(0))))


async def try_out() -> None:
    lines = [Line(sku="carrot", price=Decimal("0.10")), Line(sku="clover", price=Decimal("0.20"))]
    async with running(app) as lab:
        await lab.publish(SendInvoice(Customer(name="Ada"), lines))
        await lab.drain()
        refused = ""
        try:
            await lab.publish(SendInvoice(Customer.model_construct(name=""), lines))
        except InvalidJob as error:
            refused = str(error)
    assert "String should have at least 1 character" in refused, refused
    assert sent == [("Ada", Decimal("0.30"))], sent


if __name__ == "__main__":
    asyncio.run(try_out())
