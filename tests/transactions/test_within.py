"""A job that is published in a transaction is there if, and only if, the transaction is committed: with each library."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager

import asyncpg
import psycopg
import pytest
import pytest_asyncio
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from leveret import (
    BrokerUnavailable,
    ConfigurationError,
    InvalidJob,
    Job,
    Outgoing,
    PublishManyError,
    PublishTimeout,
    Receipt,
)
from tests.postgres.node import Postgres
from tests.transactions import model
from tests.transactions.clients import CLIENTS, Django, Order, client, prepare, shop, there

_TWINS = {"asyncpg-pool", "django-alias", "sqlalchemy-psycopg-async"}  # of others, where only the first way is another
each = pytest.mark.parametrize("name", [name for name in CLIENTS if name not in _TWINS])
one_a_library = pytest.mark.parametrize(
    "name", ["asyncpg", "psycopg-async", "psycopg", "sqlalchemy-asyncpg", "sqlalchemy-session", "django"]
)


@pytest.fixture(scope="module")
def database(postgres: Postgres) -> Generator[str]:
    """The module's database, with the tables of leveret and of the shop."""
    with asyncio.Runner() as runner:
        made = postgres.database()
        url = runner.run(made.__aenter__())
        runner.run(prepare(url))
        yield url
        runner.run(made.__aexit__(None, None, None))


@pytest_asyncio.fixture
async def url(database: str) -> str:
    """The database, emptied."""
    async with admin(database) as connection:
        await connection.execute("TRUNCATE orders, leveret.jobs, leveret.delayed")
    return database


@asynccontextmanager
async def admin(url: str) -> AsyncGenerator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        connection.terminate()


class Rolled(Exception):
    """Leaves a block."""


@pytest.mark.parametrize("name", CLIENTS)
async def test_a_committed_job_is_there_once(name: str, url: str) -> None:
    """An order without its invoice, or with two."""
    async with client(name, url) as shop:
        async with shop.begin():
            await shop.order(7)
            receipt = await shop.publish(Order(7), job_id="seven")
            delayed = await shop.publish(Order(8), job_id="eight", delay_s=60, headers={"x-a": 1})
            assert await there(url) == ([], [])
        many: list[Job | Outgoing] = [Order(9), Outgoing(Order(10), job_id="ten", delay_s=60)]
        async with shop.begin():
            receipts = await shop.publish_many(many)

    assert [(one.job_id, one.state) for one in (receipt, delayed)] == [
        ("seven", "uncommitted"),
        ("eight", "uncommitted"),
    ]
    assert [one.state for one in receipts] == ["uncommitted", "uncommitted"]
    assert await there(url) == ([7], sorted(["seven", "eight", receipts[0].job_id, "ten"]))


@each
async def test_a_transaction_that_raises_leaves_no_job(name: str, url: str) -> None:
    """An invoice for an order that isn't there."""
    async with client(name, url) as shop:
        with contextlib.suppress(Rolled):
            async with shop.begin():
                await shop.order(7)
                await shop.publish(Order(7))
                await shop.publish_many([Order(8), Order(9)])
                raise Rolled

        async with shop.begin():
            await shop.publish(Order(1), job_id="after")

    assert await there(url) == ([], ["after"])


@each
async def test_a_savepoint_takes_its_jobs_along(name: str, url: str) -> None:
    """What a step of a transaction undoes would run all the same."""
    async with client(name, url) as shop, shop.begin():
        await shop.publish(Order(1), job_id="before")
        with contextlib.suppress(Rolled):
            async with shop.begin():
                await shop.order(2)
                await shop.publish(Order(2), job_id="undone")
                raise Rolled
        async with shop.begin():
            await shop.publish(Order(3), job_id="kept")
        await shop.order(4)

    assert await there(url) == ([4], ["before", "kept"])


@each
@pytest.mark.filterwarnings("ignore")  # the libraries' own, about the socket that is gone
async def test_a_client_that_disconnects_leaves_no_job(name: str, url: str) -> None:
    """A process that ends in the middle of its transaction."""
    async with client(name, url) as shop:
        with contextlib.suppress(Exception):
            async with shop.begin():
                await shop.order(7)
                await shop.publish(Order(7))
                await shop.drop()
                with pytest.raises((BrokerUnavailable, InvalidJob), match=r"connection= |connection"):
                    await shop.publish(Order(8))

    assert await there(url) == ([], [])


@each
async def test_a_statement_that_takes_too_long_leaves_the_transaction_usable(name: str, url: str) -> None:
    """A migration that locks the tables for a moment would cost the user's whole transaction."""
    async with admin(url) as other, client(name, url) as shop, shop.begin():
        await shop.order(1)
        await shop.execute("SET LOCAL statement_timeout = '77s'")
        async with other.transaction():
            await other.execute("LOCK TABLE leveret.jobs IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(PublishTimeout, match="wasn't added to the transaction") as caught:
                await shop.publish(Order(2), job_id="late", timeout_s=0.3)
            with pytest.raises(PublishManyError, match="none of 2 jobs was added to the transaction"):
                await shop.publish_many([Order(3), Order(4)], timeout_s=0.3)
        await shop.publish(Order(5), job_id="in time")
        await shop.execute(
            "DO $$ BEGIN ASSERT current_setting('statement_timeout') = '77s', current_setting('statement_timeout'); END $$"
        )

    assert caught.value.maybe_published is False
    assert await there(url) == ([1], ["in time"])


@one_a_library
async def test_what_postgresql_does_not_take_is_refused_before_a_statement(name: str, url: str) -> None:
    """A refusal of the server would end the transaction in a library without savepoints."""
    async with client(name, url) as shop, shop.begin():
        await shop.order(1)
        with pytest.raises(InvalidJob, match="PostgreSQL takes no text with a NUL"):
            await shop.publish(Order(2), job_id="a\0b")
        with pytest.raises(PublishManyError, match="PostgreSQL takes no text with a NUL"):
            await shop.publish_many([Order(3), Outgoing(Order(4), correlation_id="a\0b")])
        with pytest.raises(InvalidJob, match="field n: expected int"):
            await shop.publish(Order("two"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        await shop.publish(Order(5), job_id="right")

    assert await there(url) == ([1], ["right"])


@pytest.mark.parametrize(
    "name", [name for name in CLIENTS if not name.startswith("sqlalchemy")]
)  # which begins one by itself
async def test_outside_a_transaction_nothing_is_published(name: str, url: str) -> None:
    """The job would run, whatever becomes of the order."""
    async with client(name, url) as shop:
        with pytest.raises(
            InvalidJob,
            match=r"connection= has no open transaction: open one with `(async )?with .*`, or publish without",
        ):
            await shop.publish(Order(1))

    assert await there(url) == ([], [])


@one_a_library
async def test_a_database_without_the_schema_says_what_to_do(name: str, postgres: Postgres) -> None:
    """A service whose database was never migrated, or whose connection is to another one."""
    async with client(name, postgres.url) as shop, shop.begin():
        with pytest.raises(InvalidJob, match=r"hasn't the schema 'leveret' of this app.*run `leveret migrate`"):
            await shop.publish(Order(1))
        await shop.execute("SELECT 1")  # the transaction goes on


@one_a_library
async def test_a_transaction_that_failed_is_named(name: str, url: str) -> None:
    """The library's own text would say that commands are ignored, and of which job."""
    async with client(name, url) as shop:
        with contextlib.suppress(Exception):
            async with shop.begin():
                await shop.order(1)
                with pytest.raises(Exception, match="nothing"):
                    await shop.execute("SELECT nothing FROM orders")
                with pytest.raises(InvalidJob, match="has a transaction that failed: roll it back"):
                    await shop.publish(Order(1))
                raise Rolled

    assert await there(url) == ([], [])


@one_a_library
async def test_a_role_without_the_right_leaves_the_transaction_usable(name: str, url: str, postgres: Postgres) -> None:
    """An operator must read which right is missing."""
    async with postgres.role(url) as poor, admin(url) as connection:
        await connection.execute("GRANT INSERT ON orders TO PUBLIC; GRANT USAGE ON SCHEMA leveret TO PUBLIC")
        async with client(name, poor) as shop, shop.begin():
            await shop.order(1)
            with pytest.raises(BrokerUnavailable, match="permission denied for function add_jobs") as caught:
                await shop.publish(Order(1))

    assert isinstance(caught.value.__cause__, ConfigurationError)  # waiting won't help

    assert await there(url) == ([1], [])


@one_a_library
async def test_the_librarys_own_error_ends_a_transaction_that_must_be_repeated(name: str, url: str) -> None:
    """Services repeat a transaction after a deadlock or a serialization failure, which they know by their library's error."""
    trigger = "RAISE EXCEPTION 'come again' USING ERRCODE = '40001'"
    async with admin(url) as connection:
        await connection.execute(
            f"CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {trigger}; END $$;"
            " CREATE TRIGGER again BEFORE INSERT ON leveret.jobs FOR EACH ROW EXECUTE FUNCTION again()"
        )
        try:
            async with client(name, url) as shop:
                with contextlib.suppress(Rolled):
                    async with shop.begin():
                        with pytest.raises(Exception, match="come again") as caught:
                            await shop.publish(Order(1))
                        raise Rolled
        finally:
            await connection.execute("DROP FUNCTION again CASCADE")

    assert type(caught.value).__module__.partition(".")[0] in {"asyncpg", "psycopg", "sqlalchemy", "django"}


@one_a_library
async def test_many_large_jobs_are_several_statements_of_one_savepoint(name: str, url: str) -> None:
    """A statement of any size would be one of gigabytes."""
    async with client(name, url) as shop:
        async with shop.begin():
            await shop.publish_many([Order(n) for n in range(6000)])
        async with admin(url) as connection:
            rows = await connection.fetch(
                "SELECT convert_from(body, 'UTF8')::json ->> 'n' FROM leveret.jobs ORDER BY seq"
            )

    assert [int(row[0]) for row in rows] == list(range(6000))


async def test_what_is_not_a_connection_is_refused(url: str) -> None:
    """A pool or an engine would publish at once, on a connection of its own."""
    engine = create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:"))
    async with (
        shop(url).publisher() as publisher,
        asyncpg.create_pool(url, min_size=1) as pool,
        await psycopg.AsyncConnection.connect(url) as psycopg_connection,
        engine.connect() as sqlalchemy_connection,
    ):
        for wrong in (
            pool,
            engine,
            psycopg_connection.cursor(),
            sqlalchemy_connection.begin(),
            async_sessionmaker(engine),
            await sqlalchemy_connection.get_raw_connection(),
        ):
            with pytest.raises(
                InvalidJob,
                match=r"connection= takes asyncpg's .*; an engine, a pool, a cursor or a scoped_session isn't one: pass the connection",
            ):
                await publisher.publish(Order(1), connection=wrong)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        with pytest.raises(
            InvalidJob,
            match=r"SQLAlchemy's AsyncConnection or AsyncSession, with an open transaction, not builtins.object",
        ):
            await publisher.publish(Order(1), connection=object())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        lent = await pool.acquire()
        await pool.release(lent)
        with pytest.raises(InvalidJob, match=r"connection= can't be used: .*released"):
            await publisher.publish(Order(1), connection=lent)
    await engine.dispose()


async def test_a_connection_of_the_other_kind_says_which_publisher_takes_it(url: str) -> None:
    """Blocking code that is called from a loop would hold up all of it."""
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    app = shop(url)
    blocking = app.blocking_publisher()
    connection = await asyncpg.connect(url)
    async with app.publisher() as publisher:
        with pytest.raises(InvalidJob, match="a scoped_session isn't one"):
            await asyncio.to_thread(blocking.publish, Order(1), connection=scoped_session(sessionmaker(engine)))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        with psycopg.Connection.connect(url) as one, engine.connect() as two, Session(engine) as three:
            for wrong in (one, two, three):
                with pytest.raises(
                    InvalidJob, match=r"publish with app.blocking_publisher\(\), and in a `def` handler with"
                ):
                    await publisher.publish(Order(1), connection=wrong)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        with pytest.raises(InvalidJob, match=r"publish with app.publisher\(\), and in an `async def` handler with"):
            await asyncio.to_thread(blocking.publish, Order(1), connection=connection)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    connection.terminate()
    engine.dispose()
    await asyncio.to_thread(blocking.close)


async def test_a_connection_that_can_publish_nothing_says_why(url: str) -> None:
    """The words of the libraries say nothing of the job."""
    engine = create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:"), isolation_level="AUTOCOMMIT")
    lite = sqlalchemy.create_engine("sqlite://")
    app = shop(url)
    blocking = app.blocking_publisher()

    async with app.publisher() as publisher:
        closed = await psycopg.AsyncConnection.connect(url)
        await closed.close()
        with pytest.raises(InvalidJob, match="connection= is closed"):
            await publisher.publish(Order(1), connection=closed)
        async with await psycopg.AsyncConnection.connect(url) as piped, piped.pipeline():
            with pytest.raises(InvalidJob, match="connection= is in pipeline mode"):
                await publisher.publish(Order(1), connection=piped)
        async with engine.connect() as connection:
            with pytest.raises(InvalidJob, match="has no open transaction: open one with `begin"):
                await publisher.publish(Order(1), connection=connection)
        async with AsyncSession(engine) as session:
            with pytest.raises(InvalidJob, match="has no open transaction: open one with `begin"):
                await publisher.publish(Order(1), connection=session)
        with (
            lite.connect() as other,
            pytest.raises(InvalidJob, match="connection= is of sqlite: the jobs are in PostgreSQL"),
        ):
            await asyncio.to_thread(blocking.publish, Order(1), connection=other)
        with Session() as unbound, pytest.raises(InvalidJob, match="connection= can't be used: "):
            await asyncio.to_thread(blocking.publish, Order(1), connection=unbound)
    await engine.dispose()
    lite.dispose()
    await asyncio.to_thread(blocking.close)


async def test_an_alias_is_one_of_djangos(url: str) -> None:
    """A misspelt alias would be a KeyError, in whatever thread."""
    async with client("django", url) as django:
        assert isinstance(django, Django)
        with pytest.raises(
            InvalidJob, match="is an alias of a database of Django, and DATABASES has only default, other"
        ):
            await django.call(django.publisher.publish, Order(1), connection="defualt")
        with pytest.raises(InvalidJob, match="connection= is of sqlite: the jobs are in PostgreSQL"):
            await django.call(django.publisher.publish, Order(1), connection="other")


@each
async def test_publishes_at_once_on_one_connection_take_turns(name: str, url: str) -> None:
    """The savepoint of one would end that of another, with its jobs; and a gather of publishes is easily written."""
    async with client(name, url) as shop, shop.begin():
        publishes = [shop.publish(Order(n), job_id=f"{n:02}") for n in range(20)]
        wrong = [shop.publish(Order(n), job_id="a\0b") for n in range(3)]
        results = await asyncio.gather(*publishes, *wrong, return_exceptions=True)
        await shop.execute("DO $$ BEGIN ASSERT current_setting('statement_timeout') = '0'; END $$")

    assert [isinstance(one, Receipt) for one in results] == [True] * 20 + [False] * 3
    assert [type(one) for one in results[20:]] == [InvalidJob] * 3
    assert await there(url) == ([], [f"{n:02}" for n in range(20)])


async def test_random_transactions_leave_what_the_model_says(url: str) -> None:
    """An ending, or a library's savepoint, that nobody thought of. `make transactions` runs 100 000."""
    assert await model.check(url, seed=7, total=60) > 20


@pytest.mark.parametrize("name", ["asyncpg", "psycopg-async"])
async def test_a_cancelled_publish_leaves_the_transaction_usable(name: str, url: str) -> None:
    """A time limit around a publish would cost the transaction."""
    async with admin(url) as other, client(name, url) as shop, shop.begin():
        async with other.transaction():
            await other.execute("LOCK TABLE leveret.jobs IN ACCESS EXCLUSIVE MODE")
            publishing = asyncio.create_task(shop.publish(Order(1)))
            while not await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.01)
            publishing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await publishing
        await shop.order(2)
        await shop.publish(Order(2), job_id="after")

    assert await there(url) == ([2], ["after"])
