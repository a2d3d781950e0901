"""Publishing inside a user's own transaction: checks and middleware as ever, then one statement on the user's connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import chain, islice
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast

from ..envelope import Envelope, Receipt
from ..errors import BrokerUnavailable, InvalidJob, PublishError, PublishManyError
from ..handle import Handle
from ..job import Job, Queue
from ..options import PUBLISH_OPTIONS, TIMEOUT_S, Outgoing, OutgoingOptions, PublishOptions, unexpected
from ..transactions import Add, AsyncTransaction, Transaction, Transactional
from .sender import Sender, seconds_of

_R = TypeVar("_R")
_T = TypeVar("_T")

NO_TRANSACTIONS = (
    "connection= publishes inside a transaction of yours, which this app's broker can't: use a postgresql:// broker, or "
    'App(outbox="postgresql://…") beside the broker, in the same database; or publish without connection=, after the commit'
)
_AT_ONCE = 1000
"""How many jobs of a `publish_many` are in the middleware at once."""
_MARGIN_S = 1.0
"""What a publish gets to end, beyond its limit, once its statement has ended."""


class Handed:
    """A connection of a thread that waits for a publish on a publisher's loop. What uses the connection runs in that thread."""

    def __init__(self, connection: Transaction) -> None:
        self._connection = connection
        self._asked: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.used = False
        """Whether a statement may have been sent."""

    async def within(self, transactional: Transactional) -> Add:
        """Return the function that adds jobs to the connection's transaction; called on the loop, as that function."""
        add = await self._call(partial(transactional.within_blocking, self._connection))

        def use(jobs: Sequence[tuple[Queue, Envelope]], deadline: float) -> None:
            self.used = True
            add(jobs, deadline)

        return lambda jobs, deadline: self._call(partial(use, jobs, deadline))

    async def _call(self, function: Callable[[], _T]) -> _T:
        future: Future[_T] = Future()
        self._asked.put(partial(_run, future, function))
        return await asyncio.wrap_future(future)

    def wait(self, publish: Future[Any], limit_s: float) -> bool:
        """Do what the loop asks for until `publish` has ended; False if it hasn't by the limit, which cuts no statement off."""
        ends = time.monotonic() + limit_s
        publish.add_done_callback(lambda _: self._asked.put(None))
        try:
            while not publish.done():
                if (asked := self._asked.get(timeout=max(0.0, ends - time.monotonic()))) is not None:
                    asked()
                    ends = max(ends, time.monotonic() + _MARGIN_S)
        except Empty:
            return publish.done()
        except BaseException:
            publish.cancel()
            raise
        return True


def _run(future: Future[_T], function: Callable[[], _T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:  # noqa: BLE001 - it goes to the loop
        future.set_exception(error)
    except BaseException:  # Ctrl-C is the waiting thread's; on the loop it would end the loop
        future.set_exception(asyncio.CancelledError())
        raise


class Within:
    """What publishes with `connection=`."""

    def __init__(self, sender: Sender, connection: AsyncTransaction | Handed) -> None:
        self._sender = sender
        self._connection = connection

    async def publish(self, job: Job[_R], options: PublishOptions) -> Handle[_R]:
        """As `Publisher.publish`."""
        if not PUBLISH_OPTIONS.issuperset(options):
            raise unexpected("publish", options, PUBLISH_OPTIONS | {"connection"})
        sender = self._sender
        deadline = time.monotonic() + seconds_of("timeout_s", options.pop("timeout_s", TIMEOUT_S))
        envelope = sender.envelope(job, options, deadline)
        add = await self._add()

        async def last(envelope: Envelope) -> Receipt:
            await add([(sender.queue_of(envelope), envelope)], deadline)
            return _receipt(envelope)

        return sender.handle(job, envelope, await sender.send_to(last, envelope))

    async def publish_many(self, jobs: Iterable[Job | Outgoing], timeout_s: float) -> list[Receipt]:
        """As `Publisher.publish_many`, but all or none: one call adds the jobs, after the last has passed the middleware."""
        sender, deadline = self._sender, time.monotonic() + seconds_of("timeout_s", timeout_s)
        add = await self._add()
        items, adding = iter(jobs), list[Envelope]()
        results: list[Receipt | PublishError] = []
        while chunk := [self._envelope(item, deadline) for item in islice(items, _AT_ONCE)]:
            if sender.bare:
                adding += (one for one in chunk if isinstance(one, Envelope))
                results += (one if isinstance(one, PublishError) else _receipt(one) for one in chunk)
            else:
                passed = [list[Envelope]() for _ in chunk]
                results += await asyncio.gather(*map(self._pass, chunk, passed))
                adding += chain.from_iterable(passed)
        if (failed := next((one for one in results if isinstance(one, PublishError)), None)) is not None:
            left = f"nothing was sent, since another job of this publish_many failed: {failed}"
            raise PublishManyError(
                [
                    one if isinstance(one, PublishError) else BrokerUnavailable(left, job_id=one.job_id)
                    for one in results
                ]
            )
        try:
            if adding:
                await add([(sender.queue_of(envelope), envelope) for envelope in adding], deadline)
        except PublishError as error:
            raise PublishManyError([error] * len(results)) from error
        return cast("list[Receipt]", results)

    async def _add(self) -> Add:
        sender, connection = self._sender, self._connection
        if sender.observed:
            return sender.at_once
        if sender.transactional is None:
            raise InvalidJob(NO_TRANSACTIONS)
        if isinstance(connection, Handed):
            return await connection.within(sender.transactional)
        return sender.transactional.within(connection)

    def _envelope(self, item: Job | Outgoing, deadline: float) -> Envelope | PublishError:
        job, options = (item.job, item.options) if isinstance(item, Outgoing) else (item, OutgoingOptions())
        try:
            envelope = self._sender.envelope(job, options, deadline)
            self._sender.check_headers(envelope)
        except PublishError as error:
            return error
        return envelope

    async def _pass(self, envelope: Envelope | PublishError, passed: list[Envelope]) -> Receipt | PublishError:
        """Send an envelope through the middleware, and put what comes out into `passed`.

        The middleware doesn't wait for the statement, which waits for all jobs: a lock in middleware would never be free again.
        """
        if isinstance(envelope, PublishError):
            return envelope

        async def last(envelope: Envelope) -> Receipt:
            passed.append(envelope)
            return _receipt(envelope)

        try:
            return await self._sender.send_to(last, envelope)
        except PublishError as error:
            return error
        except Exception as error:  # noqa: BLE001 - an error of a user's middleware must name its job
            failed = PublishError(f"{envelope.job}: {type(error).__name__}: {error}", job_id=envelope.job_id)
            failed.__cause__ = error
            return failed


def _receipt(envelope: Envelope) -> Receipt:
    return Receipt(envelope.job_id, "uncommitted")
