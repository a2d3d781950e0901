"""The job store inside one process: what is known of each publish, for tests. It is also the shortest reading of the contract.

All stores that this process opens as `memory://name` share one `Records`, on any loop and thread. A test that wants private
records makes them: `MemoryJobs(Records(), "memory://", runtime)`.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import islice
from typing import final

import msgspec

from leveret.errors import StoreUnavailable
from leveret.runtime import Runtime
from leveret.store import STAGES, Abort, Change, Key, Progress, Record, State, Verdict

from .store import named


class Kept(msgspec.Struct, eq=False):
    """A record in its place, and who waits for its end."""

    record: Record
    look_ms: int
    """The time of its earliest entry in `Records.times`."""
    watchers: set[MemoryJobs]


@final
class Records:
    """The records that the stores of one name share. Stores hold `lock` while they use a method or an attribute."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: dict[Key, Kept] = {}
        """By publish, the first heard of first."""
        self.publishes: dict[str, dict[Key, None]] = {}
        """The publishes of each id, the first heard of first."""
        self.times: list[tuple[int, Key]] = []
        """A heap of when to look whether a record's time is over."""
        self.refusal: str | None = None

    def refuse(self, reason: str = "the test refuses every call (Records.refuse)") -> None:
        """Let every call of every store raise `StoreUnavailable` with `reason`, until `accept`."""
        with self.lock:
            self.refusal = reason

    def accept(self) -> None:
        """End `refuse`."""
        with self.lock:
            self.refusal = None

    def get(self, key: Key) -> Record | None:
        """Return the record of a publish."""
        kept = self.kept.get(key)
        return None if kept is None else kept.record

    def put(self, record: Record) -> None:
        """Add a record, or replace the one of its publish; tell who watches for its end."""
        key, until = record.key, record.keep_until_ms
        kept = self.kept.get(key)
        if kept is None:
            self.kept[key] = Kept(record, until, set())
            self.publishes.setdefault(key.job_id, {})[key] = None
            heapq.heappush(self.times, (until, key))
            return
        kept.record = record
        if until < kept.look_ms:
            kept.look_ms = until
            heapq.heappush(self.times, (until, key))
        if record.ended:
            watchers, kept.watchers = kept.watchers, set()
            for watcher in watchers:
                watcher.told(key)

    def drop(self, key: Key) -> bool:
        """Delete a record; False if there is none."""
        if self.kept.pop(key, None) is None:
            return False
        same_id = self.publishes[key.job_id]
        del same_id[key]
        if not same_id:
            del self.publishes[key.job_id]
        return True

    def trim(self, at_most: int, now_ms: int) -> int:
        """Delete at most so many records whose time is over, and return how many."""
        count = 0
        while count < at_most and self.times and self.times[0][0] <= now_ms:
            at, key = heapq.heappop(self.times)
            kept = self.kept.get(key)
            if kept is None or kept.look_ms != at:
                continue  # the record is gone, or has an earlier entry
            if (until := kept.record.keep_until_ms) > now_ms:
                kept.look_ms = until
                heapq.heappush(self.times, (until, key))
            else:
                count += self.drop(key)
        return count


@final
class MemoryJobs:
    """A `Store` on `Records`, using the clock of `runtime`."""

    def __init__(self, records: Records, url: str, runtime: Runtime) -> None:
        self.what = url
        """As `Store.what`."""
        self._records = records
        self._clock = runtime.clock
        self._tell: Callable[[Sequence[Key]], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def write(self, changes: Sequence[Change | Progress], /) -> None:
        """As `Store.write`."""
        async with self._using() as records:
            for change in changes:
                record = records.get(change.key)
                if isinstance(change, Change):
                    if record is None or change.rank > record.rank:
                        self._enter(change, record)
                elif record is not None and record.state == "running" and _run_of(change) == _run_of(record):
                    records.put(msgspec.structs.replace(record, progress=change.fraction, note=change.note))

    async def begin(self, changes: Sequence[Change], /) -> Sequence[Verdict]:
        """As `Store.begin`."""
        async with self._using():
            return [self._begin(change) for change in changes]

    def _begin(self, change: Change) -> Verdict:
        record = self._records.get(change.key)
        if record is not None:
            if record.passes > change.passes or (record.passes == change.passes and record.ended):
                return "aborted" if record.state == "aborted" else "ended"
            if record.asked:
                self._enter(msgspec.structs.replace(change, state="aborted"), record)
                return "aborted"
            if change.rank <= record.rank:
                return "go"
        self._enter(change, record)
        return "go"

    def _enter(self, change: Change, record: Record | None) -> None:
        """Put the record that follows `record` by a change that counts."""
        begins = change.state == "running"
        self._records.put(
            Record(
                job_id=change.job_id,
                publish=change.publish,
                queue=change.queue,
                job=change.job,
                state=change.state,
                passes=change.passes,
                attempt=change.attempt,
                created_ms=record.created_ms if record else change.at_ms,
                started_ms=change.at_ms if begins else record.started_ms if record else None,
                at_ms=change.at_ms,
                keep_until_ms=self._now_ms() + round(change.keep_s * 1000),
                progress=record.progress if record and not begins else None,
                note=record.note if record and not begins else "",
                asked=record is not None and record.asked and STAGES[change.state] < STAGES["done"],
                result=change.result,
                content_type=change.content_type,
                error=change.error,
                reason=change.reason,
                body=record.body if record and change.body is None else change.body,
            )
        )

    async def read(self, keys: Sequence[Key], /) -> Sequence[Record | None]:
        """As `Store.read`."""
        async with self._using() as records:
            return [records.get(key) for key in keys]

    async def ended(self, keys: Sequence[Key], /) -> Sequence[Record]:
        """As `Store.ended`; a record that isn't there yet isn't watched."""
        async with self._using() as records:
            found = [kept for key in keys if (kept := records.kept.get(key)) is not None]
            if self._tell is not None:
                for kept in found:
                    if not kept.record.ended:
                        kept.watchers.add(self)
            return [kept.record for kept in found if kept.record.ended]

    def watch(self, ended: Callable[[Sequence[Key]], None], /) -> None:
        """As `Store.watch`."""
        self._tell = ended

    def told(self, key: Key) -> None:
        """Hear, on any thread, that a publish ended which this store watches."""
        if self._tell is not None and self._loop is not None:
            with suppress(RuntimeError):  # the loop was closed: nobody waits there
                self._loop.call_soon_threadsafe(self._tell, (key,))

    async def newest(self, job_ids: Sequence[str], /) -> Sequence[Key | None]:
        """As `Store.newest`."""
        async with self._using() as records:
            return [next(reversed(records.publishes.get(job_id, {})), None) for job_id in job_ids]

    async def abort(self, key: Key, /) -> Abort:
        """As `Store.abort`."""
        async with self._using() as records:
            record = records.get(key)
            if record is None:
                return "unknown"
            if record.ended:
                return "aborted" if record.state == "aborted" else "finished"
            if record.state == "running":
                records.put(msgspec.structs.replace(record, asked=True))
                return "asked"
            records.put(msgspec.structs.replace(record, state="aborted", at_ms=self._now_ms(), asked=False))
            return "aborted"

    async def asked(self, keys: Sequence[Key], /) -> Sequence[Key]:
        """As `Store.asked`."""
        async with self._using() as records:
            return [key for key in keys if (record := records.get(key)) is not None and record.asked]

    async def list(
        self, *, state: State | None = None, queue: str | None = None, job: str | None = None, limit: int
    ) -> Sequence[Record]:
        """As `Store.list`."""
        async with self._using() as records:
            found = (
                msgspec.structs.replace(kept.record, result=None, body=None)
                for kept in reversed(records.kept.values())
                if state in {None, kept.record.state}
                and queue in {None, kept.record.queue}
                and job in {None, kept.record.job}
            )
            return list(islice(found, limit))

    async def find(self, job_id: str, /, *, prefix: bool = False, limit: int = 100) -> Sequence[Record]:
        """As `Store.find`."""
        async with self._using() as records:
            if not prefix:
                found = (records.kept[key].record for key in reversed(records.publishes.get(job_id, {})))
            else:
                found = (kept.record for key, kept in reversed(records.kept.items()) if key.job_id.startswith(job_id))
            return list(islice(found, limit))

    async def drop(self, keys: Sequence[Key], /) -> int:
        """As `Store.drop`."""
        async with self._using() as records:
            return sum(map(records.drop, keys))

    async def trim(self, at_most: int, /) -> int:
        """As `Store.trim`."""
        async with self._using() as records:
            return records.trim(at_most, self._now_ms())

    async def close(self) -> None:
        """Hear of no more ends: a store in memory holds no resources."""
        self._tell = None

    @asynccontextmanager
    async def _using(self) -> AsyncGenerator[Records]:
        """Give the records, locked; then let the loop turn once, as a call of a real store does."""
        self._loop = asyncio.get_running_loop()
        with self._records.lock:
            if self._records.refusal is not None:
                msg = f"the job store {self.what} doesn't answer: {self._records.refusal}"
                raise StoreUnavailable(msg)
            yield self._records
        await asyncio.sleep(0)

    def _now_ms(self) -> int:
        return round(self._clock.now() * 1000)


def _run_of(one: Progress | Record) -> tuple[int, int]:
    return one.passes, one.attempt


_records: dict[str, Records] = {}
_records_lock = threading.Lock()


def memory_records(url: str) -> Records:
    """Return this process's records for `url`, `memory://` or `memory://name`; ConfigurationError for any other URL."""
    with _records_lock:
        return _records.setdefault(named(url), Records())
