"""`Publisher`: publishing from an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures import wait
from contextlib import AbstractAsyncContextManager
from threading import TIMEOUT_MAX
from types import TracebackType
from typing import Any, Never, Protocol, TypeVar, Unpack, cast, final

from ..blocks import AsyncBlock
from ..broker import PublisherState
from ..envelope import Receipt
from ..errors import BrokerUnavailable, InvalidJob, LeveretError, PublishTimeout, StoreUnavailable
from ..handle import BlockingHandle, Handle, blocking
from ..job import Job, is_job_class
from ..options import PUBLISH_OPTIONS, TIMEOUT_S, Outgoing, PublishOptions, for_outgoing, unexpected
from ..outbox import Inbox
from ..tracebacks import show_users_frames
from ..transactions import AsyncTransaction, Transaction
from .batch import Batch
from .sender import Sender, seconds_of
from .within import Handed, Within

NO_INBOX = (
    "once() notes the job in an inbox in your database, which this app doesn't have: use a postgresql:// broker, or"
    ' App(outbox="postgresql://…") beside the broker, with the URL of the database of connection=, and run `leveret migrate`'
)
_LOOK_S = 1.0
"""Seconds between two looks of a waiting thread at whether its loop still lives."""
_MARGIN_S = 0.4
"""What the answer to a blocking handle gets beyond its limit, seconds, before the loop counts as blocked."""

_R = TypeVar("_R")
_T = TypeVar("_T")


class Waits(Protocol):
    """Runs work on a loop that has no thread, and returns its result."""

    def __call__(self, work: Coroutine[Any, Any, _T], /) -> _T:
        """Return the result of `work`."""
        ...


@final
class Publisher:
    """Publishes from an event loop; made by `App.publisher`.

    Many tasks may share it; their publishes are pipelined.
    """

    def __init__(self, sender: Sender, wait: Waits | None = None) -> None:
        self._sender: Sender | None = sender
        self._wait = wait
        """Waits for a publish in `publish_blocking`, and for what its handle asks, where the loop has no thread of its own; None: as usual."""
        self._closed: PublisherState | None = None
        self._loop = asyncio._get_running_loop()
        """The event loop that its connection belongs to; None for a test's attempt that was made outside of a loop."""

    def close(self) -> None:
        """Refuse every later publish; called when the `async with` block of the publisher ends."""
        if self._sender is not None:
            self._closed = self._sender.closed_state
            self._sender = None

    def state(self) -> PublisherState:
        """Return how the publisher is now; the call costs nothing, so a readiness probe may ask as often as it likes."""
        sender = self._sender
        return sender.state if sender is not None else cast("PublisherState", self._closed)

    def _open(self, job_id: str | None = None) -> Sender:
        if self._sender is None:
            msg = "nothing was sent: this publisher is closed; publish inside its `async with app.publisher()` block"
            raise BrokerUnavailable(msg, job_id=job_id)
        if self._loop is not None and asyncio._get_running_loop() is not self._loop:
            # A connection made on a loop that ends would take all of a worker's publishes, retries and burials with it.
            msg = (
                "nothing was sent: this publisher belongs to another event loop (asyncio.run makes a new one); in a `def` handler, "
                "use attempt.publish_blocking(); in a thread, app.blocking_publisher(), kept in a variable of a module"
            )
            raise BrokerUnavailable(msg, job_id=job_id)
        return self._sender

    async def publish(
        self, job: Job[_R], *, connection: AsyncTransaction | None = None, **options: Unpack[PublishOptions]
    ) -> Handle[_R]:
        """Publish `job`, and return once the broker has confirmed the publish.

        The receipt is a handle: if the job's class has `keep`, it waits for the result, says how the job is, and aborts it.

        A confirmed job runs at least once. Every option is a keyword; `PublishOptions` has their types. None means the default, except for `timeout_s`.

        Args:
            job: An instance of a `Job` class that names its job and queue.
            priority: The job's priority. Default: the priority of its class, which is NORMAL by default.
            delay_s: Seconds before the job may run, at most 48 days. The broker holds the job. Default: 0. Excludes `at`.
            at: An aware datetime; the job doesn't run before it. A past datetime means now. Default: now. Excludes `delay_s`.
            job_id: The job's id, 1 to 200 bytes. The id identifies the job; jobs with the same id aren't deduplicated. Default: a new UUIDv7.
            correlation_id: The id that related jobs share, 1 to 200 bytes. Default: the one of the job whose handler publishes.
            headers: Headers with plain values, which every retry and replay keeps; names must not begin with `lv-`. Default: no headers.
            expires_s: Seconds after which the job no longer runs; must be above the delay. Default: the `expires_s` of its class.
            resend: Publish the job again, under its id, if the connection is lost before the confirm, for at most `timeout_s`.
                Each loss may leave one more copy in the queue. Default: False, which raises PublishTimeout.
            connection: A connection of asyncpg, psycopg or SQLAlchemy with an open transaction. The job is published if that
                transaction is committed; the receipt's `state` is "uncommitted", and the job store hears of the job when a worker
                starts it. Needs PostgreSQL as broker or as outbox. After
                an error, the job isn't in the transaction, and the transaction goes on. Default: the job is published by itself.
            timeout_s: Seconds for the whole publish, including the time to connect. Default: 5.

        Raises:
            TypeError: A keyword isn't an option.
            InvalidJob, MessageTooLarge: The job is wrong or too large; nothing was sent.
            BrokerUnavailable, Unroutable: The broker is away, or no queue took the job; the broker kept nothing.
            PublishTimeout: No confirm within `timeout_s`; see `maybe_published`. Publish again with the same `job_id`.
        """
        if connection is not None:
            return await Within(self._open(options.get("job_id")), connection).publish(job, options)
        if options and not PUBLISH_OPTIONS.issuperset(options):
            raise unexpected("publish", options, PUBLISH_OPTIONS | {"connection"})
        timeout_s = options.pop("timeout_s", TIMEOUT_S)
        return await self._open(options.get("job_id")).publish(job, options, timeout_s)

    def handle(self, job_id: str, job: type[Job[_R]]) -> Handle[_R]:
        """Return a handle of the job with this id, published by any process, by the class of the job. Asks nothing yet.

        If the id was published more than once, the handle is of the publish that the store heard of last, in whichever app: if that
        was a job of another class, it is unknown. Raises InvalidJob for a class without `keep`, an app without a job store, or an
        id that no job can have.
        """
        given: object = job
        if not is_job_class(given):
            msg = f"handle() takes a job's id and its class, not {job!r:.80}"
            raise TypeError(msg)
        return self._open(job_id).handle_of(job_id, job)

    async def once(self, connection: AsyncTransaction, queue: str, job_id: str) -> bool:
        """As `Attempt.once`."""
        sender = self._open(job_id)
        return True if sender.observed else await _inbox(sender).once(connection, queue, job_id)

    def once_blocking(self, connection: Transaction, queue: str, job_id: str) -> bool:
        """As `Attempt.once_blocking`; the statement runs in the calling thread."""
        sender, running = self._sender, asyncio._get_running_loop()
        if running is not None and running is (self._loop or running):
            msg = "once_blocking would block the event loop; in an `async def`, write await attempt.once(…)"
            raise RuntimeError(msg)
        if sender is None:
            msg = "the worker has ended"
            raise BrokerUnavailable(msg, job_id=job_id)
        return True if sender.observed else _inbox(sender).once_blocking(connection, queue, job_id)

    async def publish_handed(self, job: Job[_R], connection: Handed, options: PublishOptions) -> Handle[_R]:
        """Publish `job` on a connection of another thread, which waits; for the publishes that block."""
        return await Within(self._open(options.get("job_id")), connection).publish(job, options)

    def publish_blocking(
        self, job: Job[_R], *, connection: Transaction | None = None, **options: Unpack[PublishOptions]
    ) -> BlockingHandle[_R]:
        """Publish `job` on the publisher's loop from another thread, and wait for the confirm; otherwise as `publish`.

        With `connection=`, the statement runs in the calling thread. Raises RuntimeError on that loop, which would wait for itself.
        """
        loop, running = self._loop, asyncio._get_running_loop()
        if running is not None and running is (loop or running):
            msg = "publish_blocking would block the event loop that it waits for; in an `async def`, write await attempt.publish(…)"
            raise RuntimeError(msg)
        handed = None if connection is None else Handed(connection)
        publish = self.publish(job, **options) if handed is None else self.publish_handed(job, handed, options)
        return blocking(self._published(publish, handed, options.get("job_id")), self._ask)

    def _published(
        self, publish: Coroutine[Any, Any, Handle[_R]], handed: Handed | None, job_id: str | None
    ) -> Handle[_R]:
        """Wait for a publish on the publisher's loop."""
        loop = self._loop
        if self._wait is not None:
            return self._wait(publish)
        if loop is None:
            return asyncio.run(publish)
        try:
            future = asyncio.run_coroutine_threadsafe(publish, loop)
        except RuntimeError:  # the loop is closed
            publish.close()
            msg = "nothing was sent: the worker has ended"
            raise BrokerUnavailable(msg, job_id=job_id) from None
        while not (wait([future], _LOOK_S).done if handed is None else handed.wait(future, _LOOK_S)):
            # the publish has a deadline; only a loop that ended doesn't reach it
            if loop.is_closed():
                msg = "the worker ended before the publish was confirmed"
                raise PublishTimeout(msg, job_id=job_id, maybe_published=True)
        return future.result()

    def _ask(self, handle: Handle[_R], ask: Callable[[Handle[_R]], Coroutine[Any, Any, _T]], timeout_s: float) -> _T:
        """Ask a handle on the publisher's loop from another thread."""
        loop, running = self._loop, asyncio._get_running_loop()
        if running is not None and running is (loop or running):
            msg = (
                "a blocking handle would block the event loop that it waits for; in an `async def`, publish with await"
            )
            raise RuntimeError(msg)
        work = ask(handle)
        if self._wait is not None:
            return self._wait(work)
        return answered(work, cast("asyncio.AbstractEventLoop", loop), timeout_s)

    async def publish_many(
        self,
        jobs: Iterable[Job | Outgoing],
        *,
        connection: AsyncTransaction | None = None,
        timeout_s: float = 5.0,
        **options: Never,
    ) -> list[Receipt]:
        """Publish `jobs` pipelined, and return their receipts in order; `timeout_s` is for all of them.

        Raises `PublishManyError` if any job failed. Each job is confirmed separately: a job with a receipt in the error's
        `results` is published, even if others failed. With `connection=`, as in `publish`, the transaction has all jobs or,
        after the error, none; they are kept in memory until all of them were checked.
        """
        if options:
            raise for_outgoing(options)
        sender = self._open()
        check_many(jobs)
        if connection is not None:
            return await Within(sender, connection).publish_many(jobs, timeout_s)
        return await Batch(sender, time.monotonic() + seconds_of("timeout_s", timeout_s)).publish(jobs)

    async def publish_many_handed(
        self, jobs: Iterable[Job | Outgoing], connection: Handed, timeout_s: float
    ) -> list[Receipt]:
        """Publish `jobs` on a connection of another thread, which waits; for the blocking publisher."""
        return await Within(self._open(), connection).publish_many(jobs, timeout_s)


def answered(work: Coroutine[Any, Any, _T], loop: asyncio.AbstractEventLoop, timeout_s: float) -> _T:
    """Run `work` on another thread's loop, and wait for its end. It ends within `timeout_s` by itself, unless the loop is blocked."""
    try:
        future = asyncio.run_coroutine_threadsafe(work, loop)
    except RuntimeError:  # the loop is closed
        work.close()
        msg = "the publisher or worker of this handle has ended"
        raise StoreUnavailable(msg) from None
    # what is asked refuses a timeout_s that isn't a number
    limit = timeout_s + _MARGIN_S if isinstance(timeout_s, (int, float)) and timeout_s > 0 else _LOOK_S  # pyright: ignore[reportUnnecessaryIsInstance]
    try:
        return future.result(min(limit, TIMEOUT_MAX))
    except FutureTimeoutError:
        if future.done():
            raise
        future.cancel()
        msg = f"no answer within {limit:g} s: something blocks the event loop of this handle's publisher, or that loop has ended"
        raise TimeoutError(msg) from None


def _inbox(sender: Sender) -> Inbox:
    if sender.inbox is None:
        raise InvalidJob(NO_INBOX)
    return sender.inbox


def check_many(jobs: object) -> None:
    """Raise InvalidJob for a single job instead of many."""
    if isinstance(jobs, (Job, Outgoing)):
        msg = "publish_many() takes a list or another iterable of jobs, not a single job; publish a single job with publish()"
        raise InvalidJob(msg)


@final
class PublisherBlock(AsyncBlock[Publisher]):
    """What `App.publisher` returns. Shortens the traceback of an error that leaves the block."""

    def __init__(self, block: AbstractAsyncContextManager[Publisher]) -> None:
        advice = (
            "write `async with app.publisher() as publisher:` and use publisher in the block, "
            "or keep app.blocking_publisher() in code without asyncio"
        )
        super().__init__(block, "app.publisher()", advice)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await super().__aexit__(kind, error, trace)
        if isinstance(error, LeveretError):  # nobody caught it in the block, so most likely it ends the program
            show_users_frames(error)
