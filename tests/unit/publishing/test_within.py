"""Publishing inside a user's transaction, without a database: what is checked, what runs where, and what the caller gets."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest

from leveret import (
    App,
    Attempt,
    BlockingHandle,
    BlockingPublisher,
    BrokerUnavailable,
    Envelope,
    Handle,
    InvalidJob,
    Job,
    Keep,
    Outgoing,
    Publish,
    Publisher,
    PublishError,
    PublishManyError,
    PublishTimeout,
    Queue,
    Receipt,
)
from leveret.brokers.memory import MemoryBroker, MemoryStore
from leveret.layer import AnyLayer
from leveret.publishing.publisher import PublisherBlock
from leveret.publishing.sender import Sender
from leveret.results.results import Results
from leveret.runtime import Runtime
from leveret.store import Key, Store
from leveret.testing import attempt as make_attempt
from leveret.testing import running, running_sync
from leveret.transactions import Add, AddBlocking, AsyncTransaction, Transaction
from tests.unit.results.levers import change, memory_jobs

orders = Queue("orders")


class Order(Job, name="order.take", queue=orders):
    """A job."""

    n: int


class Session:
    """A connection that keeps what was added to its transaction."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.added: list[Envelope] = []
        self.calls = 0
        self.threads: set[threading.Thread] = set()
        self.error = error

    def add(self, jobs: Sequence[tuple[Queue, Envelope]], _deadline: float) -> None:
        self.calls += 1
        self.threads.add(threading.current_thread())
        if self.error is not None:
            raise self.error
        assert {queue for queue, _ in jobs} == {orders}
        self.added += (envelope for _, envelope in jobs)

    def in_transaction(self) -> bool:
        return True

    def commit(self) -> None: ...


class AsyncSession:
    """The same for a loop."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.session = Session(error)

    async def add(self, jobs: Sequence[tuple[Queue, Envelope]], deadline: float) -> None:
        self.session.add(jobs, deadline)

    def in_transaction(self) -> bool:
        return True

    async def commit(self) -> None: ...


class Database:
    """An outbox that publishes in these."""

    def within(self, connection: AsyncTransaction, /) -> Add:
        if not isinstance(connection, AsyncSession):
            msg = "a session, please"
            raise InvalidJob(msg)
        return connection.add

    def within_blocking(self, connection: Transaction, /) -> AddBlocking:
        if not isinstance(connection, Session):
            msg = "a session, please"
            raise InvalidJob(msg)
        connection.threads.add(threading.current_thread())
        return connection.add


@asynccontextmanager
async def opened(
    *layers: AnyLayer, store: MemoryStore | None = None, results: Store | None = None
) -> AsyncGenerator[Publisher]:
    """Open a publisher with this outbox."""
    runtime = Runtime(app="within")
    broker = MemoryBroker(store or MemoryStore(), runtime)
    kept = None if results is None else Results(results, runtime)
    sender = Sender(broker, layers, runtime, outbox=Database(), open_results=lambda: kept)
    publisher = Publisher(sender)
    yield publisher
    publisher.close()
    await sender.close()
    await broker.close()


class Report(Job, name="report.make", queue=orders, keep=Keep()):
    """A job whose state is kept."""


async def test_the_store_hears_of_a_job_in_a_transaction_when_it_starts() -> None:
    """A job whose transaction was rolled back would wait in the store for ever."""
    session, results = AsyncSession(), memory_jobs()

    async with opened(results=results) as publisher:
        handle = await publisher.publish(Report(), connection=session)
        before = await handle.status()
        [envelope] = session.session.added
        await results.write([change(Key(handle.job_id, envelope.publish), "running", job="report.make")])
        after = await handle.status()

    assert (handle.state, before.state, after.state) == ("uncommitted", "unknown", "running")


class Tenant:
    """Sends a header; notes what it got back, and in which thread."""

    def __init__(self) -> None:
        self.receipts: list[Receipt] = []
        self.threads: set[threading.Thread] = set()
        self.errors: list[Exception] = []

    async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
        self.threads.add(threading.current_thread())
        try:
            receipt = await proceed(envelope.with_headers({"x-tenant-id": "acme"}))
        except Exception as error:
            self.errors.append(error)
            raise
        self.receipts.append(receipt)
        return receipt


async def test_the_job_goes_into_the_transaction_and_nowhere_else() -> None:
    """A job that also went to the broker would run without its order."""
    session, layer, store = AsyncSession(), Tenant(), MemoryStore()

    async with opened(layer, store=store) as publisher:
        receipt = await publisher.publish(Order(7), connection=session, job_id="seven")

    assert receipt == Handle("seven", "uncommitted")
    assert layer.receipts == [Receipt("seven", "uncommitted")]
    [added] = session.session.added
    assert (added.job_id, added.body, added.headers) == ("seven", b'{"n":7}', {"x-tenant-id": "acme"})
    assert store.state(Runtime(app="within").clock).version == MemoryStore().state(Runtime(app="within").clock).version


@pytest.mark.parametrize("layers", [(), (Tenant(),)], ids=["bare", "middleware"])
async def test_many_jobs_are_added_in_one_call_and_in_order(layers: Sequence[AnyLayer]) -> None:
    """A statement a job would cost its round trips a thousand times."""
    session = AsyncSession()

    async with opened(*layers) as publisher:
        jobs = (Outgoing(Order(n), job_id=str(n)) for n in range(2500))
        receipts = await publisher.publish_many(jobs, connection=session)

    assert session.session.calls == 1
    assert [one.job_id for one in session.session.added] == [str(n) for n in range(2500)]
    assert receipts == [Receipt(str(n), "uncommitted") for n in range(2500)]


@pytest.mark.parametrize("layers", [(), (Tenant(),)], ids=["bare", "middleware"])
async def test_many_jobs_of_which_one_is_wrong_send_nothing(layers: Sequence[AnyLayer]) -> None:
    """Who catches the error and commits would have some of the jobs, and not know which."""
    session = AsyncSession()

    async with opened(*layers) as publisher:
        wrong = Order("seven")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        with pytest.raises(PublishManyError, match="3 of 3") as caught:
            await publisher.publish_many([Order(1), wrong, Order(2)], connection=session)

    assert session.session.calls == 0
    assert [type(one) for one in caught.value.results] == [BrokerUnavailable, InvalidJob, BrokerUnavailable]
    assert "since another job of this publish_many failed: order.take to queue orders: field n" in str(caught.value)


async def test_an_error_of_the_statement_is_the_error_of_each_job() -> None:
    """A receipt would promise a job that isn't in the transaction."""
    failed = PublishTimeout("too slow", maybe_published=False)
    layer = Tenant()

    async with opened(layer) as publisher:
        with pytest.raises(PublishTimeout, match="too slow"):
            await publisher.publish(Order(1), connection=AsyncSession(failed))
        with pytest.raises(PublishManyError) as caught:
            await publisher.publish_many([Order(1), Order(2)], connection=AsyncSession(failed))

    assert caught.value.results == [failed, failed]
    assert layer.errors == [failed]


async def test_an_error_of_the_librarys_own_passes_through() -> None:
    """A service repeats its transaction after a deadlock, which it knows by its library's error."""
    async with opened(Tenant()) as publisher:
        with pytest.raises(ZeroDivisionError):
            await publisher.publish(Order(1), connection=AsyncSession(ZeroDivisionError()))
        with pytest.raises(ZeroDivisionError):
            await publisher.publish_many([Order(1)], connection=AsyncSession(ZeroDivisionError()))


class Serial:
    """Lets one publish through at a time."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()

    async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
        async with self.lock:
            await asyncio.sleep(0)
            return await proceed(envelope)


class Broken:
    """Fails."""

    async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
        raise ZeroDivisionError


async def test_middleware_with_a_lock_holds_nothing_up() -> None:
    """A publish_many would wait for itself."""
    session = AsyncSession()

    async with opened(Serial()) as publisher, asyncio.timeout(30):
        await publisher.publish_many([Order(n) for n in range(5)], connection=session)

    assert len(session.session.added) == 5


async def test_an_error_of_middleware_fails_all_jobs_of_the_call() -> None:
    """The transaction would get what was checked before the error."""
    session = AsyncSession()

    async with opened(Broken()) as publisher:
        with pytest.raises(PublishManyError, match="take: ZeroDivisionError") as caught:
            await publisher.publish_many([Order(1)], connection=session)

    assert [type(one) for one in caught.value.results] == [PublishError]
    assert session.session.calls == 0


async def test_what_the_broker_refuses_as_a_connection_is_an_invalid_job() -> None:
    """A user who passes an engine must hear it in the call."""
    async with opened() as publisher:
        connection: AsyncTransaction = object()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
        with pytest.raises(InvalidJob, match="a session, please"):
            await publisher.publish(Order(1), connection=connection)
        with pytest.raises(InvalidJob, match="a session, please"):
            await publisher.publish_many([Order(1)], connection=connection)


@pytest.mark.parametrize("url", ["memory://within", "sqlite:///within.db", "amqp://localhost/"])
async def test_a_broker_without_transactions_says_what_to_do(url: str) -> None:
    """The job would be published at once, though the order may be rolled back."""
    said = r"connection= publishes inside a transaction of yours, which this app's broker can't: use a postgresql:// broker, or App\(outbox="
    app = App("within", broker=url)

    async with app.publisher() as publisher:
        with pytest.raises(InvalidJob, match=said):
            await publisher.publish(Order(1), connection=AsyncSession())
        with pytest.raises(InvalidJob, match=said):
            await publisher.publish_many([Order(1)], connection=AsyncSession())
    blocking = app.blocking_publisher()
    with pytest.raises(InvalidJob, match=said):
        await asyncio.to_thread(blocking.publish, Order(1), connection=Session())
    await asyncio.to_thread(blocking.close)


async def test_a_misspelt_option_is_named() -> None:
    """A job would be published at once for a misspelt word, or with a default for an option."""
    async with opened() as publisher:
        with pytest.raises(TypeError, match="did you mean 'connection'"):
            await publisher.publish(Order(1), conection=AsyncSession())  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        with pytest.raises(TypeError, match="did you mean 'delay_s'"):
            await publisher.publish(Order(1), connection=AsyncSession(), delay=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@pytest.fixture
def blocking() -> Generator[Callable[..., BlockingPublisher]]:
    """Open blocking publishers."""
    publishers: list[BlockingPublisher] = []

    def open_one(*layers: AnyLayer) -> BlockingPublisher:
        publishers.append(publisher := BlockingPublisher(lambda: PublisherBlock(opened(*layers))))
        return publisher

    yield open_one
    for publisher in publishers:
        publisher.close()


def test_a_blocking_publish_uses_the_connection_in_its_own_thread(
    blocking: Callable[..., BlockingPublisher],
) -> None:
    """Django refuses its connection in any other thread, and psycopg's would be used by two."""
    session, layer = Session(), Tenant()
    publisher = blocking(layer)

    receipt = publisher.publish(Order(1), connection=session, job_id="1")
    many = publisher.publish_many([Order(2), Outgoing(Order(3), job_id="3")], connection=session)

    assert receipt == BlockingHandle("1", "uncommitted")
    assert [one.state for one in many] == ["uncommitted", "uncommitted"]
    assert [one.body for one in session.added] == [b'{"n":1}', b'{"n":2}', b'{"n":3}']
    assert session.threads == {threading.current_thread()}
    assert threading.current_thread() not in layer.threads


def test_jobs_are_read_in_the_thread_of_the_connection(blocking: Callable[..., BlockingPublisher]) -> None:
    """A generator of jobs may read the rows that its transaction has written."""
    threads = set[threading.Thread]()

    def jobs() -> Iterator[Job]:
        threads.add(threading.current_thread())
        yield Order(1)

    blocking().publish_many(jobs(), connection=Session())

    assert threads == {threading.current_thread()}


def test_errors_reach_the_blocked_caller(blocking: Callable[..., BlockingPublisher]) -> None:
    """A caller that goes on without its job would commit the order alone."""
    publisher = blocking()

    with pytest.raises(PublishTimeout, match="too slow"):
        publisher.publish(Order(1), connection=Session(PublishTimeout("too slow", maybe_published=False)))
    with pytest.raises(InvalidJob, match="a session, please"):
        publisher.publish(Order(1), connection="default")
    with pytest.raises(InvalidJob, match="not a single job"):
        publisher.publish_many(Order(1), connection=Session())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_ctrl_c_in_the_statement_is_the_callers(blocking: Callable[..., BlockingPublisher]) -> None:
    """The loop of all blocking publishers would end, and each later publish wait for nobody."""
    publisher = blocking()

    with pytest.raises(KeyboardInterrupt):
        publisher.publish(Order(1), connection=Session(KeyboardInterrupt()))

    session = Session()
    publisher.publish(Order(2), connection=session)
    assert len(session.added) == 1


class Waits:
    """Takes its time."""

    async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
        await asyncio.sleep(30)
        return await proceed(envelope)


def test_middleware_that_waits_too_long_sends_nothing_later(blocking: Callable[..., BlockingPublisher]) -> None:
    """A caller that has heard of the time-out goes on with its connection, and a late statement would get in between."""
    session = Session()

    with pytest.raises(PublishTimeout, match=r"nothing was sent within .* s: middleware waits") as caught:
        blocking(Waits()).publish(Order(1), connection=session, timeout_s=0.01)

    assert not caught.value.maybe_published
    assert not session.added


app = App("within")


@app.handler
def take(job: Order, attempt: Attempt) -> None:
    """Publish a follower in a transaction."""
    if job.n:
        attempt.publish_blocking(Order(job.n - 1), connection="default")


async def test_in_a_lab_the_job_is_published_at_once() -> None:
    """A test of a view has no database, or one that nobody commits."""
    blocking = app.blocking_publisher()

    async with running(app) as lab, app.publisher() as publisher:
        receipt = await publisher.publish(Order(1), connection=AsyncSession(ZeroDivisionError()))
        await publisher.publish_many([Order(0)], connection=AsyncSession(ZeroDivisionError()))
        await asyncio.to_thread(blocking.publish, Order(0), connection="default")
        await asyncio.to_thread(blocking.publish_many, [Order(0)], connection="default")
        await lab.drain()

        assert receipt.state == "uncommitted"
        assert [one.n for one in lab.published_of(Order)] == [1, 0, 0, 0, 0]
        assert len(lab.done) == 5


def test_in_a_lab_without_async_too() -> None:
    """A TestCase of Django never commits its transaction."""
    blocking = app.blocking_publisher()

    with running_sync(app) as lab:
        blocking.publish(Order(2), connection="default")
        lab.drain()

        assert len(lab.done) == 3


async def test_the_attempt_of_a_test_publishes_at_once() -> None:
    """A handler that publishes in its transaction couldn't be called in a test."""
    made = make_attempt()

    receipt = await made.publish(Order(1), connection=AsyncSession(ZeroDivisionError()))
    await asyncio.to_thread(take, Order(2), made)

    assert receipt.state == "uncommitted"
    assert list(made.published_of(Order)) == [Order(1), Order(1)]
