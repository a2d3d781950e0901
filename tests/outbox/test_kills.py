"""Relay, RabbitMQ and PostgreSQL are killed at random under random transactions."""

import asyncio
import random
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from leveret import App, Attempt, Job, Publisher, PublishError, Queue
from leveret.brokers.postgresql.schema import migrate
from leveret.middleware import Retries
from tests.conftest import StartNode, StartPostgres
from tests.outbox.shop import eventually
from tests.postgres.node import Postgres
from tests.rabbit.node import Node, Rabbit

_LOST = (OSError, EOFError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, PublishError)
"""What leveret too takes for the loss of a connection."""


class Orders:
    """Writes orders and their jobs in random transactions, and knows what became of each."""

    def __init__(self, url: str, rng: random.Random) -> None:
        self._url = url
        self._rng = rng
        self._number = 0
        self.queue = queue = Queue(f"orders-{uuid.uuid4().hex[:12]}")

        class Order(Job, name="order", queue=queue):
            n: int

        self._order = Order
        self.known: dict[str, set[str]] = {"committed": set(), "rolled back": set(), "unknown": set()}

    def app(self, broker: str) -> tuple[App[Any], Counter[str]]:
        """Return the app, whose handler has its effect by `once`, and how often the job of each id ran to its end."""
        ran = Counter[str]()

        @asynccontextmanager
        async def lifespan() -> AsyncGenerator[asyncpg.Pool]:
            async with asyncpg.create_pool(self._url, min_size=1, max_size=10, timeout=5) as pool:
                yield pool

        retries = Retries(max_attempts=1000, base_s=0.1, cap_s=0.5)
        app = App("shop", broker=broker, outbox=self._url, middleware=[retries], lifespan=lifespan, concurrency=10)

        async def invoice(_: Job, attempt: Attempt[asyncpg.Pool]) -> None:
            async with attempt.resources.acquire(timeout=5) as connection, connection.transaction():
                if await attempt.once(connection=connection):
                    await connection.execute("INSERT INTO effects VALUES ($1)", attempt.job_id)
            ran[attempt.job_id] += 1

        app.handler(job=self._order, remember=False)(invoice)
        return app, ran

    async def take(self, publisher: Publisher, until: asyncio.Event) -> None:
        """Take orders until the event."""
        while not until.is_set():
            with suppress(*_LOST):
                connection = await asyncpg.connect(self._url, timeout=5)
                try:
                    while not until.is_set():
                        await self._transact(publisher, connection)
                        await asyncio.sleep(self._rng.uniform(0, 0.04))
                finally:
                    connection.terminate()
            await asyncio.sleep(0.05)

    async def _transact(self, publisher: Publisher, connection: asyncpg.Connection) -> None:
        numbers = range(self._number, self._number + self._rng.randint(1, 5))
        self._number = numbers.stop
        ids, end = {f"order-{n}" for n in numbers}, "rolled back"
        try:
            await connection.execute("BEGIN")
            for n in numbers:
                await connection.execute("INSERT INTO orders VALUES ($1)", n)
                options: Any = {"delay_s": 0.5} if self._rng.random() < 0.1 else {}
                await publisher.publish(self._order(n), connection=connection, job_id=f"order-{n}", **options)
            if self._rng.random() < 0.7:
                end = "unknown"
                async with asyncio.timeout(5):
                    await connection.execute("COMMIT")
                end = "committed"
            else:
                await connection.execute("ROLLBACK")
        finally:
            self.known[end] |= ids


class Relay:
    """A `leveret relay` process."""

    def __init__(self, folder: Path, broker: str, outbox: str) -> None:
        self._folder, self._environment = (
            folder,
            {"LEVERET_BROKER": broker, "LEVERET_OUTBOX": outbox, "PATH": "/usr/bin"},
        )
        (folder / "relayed.py").write_text("from leveret import App\napp = App('shop')\n")
        self.start()

    def start(self) -> None:
        with (self._folder / "relay.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(Path(sys.executable).with_name("leveret")), "relay", "relayed:app"],
                cwd=self._folder,
                env=self._environment,
                stderr=log,
            )

    def kill9(self) -> None:
        assert self._process.poll() is None, (self._folder / "relay.log").read_text()
        self._process.kill()
        self._process.wait(10)


@pytest.mark.parametrize("kills", [pytest.param(2, id="few"), pytest.param(10, id="many", marks=pytest.mark.fault)])
async def test_each_committed_order_has_its_effect_exactly_once(
    kills: int, tmp_path: Path, rabbit: Rabbit, rabbit_node: StartNode, postgres_node: StartPostgres
) -> None:
    """An order without its invoice, an invoice without its order, or a customer who pays twice."""
    rng, server = random.Random(kills), await postgres_node()
    broker = await rabbit_node() if kills > 2 else rabbit
    async with server.database() as url:
        connection = await asyncpg.connect(url)
        await migrate(connection, "leveret")
        await connection.execute("CREATE TABLE orders (n int); CREATE TABLE effects (job_id text)")
        await connection.close()
        orders, stopped = Orders(url, rng), asyncio.Event()
        relays = [Relay(_folder(tmp_path, name), broker.url, url) for name in ("one", "two")]
        victims: list[Relay | Rabbit | Postgres] = [relays[0], server]
        if isinstance(broker, Node):
            victims += [broker, relays[1]]
        app, ran = orders.app(broker.url)
        async with app.publisher() as publisher, app.worker():
            taking = [asyncio.create_task(orders.take(publisher, stopped)) for _ in range(2)]
            for number in range(kills):
                before = len(orders.known["committed"]) + 30
                await eventually(lambda before=before: len(orders.known["committed"]) > before)  # type: ignore[misc]
                await _kill(victims[number % len(victims)])
            stopped.set()
            await asyncio.gather(*taking)
            there = {f"order-{row['n']}" for row in await server.query("SELECT n FROM orders", url=url)}
            await eventually(lambda: not there - set(ran), lambda: f"{len(there - set(ran))} orders without an invoice")
        for relay in relays:
            relay.kill9()
        effects = Counter(row["job_id"] for row in await server.query("SELECT job_id FROM effects", url=url))

    assert orders.known["committed"] <= there <= orders.known["committed"] | orders.known["unknown"]
    assert not orders.known["rolled back"] & set(ran)
    assert effects == Counter(there)


def _folder(parent: Path, name: str) -> Path:
    made = parent / name
    made.mkdir()
    return made


async def _kill(victim: Relay | Rabbit | Postgres) -> None:
    if isinstance(victim, Relay):
        victim.kill9()
        victim.start()
    else:
        await victim.kill9()
        await victim.start()
