"""Misuses: each marked line must be an error, in both checkers unless it names one; no other line may be."""

from collections.abc import AsyncIterator
from datetime import timedelta, timezone
from typing import Unpack, assert_never

import asyncpg
import msgspec
import psycopg
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, AsyncTransaction, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from tenacity import stop_after_attempt, wait_fixed

from leveret import App, Attempt, BlockingHandle, BlockingPublisher, Bury, Consume, Done, Envelope, Expired, Handle, Job, Outcome, Outgoing, OutgoingOptions, Priority, Publish, PublishOptions, Publisher, Queue, Receipt, Retry, Snooze
from leveret.middleware import Bound, Bypass, LayerFacts, RateLimit, Readiness, Retries, RetryWaits, Rule, Runtime, Stated, Timeout
from leveret.testing import Lab, running, running_sync
from leveret.testing import attempt as make_attempt
from leveret import Pubisher  # wrong: no such name, though one name of leveret is made when it is asked for
from .programs import Pool, RenderPdf, Resize, SendDigest, SendInvoice, Shop, Thumbnail, close_old_connections, emails, send_invoice, shop

class Plain(msgspec.Struct):
    order_id: int

class Wrong: ...

invoice = SendInvoice(7, "a@example.org")
app = App("shop", lifespan=shop)
bare = App("bare")

# -- jobs
SendInvoice(order_id="seven", email="a")  # wrong: order_id is an int
SendInvoice(order_id=7)  # wrong: email is missing
SendDigest("de")  # wrong: kw_only
SendDigest(region="de").region = "us"  # wrong: frozen
class NamedQueue(Job, name="x", queue="emails"): ...  # wrong (pyright only): a Queue, not its name
class Misspelt(Job, nmae="x", queue=emails): ...  # wrong (pyright only): no such class keyword
class Untimely(Job, name="x", queue=emails, expires_s="60"): ...  # wrong (pyright only): seconds are a number
class Unversioned(Job, name="x", queue=emails, version="2"): ...  # wrong (pyright only): an int
class Unhooked(Job, name="x", queue=emails, enc_hook="encode"): ...  # wrong (pyright only): a function
class Halfhooked(Job, name="x", queue=emails, dec_hook=lambda value: value): ...  # wrong (pyright only): of the type and the value
Queue("emails", type="stream")  # wrong: quorum or classic
Queue(emails)  # wrong: a name

# -- publishing
async def publishing(publisher: Publisher, blocking: BlockingPublisher) -> None:
    await publisher.publish(Plain(7))  # wrong: a Struct, not a Job
    await publisher.publish(SendInvoice)  # wrong: the class
    await publisher.publish(Outgoing(invoice))  # wrong: options go into publish itself
    await publisher.publish_many([invoice, Plain(7)])  # wrong: a Struct, not a Job
    await publisher.publish_many(invoice)  # wrong: one job
    publisher.publish(invoice)  # wrong: not awaited
    await blocking.publish(invoice)  # wrong: nothing to await
    await publisher.publish(invoice, priority="high")  # wrong: a Priority
    await publisher.publish(invoice, delay_s=timedelta(seconds=60))  # wrong: seconds
    await publisher.publish(invoice, at="2030-01-01T00:00Z")  # wrong: a datetime
    await publisher.publish(invoice, headers={"x-tenant": [1]})  # wrong: a plain value
    await app.publisher().publish(invoice)  # wrong: not entered
    with app.publisher() as _: ...  # wrong: async with
    _ = (await publisher.publish(invoice)).state == "lost"  # wrong: no such state

# -- results
async def results(publisher: Publisher, blocking: BlockingPublisher, handle: Handle[Thumbnail], other: BlockingHandle[Thumbnail]) -> None:
    await handle.result()  # wrong: for how long
    await handle.result(30)  # wrong: a keyword
    handle.status()  # wrong: not awaited
    (await handle.result(timeout_s=30)).height  # wrong: no such field
    (await handle.status()).state == "finished"  # wrong: no such state
    if await handle.abort() == "done": ...  # wrong: no such answer
    await other.result(timeout_s=30)  # wrong: nothing to await
    publisher.handle("id", Resize("a.png"))  # wrong: the class
    publisher.handle(Resize, "id")  # wrong: the id comes first
    publisher.handle("id", Plain)  # wrong: not a job class
    _: Handle[Thumbnail] = await publisher.publish(invoice)  # wrong: an invoice has no result
    await blocking.handle("id", Resize)  # wrong: nothing to await
class Unkept(Job[Thumbnail], name="x", queue=emails, keep=True): ...  # wrong (pyright only): a Keep

# -- publishing in a transaction
async def within(
    publisher: Publisher, attempt: Attempt, pool: "asyncpg.Pool[asyncpg.Record]", cursor: psycopg.AsyncCursor, engine: AsyncEngine, begun: AsyncTransaction,
    made: async_sessionmaker[AsyncSession], other: psycopg.Connection, connection: sqlalchemy.Connection, session: Session, ours: AsyncSession,
) -> None:
    await publisher.publish(invoice, connection=pool)  # wrong: a pool
    await publisher.publish(invoice, connection=pool.acquire())  # wrong: not entered
    await publisher.publish(invoice, connection=cursor)  # wrong: a cursor
    await publisher.publish(invoice, connection=engine)  # wrong: an engine
    await publisher.publish(invoice, connection=begun)  # wrong: the transaction, not its connection
    await publisher.publish(invoice, connection=made)  # wrong: what makes sessions
    await publisher.publish(invoice, connection=other)  # wrong: a blocking connection
    await publisher.publish(invoice, connection=connection)  # wrong: a blocking connection
    await publisher.publish_many([invoice], connection=session)  # wrong: a blocking session
    await publisher.publish(invoice, connection="default")  # wrong: Django's, which blocks
    await publisher.publish(invoice, conection=ours)  # wrong: misspelt
    await attempt.publish(invoice, connection=engine)  # wrong: an engine
    attempt.publish_blocking(invoice, connection=ours)  # wrong: an asynchronous session
    Outgoing(invoice, connection=ours)  # wrong: the connection is of the call
def within_blocking(
    publisher: BlockingPublisher, pool: "asyncpg.Pool[asyncpg.Record]", cursor: psycopg.Cursor, engine: sqlalchemy.Engine, made: sessionmaker[Session],
    one: AsyncConnection, two: psycopg.AsyncConnection, three: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    publisher.publish(invoice, connection=pool)  # wrong: a pool
    publisher.publish(invoice, connection=cursor)  # wrong: a cursor
    publisher.publish(invoice, connection=engine)  # wrong: an engine
    publisher.publish(invoice, connection=made)  # wrong: what makes sessions
    publisher.publish(invoice, connection=one)  # wrong: an asynchronous connection
    publisher.publish_many([invoice], connection=two)  # wrong: an asynchronous connection
    publisher.publish(invoice, connection=three)  # wrong: an asynchronous connection

# -- publish options: the same keywords in every call that publishes
async def options(publisher: Publisher, blocking: BlockingPublisher, attempt: Attempt, lab: Lab) -> None:
    await publisher.publish(invoice, delay=60)  # wrong: the unit is in the name
    await publisher.publish(invoice, job_id=7)  # wrong: a text
    await publisher.publish(invoice, timeout_s=None)  # wrong: seconds
    await publisher.publish(invoice, Priority.HIGH)  # wrong: by keyword
    blocking.publish(invoice, prioriti=Priority.HIGH)  # wrong: no such option
    blocking.publish(invoice, correlation_id=b"c")  # wrong: a text
    blocking.publish(invoice, Priority.HIGH)  # wrong: by keyword
    await attempt.publish(invoice, delay=60)  # wrong: no such option
    await attempt.publish(invoice, expires_s="60")  # wrong: seconds
    await attempt.publish(invoice, Priority.HIGH)  # wrong: by keyword
    attempt.publish(invoice)  # wrong: not awaited
    await attempt.publish_blocking(invoice)  # wrong: nothing to await
    attempt.publish_blocking(invoice, delay=60)  # wrong: no such option
    await lab.publish(invoice, header={"x-tenant-id": "a"})  # wrong: no such option
    await lab.publish(invoice, at=60)  # wrong: a datetime
    await lab.publish(invoice, 60)  # wrong: by keyword
    Outgoing(invoice, prioriti=Priority.LOW)  # wrong: no such option
    Outgoing(invoice, priority="low")  # wrong: a Priority
    Outgoing(invoice, Priority.LOW)  # wrong: by keyword
    Outgoing(invoice, timeout_s=5)  # wrong: publish_many has one for all its jobs
    of_a_job: OutgoingOptions = {"priority": Priority.LOW, "timeout_s": 5}  # wrong: it is an option of a publish, not of a job
    of_a_publish: PublishOptions = {"delay": 60}  # wrong: no such option
def in_a_thread(attempt: Attempt) -> None:
    attempt.publish(invoice)  # wrong: not awaited; a def handler has publish_blocking
async def enqueue(publisher: Publisher, **options: Unpack[PublishOptions]) -> None:
    await publisher.publish(invoice, **options)
    Outgoing(invoice, **options)  # wrong (mypy only): timeout_s may be among them
async def enqueues(publisher: Publisher) -> None:
    await enqueue(publisher, delay=60)  # wrong: a wrapper refuses what publish refuses
    await enqueue(publisher, delay_s="60")  # wrong: a wrapper refuses what publish refuses

# -- handlers
@app.handler  # wrong: the app yields Shop
async def wrong_resources(job: SendInvoice, attempt: Attempt[Wrong]) -> None: ...
@app.handler(middleware=[Timeout(5)])  # wrong: the app yields Shop
async def wrong_resources_2(job: SendInvoice, attempt: Attempt[Wrong]) -> None: ...
@bare.handler  # wrong: the app has no lifespan
def no_resources(job: SendInvoice, attempt: Attempt[Shop]) -> None: ...
@app.handler  # wrong: a Struct, not a Job
async def not_a_job(job: Plain) -> None: ...
@app.handler(job=RenderPdf)  # wrong: another job
async def another_job(job: SendInvoice) -> None: ...
@app.handler(job=RenderPdf)  # wrong: another job
async def another_job_2(job: SendInvoice, attempt: Attempt[Shop]) -> None: ...
@app.handler  # wrong: no job
async def no_job() -> None: ...
@app.handler  # wrong: a third parameter
async def three(job: SendInvoice, attempt: Attempt[Shop], more: int) -> None: ...
@app.handler  # wrong: job first
async def swapped(attempt: Attempt[Shop], job: SendInvoice) -> None: ...
@app.handler(SendInvoice)  # wrong: job=
async def positional(job: SendInvoice) -> None: ...
@app.handler  # wrong: the attempt without a job
def unused(job: Attempt) -> None: ...
def bare_attempt(job: SendInvoice, attempt: Attempt) -> None:
    print(attempt.resources.pool)  # wrong: a bare Attempt knows nothing of its resources
    attempt.number = 1  # wrong: read only
    attempt.envelope.headers["x"] = "y"  # wrong: with_headers
    attempt.envelope.queue = "x"  # wrong: frozen

# -- outcomes
Snooze()  # wrong: how long
Snooze(timedelta(seconds=30))  # wrong: seconds
Bury()  # wrong: a reason
Retry(delay=3)  # wrong: delay_s
def raises() -> None: raise Done()  # wrong: None says it; only three are raised
def raises_class() -> None: raise Snooze  # wrong: how long
class Later(Snooze): ...  # wrong: final, else no match is exhaustive
def exhaustive(outcome: Outcome) -> str:
    match outcome:
        case Done() | Expired() | Snooze() | Retry():
            return "x"
        case _:
            assert_never(outcome)  # wrong: Bury is left

# -- layers
class Sync:
    def consume(self, attempt: Attempt, proceed: Consume) -> Outcome: raise NotImplementedError
class Forgets:
    async def consume(self, attempt: Attempt, proceed: Consume) -> None:
        await proceed(attempt)
class Misnamed:
    async def consum(self, attempt: Attempt, proceed: Consume) -> Outcome: raise NotImplementedError
class Sends:
    async def publish(self, envelope: Envelope, proceed: Publish) -> None: ...
class Other:
    async def consume(self, attempt: Attempt[Wrong], proceed: Consume) -> Outcome: raise NotImplementedError
async def one_parameter(attempt: Attempt) -> Outcome: raise NotImplementedError
async def misuses_proceed(attempt: Attempt, proceed: Consume) -> Outcome:
    await proceed()  # wrong: the attempt
    return proceed(attempt)  # wrong: not awaited
async def forgets(attempt: Attempt, proceed: Consume) -> Outcome:  # wrong: returns no outcome (a burial would become done)
    await proceed(attempt)
async def resends(envelope: Envelope, proceed: Publish) -> Receipt:
    return await proceed(envelope.with_headers({"x": None}))  # wrong: a plain value
App("a", middleware=[Sync()])  # wrong: consume is async
App("a", middleware=[Forgets()])  # wrong: consume returns an outcome
App("a", middleware=[Misnamed()])  # wrong: neither consume nor publish
App("a", middleware=[Sends()])  # wrong: publish returns a receipt
App("a", middleware=[one_parameter])  # wrong: no proceed
App("a", middleware=[Retries])  # wrong: the class
App("a", middleware=Retries())  # wrong: a list
App("shop", lifespan=shop, middleware=[Other()])  # wrong: the app yields Shop
App("a", middleware=[Other()])  # wrong: the app has no lifespan
app.handler(middleware=[Other()])  # wrong: the app yields Shop
class Unready(Readiness):
    def ready_ins_s(self) -> float: raise NotImplementedError
class Awaited(Readiness):
    async def ready_in_s(self) -> float: raise NotImplementedError  # wrong: a def
class Counted(Readiness):
    def ready_in_s(self) -> float: raise NotImplementedError
    def starts_now(self, most: int) -> int: raise NotImplementedError  # wrong: no argument
class Paced(Readiness):
    def ready_in_s(self) -> float: raise NotImplementedError
    @property
    def starts_per_s(self) -> str: raise NotImplementedError  # wrong: a number
class Passes(Bypass):
    async def passes_publish(self) -> bool: raise NotImplementedError  # wrong: a def
class Unbound(Bound):
    def bind(self) -> None: ...  # wrong: the runtime
class Loose(Stated):
    def facts(self) -> dict[str, float]: raise NotImplementedError  # wrong: LayerFacts
class Clocked:
    def bind(self, runtime: Runtime) -> None: ...
Unready()  # wrong: ready_in_s is missing
not_stated: Stated = Clocked()  # wrong: no facts
LayerFacts(limit_s="soon")  # wrong: seconds
LayerFacts(30)  # wrong: limit_s=
LayerFacts(retries=[Rule(ValueError)])  # wrong: RetryWaits, in a tuple
LayerFacts(limit_s=30).limit_s = 60  # wrong: frozen
RetryWaits(on=ValueError, max_attempts=1)  # wrong: its name
RetryWaits()  # wrong: max_attempts is missing
Retries(ValueError)  # wrong: a Rule
Retries(max_attempts="5")  # wrong: an int
Retries(stop=8)  # wrong: max_attempts
Retries(wait=stop_after_attempt(8))  # wrong: a stop
Rule(ValueError, stop=wait_fixed(3))  # wrong: a wait
Rule(ValueError, stop=stop_after_attempt)  # wrong (mypy only): the class
Rule(ValueError, wait=30)  # wrong: a function, or base_s and cap_s
Rule(ValueError, wait=lambda error: error.retry_after)  # wrong: of the attempt and the error
Rule(ValueError, wait=lambda attempt, error: "30")  # wrong: seconds
Rule(ValueError, wait=lambda attempt, error: attempt.nmuber)  # wrong (pyright only): no such attribute
def delta(attempt: Attempt, error: Exception) -> timedelta: raise NotImplementedError
Rule(ValueError, wait=delta)  # wrong: seconds
async def slow(attempt: Attempt, error: Exception) -> float: raise NotImplementedError
Rule(ValueError, wait=slow)  # wrong: a def
Rule("ValueError")  # wrong: the type
Rule([ValueError])  # wrong: a tuple
Rule(ValueError())  # wrong: the type
async def asynchronous(error: Exception) -> bool: raise NotImplementedError
Rule(asynchronous)  # wrong: a def
def narrow(error: ValueError) -> bool: raise NotImplementedError
Rule(narrow)  # wrong: it is asked of every exception
RateLimit(50, 1.0)  # wrong: every_s=
Timeout(timedelta(seconds=30))  # wrong: seconds

# -- the app
async def no_manager() -> AsyncIterator[Shop]: yield Shop(Pool())
App("shop", lifespan=no_manager)  # wrong: @asynccontextmanager
App("shop", lifespan=shop())  # wrong: the function, not its call
App("shop", modules="shop.handlers")  # wrong: a list
App("shop", around_sync=close_old_connections())  # wrong: the function; each run needs its own
App("shop", settings={"validate": False})  # wrong: Settings
App("shop", concurrency="50")  # wrong: a number, or a dict of queues and numbers
async def embedded() -> None:
    async with app.worker(queues="emails"): ...  # wrong: a list
    async with app.worker(grace_s="30"): ...  # wrong: seconds
    async with app.publisher: ...  # wrong: call it

# -- cron
app.cron("0 9 * * *", SendDigest(region="us"))  # wrong: an instance has no name of its own
app.cron("0 9 * * *", SendDigest, name="digest")  # wrong: the class
app.cron("0 9 * * *", tz=timezone.utc)  # wrong: an IANA name
@app.cron("0 9 * * *")  # wrong: a job
def text() -> str: raise NotImplementedError
@app.cron("0 9 * * *")  # wrong: a def
async def asynchronous_cron() -> SendDigest: raise NotImplementedError
@app.cron("0 9 * * *")  # wrong: the slot is all that it gets
def two_parameters(slot: int, more: int) -> SendDigest: raise NotImplementedError
@app.cron  # wrong: when
def whenever() -> SendDigest: raise NotImplementedError

# -- tests
async def tests(lab: Lab) -> None:
    running(app, resources=Wrong())  # wrong: the app yields Shop
    async with running(bare, resources=Shop(Pool())): ...  # wrong: the app has no lifespan
    await lab.advance(5)  # wrong: nothing to await
    lab.drain()  # wrong: not awaited
    lab.run_due()  # wrong: not awaited
    lab.buried[0].outcome.delay_s  # wrong: a burial has a reason
    lab.published_of("invoice.send")  # wrong: takes the class
    lab.published_of(SendInvoice)[0].region  # wrong: no such field
    lab.advance_to(9)  # wrong: takes a moment
    running(app, now=0)  # wrong: takes a moment
    with running(app): ...  # wrong: async with, or running_sync
    with running_sync(app) as sync: await sync.drain()  # wrong: nothing to await
    await send_invoice(invoice, make_attempt(resources=Wrong()))  # wrong: it wants Shop
    await send_invoice(invoice, make_attempt())  # wrong: it wants Shop
    await send_invoice(invoice)  # wrong: two parameters

# What neither checker sees (each tried), and who must:
# - publishing or registering an abstract job; a handler of `Job` itself or of a union of jobs            (publish; start-up)
# - `delay_s` with `at`; a naive `at`; a delay, time-out or limit that is negative, NaN or too long           (publish; __init__)
# - an async publisher's `publish` in a lambda: `on_commit(lambda: publisher.publish(job))`                (nobody: never awaited)
# - a layer whose second method is misspelt (`publsh`) or of a wrong shape, if the first is right           (App())
# - an optional method (`ready_in_s`, `facts` …) misspelt or of a wrong shape, without its protocol as a base class     (App())
# - a layer with `once` misspelt: it is optional                                                           (nobody)
# - two layers of a `once` class in one list; a layer listed twice                                          (App())
# - a queue name in `queues=` that no handler has; a bad queue name, URL, cron expression or time zone     (start-up; __init__)
# - two handlers for one job, two jobs of one name, two schedules of one name                              (App)
# - wrong types inside a job built from `Any` (publish; of a generic job nobody: an instance of `Export[int]` is an `Export`)
# - `Rule(bool)`, or any class that is called with an exception and gives a bool                           (Rule)
# - `except Exception:` round a raised outcome; an outcome raised inside a `TaskGroup` (a group arrives)      (nobody)
# - `Attempt()` made by hand: a stub can't hide a constructor                                              (__init__)
