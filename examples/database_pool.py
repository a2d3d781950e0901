"""A worker with a database pool: opened once a worker process by the app's lifespan, and at hand in every attempt.

`App[Shop]` and `Attempt[Shop]` belong together: a handler that asks for another kind of resources is a type error.
"""

import asyncio
import sqlite3
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from leveret import App, Attempt, Job, Queue
from leveret.testing import running

folder = tempfile.TemporaryDirectory()
DATABASE = Path(folder.name, "shop.db")


class Pool:
    """Stands for your driver's pool: at most `size` connections, handed out one at a time."""

    def __init__(self, path: Path, size: int) -> None:
        self._free: asyncio.Queue[sqlite3.Connection] = asyncio.Queue()
        self.all = [
            sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=20) for _ in range(size)
        ]
        for connection in self.all:
            self._free.put_nowait(connection)

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[sqlite3.Connection, None]:
        connection = await self._free.get()
        try:
            yield connection
        finally:
            self._free.put_nowait(connection)

    def close(self) -> None:
        for connection in self.all:
            connection.close()


class Shop:
    """What this service's handlers share."""

    def __init__(self) -> None:
        self.database = Pool(DATABASE, size=3)


@asynccontextmanager
async def shop() -> AsyncGenerator[Shop, None]:
    resources = Shop()  # in the worker process, and only there: publishers never enter it
    try:
        yield resources
    finally:
        resources.database.close()  # after the last handler


app = App("shop", lifespan=shop)


class BookSale(Job, name="sale.book", queue=Queue("sales")):
    item: str
    cents: int


@app.handler
async def book_sale(sale: BookSale, attempt: Attempt[Shop]) -> None:
    async with attempt.resources.database.connection() as database:
        # A job runs at least once; its id makes a second run harmless.
        change = "INSERT INTO sales VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        await asyncio.to_thread(database.execute, change, (attempt.job_id, sale.item, sale.cents))


async def try_out() -> None:
    with sqlite3.connect(DATABASE) as database:
        database.execute("CREATE TABLE sales (job_id PRIMARY KEY, item, cents)")
    async with running(app) as lab:
        for cents in range(1, 11):
            await lab.publish(BookSale(item="book", cents=cents))
        await lab.publish(BookSale(item="book", cents=1000), job_id="till-7/42")
        await lab.publish(BookSale(item="book", cents=1000), job_id="till-7/42")
        await lab.drain()
        assert len(lab.done) == 12
    assert database.execute("SELECT count(*), sum(cents) FROM sales").fetchone() == (11, 1055)
    database.close()


if __name__ == "__main__":
    with folder:
        asyncio.run(try_out())
