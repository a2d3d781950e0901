"""An order and the job that sends its invoice, in one transaction of asyncpg: both are there, or neither.

It needs a PostgreSQL in which `leveret migrate --url "$DATABASE_URL"` ran: DATABASE_URL=postgresql://… python examples/orders_asyncpg.py
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import asyncpg

from leveret import App, Attempt, Job, Publisher, Queue

URL = os.environ["DATABASE_URL"]


class SendInvoice(Job, name="invoice.send", queue=Queue("emails")):
    order_id: int


class Shop:
    def __init__(self, pool: asyncpg.Pool, publisher: Publisher) -> None:
        self.pool = pool
        self.publisher = publisher

    async def take_order(self, email: str) -> int:
        async with self.pool.acquire() as connection, connection.transaction():
            order_id = await connection.fetchval("INSERT INTO orders (email) VALUES ($1) RETURNING id", email)
            await self.publisher.publish(SendInvoice(order_id), connection=connection)
            if "@" not in email:
                raise ValueError(f"no email address: {email}")  # takes the order back, and its job
        return order_id


@asynccontextmanager
async def pool() -> AsyncGenerator[asyncpg.Pool]:
    async with asyncpg.create_pool(URL, min_size=1) as opened:
        yield opened


app = App("shop", broker=URL, lifespan=pool)


@app.handler
async def send_invoice(invoice: SendInvoice, attempt: Attempt[asyncpg.Pool]) -> None:
    done = await attempt.resources.execute("UPDATE orders SET invoiced = true WHERE id = $1", invoice.order_id)
    attempt.log.info("order %d: %s", invoice.order_id, done)


async def try_out() -> None:
    async with pool() as opened, app.publisher() as publisher:
        await opened.execute("CREATE TABLE orders (id serial PRIMARY KEY, email text, invoiced bool DEFAULT false)")
        shop = Shop(opened, publisher)
        try:
            await shop.take_order("nobody")
        except ValueError as error:
            print(error)
        await shop.take_order("a@example.org")
        async with app.worker(), asyncio.timeout(30):
            while not await opened.fetchval("SELECT bool_and(invoiced) FROM orders"):
                await asyncio.sleep(0.05)
        print(await opened.fetch("SELECT email, invoiced FROM orders"))
        assert await opened.fetchval("SELECT count(*) FROM orders") == 1
        assert await opened.fetchval("SELECT count(*) FROM leveret.jobs") == 0


if __name__ == "__main__":
    asyncio.run(try_out())
