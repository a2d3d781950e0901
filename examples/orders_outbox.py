"""Orders in PostgreSQL, invoices over RabbitMQ: an outbox carries the jobs there, and `once` has each invoice written exactly once.

It needs a RabbitMQ, and a PostgreSQL in which `leveret migrate --url "$DATABASE_URL"` ran:

DATABASE_URL=postgresql://… AMQP_URL=amqp://… python examples/orders_outbox.py
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import asyncpg

from leveret import App, Attempt, Job, Queue

URL = os.environ["DATABASE_URL"]


class SendInvoice(Job, name="invoice.send", queue=Queue("invoices")):
    order_id: int


@asynccontextmanager
async def pool() -> AsyncGenerator[asyncpg.Pool]:
    async with asyncpg.create_pool(URL, min_size=1) as opened:
        yield opened


app = App("shop", broker=os.environ["AMQP_URL"], outbox=URL, lifespan=pool)


@app.handler
async def send_invoice(job: SendInvoice, attempt: Attempt[asyncpg.Pool]) -> None:
    async with attempt.resources.acquire() as connection, connection.transaction():
        if await attempt.once(connection=connection):  # False if an earlier delivery of this job has committed
            await connection.execute("INSERT INTO invoices (order_id) VALUES ($1)", job.order_id)


async def take_orders(opened: asyncpg.Pool) -> None:
    async with app.publisher() as publisher:
        for number in range(1, 21):
            async with opened.acquire() as connection:
                order = connection.transaction()
                await order.start()
                await connection.execute("INSERT INTO orders (id) VALUES ($1)", number)
                await publisher.publish(SendInvoice(number), connection=connection, job_id=f"invoice-{number}")
                await (order.commit() if number % 2 else order.rollback())
        # a job that comes twice, as after a crash: it has its effect once
        await publisher.publish(SendInvoice(1), job_id="invoice-1")


async def try_out() -> None:
    async with pool() as opened:
        await opened.execute("CREATE TABLE orders (id int PRIMARY KEY); CREATE TABLE invoices (order_id int)")
        await take_orders(opened)
        print("in the outbox:", await opened.fetchval("SELECT count(*) FROM leveret.outbox"))
        # in production: `leveret relay orders_outbox:app` and `leveret work orders_outbox:app`
        async with app.relay(), app.worker(), asyncio.timeout(30):
            while await opened.fetchval("SELECT count(DISTINCT order_id) FROM invoices") < 10:
                await asyncio.sleep(0.05)
        invoices = [row["order_id"] for row in await opened.fetch("SELECT order_id FROM invoices ORDER BY 1")]
        print("invoices:", invoices)
        assert invoices == list(range(1, 21, 2))  # each committed order once, and none that was rolled back


if __name__ == "__main__":
    asyncio.run(try_out())
