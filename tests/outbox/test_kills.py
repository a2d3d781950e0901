"""Relay, RabbitMQ and PostgreSQL are killed at random under random transactions."""

import asyncio
import random
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from leveret import App, Attempt, Job, Publisher, PublishError, Queue
from leveret.brokers.postgresql.schema import migrate
from leveret.middleware import Retries
from tests.conftest import StartNode, StartPostgres
from tests.outbox.shop import PATIENCE_S, eventually
from tests.postgres import node as postgresql
from tests.rabbit.node import Node

_LOST = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, PublishError, TimeoutError)
_QUEUE = Queue("orders")


class Order(Job, name="order", queue=_QUEUE):
    """A job of the shop."""

    n: int


class Orders:
    """Writes orders and their jobs in random transactions, and knows what became of each."""

    def __init__(self, url: str, rng: random.Random) -> None:
        self._url = url
        self._rng = rng
        self._number = 0
        self.known: dict[str, set[str]] = {"committed": set(), "rolled back": set(), "unknown": set()}

    async def take(self, publisher: Publisher, until: asyncio.Event) -> None:
        """Take orders until the event."""
        while not until.is_set():
            with suppress(*_LOST):
                connection = await asyncpg.connect(self._url, timeout=5)
                try:
                    while not until.is_set():
                        await self._transact(publisher, connection)
                        await asyncio.sleep(self._rng.uniform(0, 0.01))
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
                await publisher.publish(Order(n), connection=connection, job_id=f"order-{n}", **options)
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


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.fault)])
async def test_each_committed_order_has_its_effect_exactly_once(
    kills: int, tmp_path: Path, rabbit_node: StartNode, postgres_node: StartPostgres
) -> None:
    """An order without its invoice, an invoice without its order, or a customer who pays twice."""
    rng, server, rabbit = random.Random(kills), await postgres_node(), await rabbit_node()
    async with server.database() as url:
        connection = await asyncpg.connect(url)
        await migrate(connection, "leveret")
        await connection.execute("CREATE TABLE orders (n int); CREATE TABLE effects (job_id text)")
        await connection.close()
        app, ran = (
            App("shop", broker=rabbit.url, outbox=url, middleware=[Retries(max_attempts=1000, base_s=0.25, cap_s=1)]),
            Counter[str](),
        )

        @app.handler(remember=False)
        async def order(_: Order, attempt: Attempt[Any]) -> None:
            effect = await asyncpg.connect(url, timeout=5)
            try:
                async with effect.transaction():
                    if await attempt.once(connection=effect):
                        await effect.execute("INSERT INTO effects VALUES ($1)", attempt.job_id)
            finally:
                effect.terminate()
            ran[attempt.job_id] += 1

        orders, stopped = Orders(url, rng), asyncio.Event()
        relays = [Relay(_folder(tmp_path, name), rabbit.url, url) for name in ("one", "two")]
        async with app.publisher() as publisher, app.worker():
            taking = [asyncio.create_task(orders.take(publisher, stopped)) for _ in range(3)]
            for number in range(kills):
                before = len(orders.known["committed"])
                await eventually(lambda before=before: len(orders.known["committed"]) > before + 50)  # type: ignore[misc]
                await _kill(
                    (relays[0], rabbit, server, relays[1])[number % 4] if kills > 4 else (rabbit, server)[number]
                )
            stopped.set()
            await asyncio.gather(*taking)
            committed, rolled_back = orders.known["committed"], orders.known["rolled back"]
            await eventually(lambda: not committed - set(ran), lambda: committed - set(ran))
            await _empty(url)
            there = {f"order-{row['n']}" for row in await server.query("SELECT n FROM orders", url=url)}
            await eventually(lambda: not there - set(ran), lambda: there - set(ran))
        for relay in relays:
            relay.kill9()
        effects = Counter(row["job_id"] for row in await server.query("SELECT job_id FROM effects", url=url))

    assert committed <= there <= committed | orders.known["unknown"]
    assert not rolled_back & set(ran)
    assert effects == Counter(there)


def _folder(parent: Path, name: str) -> Path:
    made = parent / name
    made.mkdir()
    return made


async def _kill(victim: "Relay | Node | postgresql.Node") -> None:
    if isinstance(victim, Relay):
        victim.kill9()
        victim.start()
    else:
        await victim.kill9()
        await victim.start()


async def _empty(url: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            connection = await asyncpg.connect(url)
            try:
                if not await connection.fetchval("SELECT count(*) FROM leveret.outbox"):
                    return
            finally:
                connection.terminate()
            await asyncio.sleep(0.05)
