"""An order and the job that sends its invoice, in one transaction of SQLAlchemy's session: both are there, or neither.

It needs a PostgreSQL in which `leveret migrate --url "$DATABASE_URL"` ran: DATABASE_URL=postgresql://… python examples/orders_sqlalchemy.py
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from leveret import App, Attempt, Job, Publisher, Queue

URL = os.environ["DATABASE_URL"]


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]
    invoiced: Mapped[bool] = mapped_column(default=False)


class SendInvoice(Job, name="invoice.send", queue=Queue("emails")):
    order_id: int


Sessions = async_sessionmaker[AsyncSession]


@asynccontextmanager
async def sessions() -> AsyncGenerator[Sessions]:
    engine = create_async_engine(URL.replace("postgresql:", "postgresql+asyncpg:", 1))
    yield async_sessionmaker(engine)
    await engine.dispose()


app = App("shop", broker=URL, lifespan=sessions)


async def take_order(made: Sessions, publisher: Publisher, email: str) -> None:
    async with made.begin() as session:
        order = Order(email=email)
        session.add(order)
        await session.flush()  # gives the order its id
        await publisher.publish(SendInvoice(order.id), connection=session)
        if "@" not in email:
            raise ValueError(f"no email address: {email}")  # takes the order back, and its job


@app.handler
async def send_invoice(invoice: SendInvoice, attempt: Attempt[Sessions]) -> None:
    async with attempt.resources.begin() as session:
        order = await session.get_one(Order, invoice.order_id)
        order.invoiced = True
    attempt.log.info("order %d: invoice sent", invoice.order_id)


async def try_out() -> None:
    async with sessions() as made, app.publisher() as publisher:
        async with made.begin() as session:
            await (await session.connection()).run_sync(Base.metadata.create_all)
        try:
            await take_order(made, publisher, "nobody")
        except ValueError as error:
            print(error)
        await take_order(made, publisher, "a@example.org")
        async with app.worker(), asyncio.timeout(30):
            while True:
                async with made() as session:
                    orders = (await session.scalars(select(Order))).all()
                if all(order.invoiced for order in orders):
                    break
                await asyncio.sleep(0.05)
        print([(order.email, order.invoiced) for order in orders])
        assert [order.email for order in orders] == ["a@example.org"]


if __name__ == "__main__":
    asyncio.run(try_out())
