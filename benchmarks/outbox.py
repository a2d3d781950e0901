"""The relay of an outbox beside `publish_many` to the same RabbitMQ: `.venv/bin/python -m benchmarks.outbox`.

Both publish the same jobs, in turns, from one process. Before each run of the relay the jobs are published in a transaction, which isn't
timed but shown. RabbitMQ and PostgreSQL are those of the tests (LEVERET_TEST_RABBIT, LEVERET_TEST_POSTGRES), or started here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import asyncpg

from leveret import App, Job, Publisher, Queue
from leveret.brokers.postgresql.schema import migrate
from leveret.runtime import Runtime
from leveret.schemes import broker_module
from tests.postgres import node as postgresql
from tests.rabbit.node import Node, Rabbit, find_rabbit

MAILS = Queue("benchmark-outbox", priorities=False)


class Mail(Job, name="mail", queue=MAILS):
    """About 100 bytes."""

    n: int
    text: str = "x" * 80


@asynccontextmanager
async def servers() -> AsyncGenerator[tuple[str, str]]:
    """Give the URLs of a RabbitMQ and of a database. The database syncs each commit to the disk."""
    rabbit, postgres = find_rabbit(), postgresql.find_postgres()
    broker = rabbit if isinstance(rabbit, Rabbit) else Node(rabbit)
    server = postgres if isinstance(postgres, postgresql.Postgres) else postgresql.Node(postgres)
    try:
        for one in (broker, server):
            if isinstance(one, (Node, postgresql.Node)):
                await one.start()
        async with server.database() as url:
            yield broker.url, url
    finally:
        await server.close()
        await broker.close()


async def purge(app: App[None]) -> None:
    """Empty the queue, so that each run begins alike."""
    url, runtime = app.broker_url() or "", Runtime(app="benchmark")
    admin = broker_module(url).open_admin(url, runtime)
    try:
        await admin.purge(MAILS)
    finally:
        await admin.close()


async def publish(publisher: Publisher, jobs: list[Mail]) -> float:
    """Return the jobs per second of `publish_many`."""
    began = time.perf_counter()
    await publisher.publish_many(jobs, timeout_s=600)
    return len(jobs) / (time.perf_counter() - began)


async def relay(app: App[None], connection: asyncpg.Connection, relays: int, count: int) -> tuple[float, float]:
    """Return the jobs per second of one relay or more, and the CPU time for a job, µs."""
    began, cpu = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        done = asyncio.Event()

        async def one() -> None:
            async with app.relay():
                await done.wait()

        for _ in range(relays):
            group.create_task(one())
        while await connection.fetchval("SELECT EXISTS (SELECT FROM leveret.outbox)"):
            await asyncio.sleep(0.01)
        seconds, busy_s = time.perf_counter() - began, time.process_time() - cpu
        done.set()
    return count / seconds, busy_s / count * 1e6


async def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--relays", type=int, default=1, help="in this process, so that they share a core")
    parser.add_argument("--json", action="store_true", help="print the medians as JSON")
    given = parser.parse_args()
    jobs = [Mail(n) for n in range(given.jobs)]
    direct, within, relayed, cpu = list[float](), list[float](), list[float](), list[float]()
    async with servers() as (broker, url):
        connection = await asyncpg.connect(url)
        await migrate(connection, "leveret")
        app = App("benchmark", broker=broker, outbox=url)
        async with app.publisher() as publisher:
            for _ in range(given.rounds):
                direct.append(await publish(publisher, jobs))
                await purge(app)
                began = time.perf_counter()
                async with connection.transaction():
                    await publisher.publish_many(jobs, connection=connection, timeout_s=600)
                within.append(given.jobs / (time.perf_counter() - began))
                rate, busy_us = await relay(app, connection, given.relays, given.jobs)
                relayed.append(rate)
                cpu.append(busy_us)
                await purge(app)
        await connection.close()
    if given.json:
        found = {
            "share": [one / other for one, other in zip(relayed, direct, strict=True)],
            "per_s": relayed,
            "cpu_us": cpu,
            "publish_per_s": direct,
            "within_per_s": within,
        }
        print(json.dumps({name: statistics.median(values) for name, values in found.items()}))
        return
    print(f"{given.jobs} jobs of about 100 bytes, median of {given.rounds} rounds (lowest to highest), jobs per second")
    for name, rates in (("publish_many", direct), ("publish_many in a transaction", within), ("relay", relayed)):
        print(f"{name:30} {statistics.median(rates):8.0f}  ({min(rates):.0f} to {max(rates):.0f})")
    print(
        f"the relay has {statistics.median(relayed) / statistics.median(direct):.2f} of publish_many, and takes {statistics.median(cpu):.0f} µs of CPU a job"
    )


if __name__ == "__main__":
    asyncio.run(main())
