"""The job store of one publisher or worker: what it records there, and what its handles ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar, cast

from ..envelope import Envelope
from ..errors import (
    JobAborted,
    JobExpired,
    JobFailed,
    ResultUnavailable,
    StoreUnavailable,
)
from ..handle import STATUS_S, Kept
from ..job import Job, Keep, Spec
from ..runtime import Runtime
from ..settings import check_seconds
from ..status import Status, status_of
from ..store import Abort, Change, Key, Record, Store
from ..texts import said_by, why_failed
from ..waits import answer_of
from .newest import Newest
from .recorder import Recorder
from .values import Values, WrongResult
from .waiter import FIRST_S, LONGEST_S, Waiter

_R = TypeVar("_R")
_T = TypeVar("_T")


class Results:
    """A job store, as one publisher or worker uses it on its event loop.

    Args:
        store: The store. `close` closes it.
        runtime: Clock and chance.
    """

    def __init__(self, store: Store, runtime: Runtime) -> None:
        self.store = store
        self.recorder = Recorder(store, runtime)
        self.waiter = Waiter(store)
        self.newest = Newest(store)
        self._clock = runtime.clock
        self._loop = asyncio.get_running_loop()
        self._closed = False

    def published(self, envelope: Envelope, keep: Keep) -> None:
        """Note that the broker has confirmed a publish. Costs no wait."""
        now = self._clock.now()
        delay_s = envelope.due_in_s(now)
        self.recorder.note(
            Change(
                job_id=envelope.job_id,
                publish=envelope.publish,
                queue=envelope.queue,
                job=envelope.job,
                state="delayed" if delay_s else "queued",
                passes=envelope.passes,
                attempt=envelope.attempt,
                keep_s=keep.failed_s + delay_s,
                at_ms=int(now * 1000),
                body=envelope.body or None if keep.body else None,
            )
        )

    def kept(self, job_class: type[Job[_R]], spec: Spec) -> Kept[_R]:
        """Return what handles of a job class ask."""
        return KeptJobs(self, job_class, spec)

    async def answer(self, call: Coroutine[Any, Any, _T], deadline: float) -> _T:
        """Return what the store answers by a deadline in `time.monotonic()` seconds. Raises StoreUnavailable without an answer."""
        try:
            return await answer_of(call, deadline - time.monotonic())
        except TimeoutError:
            msg = f"the store {self.store.what} gave no answer in time; ask again later"
            raise StoreUnavailable(msg) from None

    def check_open(self) -> None:
        """Raise StoreUnavailable if a handle can't ask here."""
        if self._closed:
            raise StoreUnavailable(_CLOSED)
        if asyncio.get_running_loop() is not self._loop:
            msg = (
                "this handle belongs to another event loop (asyncio.run makes a new one); await it where its publisher is, "
                "or make one there: publisher.handle(job_id, JobClass)"
            )
            raise StoreUnavailable(msg)

    async def close(self) -> None:
        """Write what is noted, within 2 s, end every wait, and close the store. Idempotent."""
        self._closed = True
        try:
            await self.recorder.close()
        finally:
            self.waiter.close(_CLOSED)
            self.newest.close(_CLOSED)
            await self.store.close()


_CLOSED = "the publisher or worker of this handle has ended; make a handle with another publisher: publisher.handle(job_id, JobClass)"


class KeptJobs(Generic[_R]):
    """What a store keeps of the jobs of one class; the implementation of `Kept`."""

    def __init__(self, results: Results, job_class: type[Job[_R]], spec: Spec) -> None:
        self._results = results
        self._name = spec.name
        self._values = None if spec.result is None else Values(job_class, spec.result)

    async def result(self, job_id: str, publish: int | None, timeout_s: float) -> _R:
        """As `Handle.result`."""
        check_seconds("result(): timeout_s", timeout_s)
        self._results.check_open()
        try:
            async with asyncio.timeout(timeout_s):
                record = await self._ended(job_id, publish)
        except TimeoutError:
            trouble = self._results.waiter.trouble
            why = f", and the store doesn't answer: {trouble}" if trouble else "; handle.status() says how it is"
            msg = f"job {self._name} {job_id}: nothing is known of its end after {timeout_s:g} s{why}"
            raise TimeoutError(msg) from None
        return self._result(record)

    async def _key(self, job_id: str, publish: int | None, deadline: float) -> Key | None:
        """Return the publish that a handle is of; None if the store knows none of the id."""
        self._results.check_open()
        await self._results.answer(self._results.recorder.caught_up(), deadline)
        if publish is not None:
            return Key(job_id, publish)
        return await self._results.answer(self._results.newest.of(job_id), deadline)

    async def _ended(self, job_id: str, publish: int | None) -> Record:
        wait_s = FIRST_S
        if publish is None:
            await self._results.recorder.caught_up()
        while publish is None:
            self._results.check_open()
            try:
                key = await self._results.newest.of(job_id)
            except StoreUnavailable as error:
                self._results.waiter.trouble = said_by(error)
                key = None
            if key is not None:
                publish = key.publish
            else:
                await asyncio.sleep(wait_s)
                wait_s = min(LONGEST_S, wait_s * 1.5)
        return await self._results.waiter.ended(Key(job_id, publish))

    def _result(self, record: Record) -> _R:
        job_id, what = record.job_id, f"job {self._name} {record.job_id}"
        if record.job != self._name:
            msg = f"{what}: the last job with this id is of another class, {record.job}; give handle() that class, or each class its own ids"
            raise ResultUnavailable(msg, job_id=job_id)
        match record.state:
            case "failed":
                why = why_failed(record.error, record.reason) or "the store has no reason"
                msg = f"{what} failed at attempt {record.attempt}: {why}"
                raise JobFailed(msg, job_id=job_id, error=record.error, reason=record.reason, attempt=record.attempt)
            case "aborted":
                raise JobAborted(f"{what} was aborted", job_id=job_id)
            case "expired":
                raise JobExpired(f"{what} had expired before it could start", job_id=job_id)
            case _:
                pass
        if self._values is None:
            return cast("_R", None)
        if record.result is None:
            why = record.reason or "the store has none of it"
            raise ResultUnavailable(f"{what} is done, without a result: {why}", job_id=job_id)
        try:
            return cast("_R", self._values.decode(record.result, record.content_type))
        except WrongResult as error:
            msg = f"{what} is done, but {error}; this program and the worker have different classes"
            raise ResultUnavailable(msg, job_id=job_id) from error

    async def status(self, job_id: str, publish: int | None) -> Status:
        """As `Handle.status`."""
        deadline = time.monotonic() + STATUS_S
        key = await self._key(job_id, publish, deadline)
        if key is None:
            return status_of(job_id, None)
        return status_of(job_id, await self._read(key, deadline))

    async def abort(self, job_id: str, publish: int | None, timeout_s: float) -> Abort:
        """As `Handle.abort`."""
        check_seconds("abort(): timeout_s", timeout_s)
        deadline = time.monotonic() + timeout_s
        key = await self._key(job_id, publish, deadline)
        if key is None or (publish is None and await self._read(key, deadline) is None):
            return "unknown"
        return await self._results.answer(self._results.store.abort(key), deadline)

    async def _read(self, key: Key, deadline: float) -> Record | None:
        """Return the record of a publish; None for one of another class, which may have the same id."""
        [record] = await self._results.answer(self._results.store.read([key]), deadline)
        return None if record is None or record.job != self._name else record
