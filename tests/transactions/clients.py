"""A client of each library: transactions of the library's own kind, orders that it writes, and jobs that it publishes in them."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from functools import partial
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

import asyncpg
import psycopg
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from leveret import App, BlockingPublisher, Job, Outgoing, Publisher, Queue, Receipt
from leveret.brokers.postgresql.schema import migrate

_T = TypeVar("_T")

orders = Queue("orders")


class Order(Job, name="order.take", queue=orders):
    """What is published."""

    n: int


def shop(url: str) -> App[None]:
    """Return an app on the database."""
    return App("shop", broker=url)


async def prepare(url: str) -> None:
    """Make leveret's tables, and one of the shop's own."""
    connection = await asyncpg.connect(url)
    try:
        await migrate(connection, "leveret")
        await connection.execute("CREATE TABLE orders (n int)")
    finally:
        await connection.close()


async def there(url: str) -> tuple[list[int], list[str]]:
    """Return the orders and the ids of the jobs that are committed, sorted."""
    connection = await asyncpg.connect(url)
    try:
        ordered = [row[0] for row in await connection.fetch("SELECT n FROM orders")]
        jobs = [
            row[0]
            for row in await connection.fetch(
                "SELECT job_id FROM leveret.jobs UNION ALL SELECT job_id FROM leveret.delayed"
            )
        ]
    finally:
        await connection.close()
    return sorted(ordered), sorted(jobs)


class Client(ABC):
    """A connection of one library, and a publisher."""

    name: ClassVar[str]

    @abstractmethod
    def __init__(self, publisher: Publisher, blocking: BlockingPublisher) -> None: ...

    @abstractmethod
    async def connect(self, url: str, **options: Any) -> None:
        """Connect."""

    @abstractmethod
    def begin(self) -> AbstractAsyncContextManager[object]:
        """Return the library's block of a transaction, or of a savepoint inside one."""

    @abstractmethod
    async def execute(self, sql: str) -> None:
        """Execute a statement."""

    @abstractmethod
    async def publish(self, job: Job, **options: Any) -> Receipt:
        """Publish a job in the transaction."""

    @abstractmethod
    async def publish_many(self, jobs: Sequence[Job | Outgoing], **options: Any) -> list[Receipt]:
        """Publish jobs in the transaction."""

    @abstractmethod
    async def drop(self) -> None:
        """Close the socket, whatever is under way."""

    @abstractmethod
    async def close(self) -> None:
        """Close what is open."""

    async def order(self, n: int) -> None:
        """Write an order."""
        await self.execute(f"INSERT INTO orders VALUES ({n})")


class AsyncClient(Client):
    """A library for a loop."""

    connection: Any

    def __init__(self, publisher: Publisher, _: BlockingPublisher) -> None:
        self.publisher = publisher

    async def publish(self, job: Job, **options: Any) -> Receipt:
        return await self.publisher.publish(job, connection=self.connection, **options)

    async def publish_many(self, jobs: Sequence[Job | Outgoing], **options: Any) -> list[Receipt]:
        return await self.publisher.publish_many(jobs, connection=self.connection, **options)


class Asyncpg(AsyncClient):
    name = "asyncpg"
    connection: asyncpg.Connection

    async def connect(self, url: str, **options: Any) -> None:
        self.connection = await asyncpg.connect(url, **options)

    def begin(self) -> AbstractAsyncContextManager[object]:
        return self.connection.transaction()

    async def execute(self, sql: str) -> None:
        await self.connection.execute(sql)

    async def drop(self) -> None:
        self.connection.terminate()

    async def close(self) -> None:
        self.connection.terminate()


class AsyncpgPool(Asyncpg):
    """What a pool lends."""

    name = "asyncpg-pool"

    async def connect(self, url: str, **options: Any) -> None:
        self.pool = await asyncpg.create_pool(url, min_size=1, max_size=1, **options)
        self.connection = await self.pool.acquire()  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]

    async def close(self) -> None:
        self.pool.terminate()


class PsycopgAsync(AsyncClient):
    name = "psycopg-async"
    connection: psycopg.AsyncConnection

    async def connect(self, url: str, **options: Any) -> None:
        self.connection = await psycopg.AsyncConnection.connect(url, autocommit=True, **options)

    def begin(self) -> AbstractAsyncContextManager[object]:
        return self.connection.transaction()

    async def execute(self, sql: str) -> None:
        await self.connection.execute(sql.encode())

    async def drop(self) -> None:
        self.connection.pgconn.finish()

    async def close(self) -> None:
        await self.connection.close()


class SqlalchemyAsync(AsyncClient):
    name = "sqlalchemy-asyncpg"
    driver = "asyncpg"
    engine: AsyncEngine
    connection: AsyncConnection

    async def connect(self, url: str, **options: Any) -> None:
        self.engine = create_async_engine(url.replace("postgresql:", f"postgresql+{self.driver}:"), **options)
        self.connection = await self.engine.connect()

    @asynccontextmanager
    async def begin(self) -> AsyncGenerator[None]:
        begin = self.connection.begin_nested if self.connection.in_transaction() else self.connection.begin
        async with begin():
            yield

    async def execute(self, sql: str) -> None:
        await self.connection.exec_driver_sql(sql)

    async def drop(self) -> None:
        raw = (await self.connection.get_raw_connection()).driver_connection
        if isinstance(raw, asyncpg.Connection):
            raw.terminate()
        else:
            raw.pgconn.finish()  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]

    async def close(self) -> None:
        await self.connection.close()
        await self.engine.dispose()


class SqlalchemyAsyncPsycopg(SqlalchemyAsync):
    name = "sqlalchemy-psycopg-async"
    driver = "psycopg"


class SqlalchemyAsyncSession(AsyncClient):
    name = "sqlalchemy-asyncsession"
    engine: AsyncEngine
    connection: AsyncSession

    async def connect(self, url: str, **options: Any) -> None:
        self.engine = create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:"), **options)
        self.connection = AsyncSession(self.engine)

    @asynccontextmanager
    async def begin(self) -> AsyncGenerator[None]:
        begin = self.connection.begin_nested if self.connection.in_transaction() else self.connection.begin
        async with begin():
            yield

    async def execute(self, sql: str) -> None:
        await self.connection.execute(sqlalchemy.text(sql))

    async def drop(self) -> None:
        raw = await (await self.connection.connection()).get_raw_connection()
        raw.driver_connection.terminate()  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]

    async def close(self) -> None:
        await self.connection.close()
        await self.engine.dispose()


class BlockingClient(Client):
    """A library for threads, with a thread of its own."""

    connection: Any

    def __init__(self, _: Publisher, publisher: BlockingPublisher) -> None:
        self.publisher = publisher
        self.thread = ThreadPoolExecutor(1)

    async def call(self, function: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
        """Call a function in the connection's thread."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, partial(function, *arguments, **options))

    async def publish(self, job: Job, **options: Any) -> Receipt:
        return await self.call(self.publisher.publish, job, connection=self.connection, **options)

    async def publish_many(self, jobs: Sequence[Job | Outgoing], **options: Any) -> list[Receipt]:
        return await self.call(self.publisher.publish_many, jobs, connection=self.connection, **options)

    @abstractmethod
    def block(self) -> AbstractContextManager[object]:
        """Return the library's block."""

    @asynccontextmanager
    async def begin(self) -> AsyncGenerator[None]:
        block = await self.call(self.block)
        await self.call(block.__enter__)
        try:
            yield
        except BaseException as error:
            if not await self.call(block.__exit__, type(error), error, error.__traceback__):
                raise
        else:
            await self.call(block.__exit__, None, None, None)


class Psycopg(BlockingClient):
    name = "psycopg"
    connection: psycopg.Connection

    async def connect(self, url: str, **options: Any) -> None:
        self.connection = await self.call(psycopg.Connection.connect, url, autocommit=True, **options)

    def block(self) -> AbstractContextManager[object]:
        return self.connection.transaction()

    async def execute(self, sql: str) -> None:
        await self.call(self.connection.execute, sql.encode())

    async def drop(self) -> None:
        self.connection.pgconn.finish()

    async def close(self) -> None:
        await self.call(self.connection.close)


class Sqlalchemy(BlockingClient):
    name = "sqlalchemy"
    connection: sqlalchemy.Connection

    async def connect(self, url: str, **options: Any) -> None:
        self.engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), **options)
        self.connection = await self.call(self.engine.connect)

    def block(self) -> AbstractContextManager[object]:
        return self.connection.begin_nested() if self.connection.in_transaction() else self.connection.begin()

    async def execute(self, sql: str) -> None:
        await self.call(self.connection.exec_driver_sql, sql)

    async def drop(self) -> None:
        self.connection.connection.driver_connection.pgconn.finish()  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]

    async def close(self) -> None:
        await self.call(self.connection.close)
        await self.call(self.engine.dispose)


class SqlalchemySession(BlockingClient):
    name = "sqlalchemy-session"
    connection: Session

    async def connect(self, url: str, **options: Any) -> None:
        self.engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), **options)
        self.connection = Session(self.engine)

    def block(self) -> AbstractContextManager[object]:
        return self.connection.begin_nested() if self.connection.in_transaction() else self.connection.begin()

    async def execute(self, sql: str) -> None:
        await self.call(self.connection.execute, sqlalchemy.text(sql))

    async def drop(self) -> None:
        raw = (await self.call(self.connection.connection)).connection.driver_connection
        raw.pgconn.finish()  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]

    async def close(self) -> None:
        await self.call(self.connection.close)
        await self.call(self.engine.dispose)


class Django(BlockingClient):
    name = "django"
    connection: Any
    alias = "default"

    async def connect(self, url: str, **options: Any) -> None:
        await self.call(self._connect, url)

    def _connect(self, url: str) -> None:
        use_django(url)
        from django.db import connection, connections

        self.connection = connection
        self.opened = connections["default"]
        self.opened.ensure_connection()

    def block(self) -> AbstractContextManager[object]:
        from django.db import transaction

        block: Any = transaction.atomic()
        return block

    async def execute(self, sql: str) -> None:
        def execute() -> None:
            with self.connection.cursor() as cursor:
                cursor.execute(sql)

        await self.call(execute)

    async def drop(self) -> None:
        self.opened.connection.pgconn.finish()

    async def close(self) -> None:
        await self.call(self.opened.close)


class DjangoAlias(Django):
    """Publishes on the alias."""

    name = "django-alias"

    async def publish(self, job: Job, **options: Any) -> Receipt:
        return await self.call(self.publisher.publish, job, connection="default", **options)


def use_django(url: str) -> None:
    """Let Django's default connection, in this thread, be to the database."""
    import django
    from django import db
    from django.conf import settings

    connections: Any = db.connections
    parts = urlsplit(url)
    database = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.path[1:],
        "USER": parts.username,
        "PASSWORD": parts.password,
        "HOST": parts.hostname,
        "PORT": parts.port,
    }
    if not settings.configured:
        settings.configure(
            DATABASES={"default": database, "other": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
        )
        django.setup()
    connections.settings["default"].update(database)


CLIENTS: dict[str, type[Client]] = {
    client.name: client
    for client in (
        Asyncpg, AsyncpgPool, PsycopgAsync, SqlalchemyAsync, SqlalchemyAsyncPsycopg, SqlalchemyAsyncSession,
        Psycopg, Sqlalchemy, SqlalchemySession, Django, DjangoAlias,
    )
}  # fmt: skip


@asynccontextmanager
async def client(name: str, url: str, **options: Any) -> AsyncGenerator[Client]:
    """Connect a client of a library, with an app's publisher."""
    app, kind = shop(url), CLIENTS[name]
    async with app.publisher() as publisher:
        blocking = app.blocking_publisher()
        made = kind(publisher, blocking)
        await made.connect(url, **options)
        try:
            yield made
        finally:
            await made.close()
            blocking.close()
