"""changes → store: batched once per turn of the loop, waited for only while the store answers, and kept in memory while it doesn't."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import islice
from math import inf
from typing import TypeVar

import msgspec

from ..backoff import full_jitter
from ..clock import Clock, Timer
from ..errors import ConfigurationError, StoreUnavailable
from ..runtime import Runtime
from ..settings import redact
from ..store import STAGES, Change, Key, Progress, Store, Verdict
from ..texts import named, said_by
from ..waits import first_of

logger = logging.getLogger("leveret.results")

WAIT_S = 2.0
"""The longest wait of a job for its store, seconds."""
SLOW_S = 1.0
"""Jobs don't wait for a store whose last answer took longer, seconds."""
CALL_S = 10.0
"""The longest call, seconds; after `WAIT_S` nothing waits for it."""
MOST_KEPT = 10_000
"""At most so many changes are kept in memory while the store doesn't answer; half of them may be of jobs that haven't ended."""
MOST_KEPT_BYTES = 16 << 20
"""The size of all that are kept, at most."""
TRIM_EVERY_S = 60.0
"""How often a process deletes records whose time is over, seconds."""
_TURN_S = 1 / 32
"""A turn of the loop that takes longer counts as one of so many seconds in the time of a call."""
_RETRY_S = (0.2, 2.0)
"""The ceilings of the first and of the longest wait between two tries to reach the store, seconds."""
_MOST_BATCH = 500
_MOST_BATCH_BYTES = 4 << 20
_MOST_TRIMMED = 500
_TRIM_PAUSE_S = 0.05
"""The wait between two batches of records that are deleted, seconds: starts and ends of jobs go between them."""
_TELL_EVERY_S = 60.0
_OWN_BYTES = 400
"""What a change takes in memory without its result, its body and its texts."""

_T = TypeVar("_T")


class _Entry(msgspec.Struct, eq=False):
    """What waits to be written."""

    what: Change | Progress
    since: float
    heard: asyncio.Future[bool] | None = None
    """Set to whether the store has the change; None if nothing waits for that."""
    required: bool = False
    """Whether `heard` isn't set before the store has the change."""


class _Start(msgspec.Struct, eq=False):
    """A run that waits for its verdict."""

    change: Change
    since: float
    verdict: asyncio.Future[Verdict]


class _Timing:
    """The time that a call takes. Calls `late` once the call has taken `late_s`.

    A long turn of the loop counts as a short one, since an answer that has come isn't read before its end. So a store isn't taken
    for slow because the loop is busy, and nothing waits for long while the loop is idle.
    """

    def __init__(self, clock: Clock, late_s: float, late: Callable[[], object]) -> None:
        self._clock = clock
        self._late_s = late_s
        self._late = late
        self._before_s = 0.0
        self._begin_turn()

    def _begin_turn(self) -> None:
        self._began = self._clock.monotonic()
        self._turn_s = min(_TURN_S, self._late_s - self._before_s)
        self._timer = self._clock.call_later(self._turn_s, self._end_turn, limit=True)

    def _end_turn(self) -> None:
        self._before_s += self._turn_s
        if self._before_s < self._late_s:
            self._begin_turn()
        else:
            self._began = self._clock.monotonic()
            self._late()

    @property
    def took_s(self) -> float:
        """The time so far, seconds."""
        return self._before_s + min(_TURN_S, self._clock.monotonic() - self._began)

    def cancel(self) -> None:
        """Call `late` no more."""
        self._timer.cancel()


class Recorder:
    """Writes the states of jobs to a store, for the workers and publishers of one process and one event loop.

    A job waits for the store for at most 2 s. It doesn't wait at all from a call that failed or took longer until the store has
    answered within 1 s. Meanwhile the last change of each publish is kept in memory, within bounds, and written later.

    Args:
        store: The store; `close` leaves it open.
        runtime: Clock and chance.
    """

    def __init__(self, store: Store, runtime: Runtime) -> None:
        self._store = store
        self._clock = runtime.clock
        self._rng = runtime.rng
        self.written = 0
        """Changes that the store has taken, those included that were late."""
        self.dropped = 0
        """Changes that the store will never hear of."""
        self.unasked = 0
        """Runs that began without a verdict of the store."""
        self._well = True
        self._why = ""
        self._queue: list[_Entry] = []
        self._flying: Sequence[_Entry] = ()
        self._kept: dict[Key, Change] = {}
        """The last change of each publish since the store doesn't answer."""
        self._kept_bytes = 0
        self._writer: asyncio.Task[None] | None = None
        self._starts: list[_Start] = []
        self._starting: Sequence[_Start] = ()
        self._starter: asyncio.Task[None] | None = None
        self._trimmer: asyncio.Task[None] | None = None
        self._trims: Timer | None = None
        self._closing = asyncio.Event()
        self._closed = False
        self._down_since = 0.0
        self._told = -inf
        """When the log last said that the store doesn't answer, seconds of the clock's `monotonic`."""

    @property
    def well(self) -> bool:
        """Whether jobs wait for the store."""
        return self._well

    @property
    def kept(self) -> int:
        """The number of changes that wait in memory until the store answers."""
        return len(self._kept)

    async def check(self) -> None:
        """Reach the store, within 2 s. Raises ConfigurationError if waiting won't help; a store that is down raises nothing."""
        try:
            await self._limited(self._store.newest(()), WAIT_S)
        except StoreUnavailable as error:
            self._unwell(said_by(error))

    def note(self, what: Change | Progress) -> None:
        """Write a change or progress soon, with all others of this turn of the loop. Progress is dropped while the store is down."""
        if self._well and not self._closed:
            self._queue.append(_Entry(what, self._clock.monotonic()))
            self._wake()
        elif isinstance(what, Change):
            self._keep(what)

    async def begin(self, change: Change) -> Verdict:
        """Enter that a run begins, and return whether it may; "go" where the store doesn't say so in time."""
        if not self._well or self._closed:
            self._go(change)
            return "go"
        verdict: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._starts.append(_Start(change, self._clock.monotonic(), verdict))
        self._wake_starter()
        return await verdict

    async def end(self, change: Change, *, required: bool = False) -> bool:
        """Write the end of a publish; return whether the store has it.

        If not, the change waits in memory. With `required`, the call returns only once the store has it.
        """
        if self._closed or not (self._well or required):
            self._keep(change)
            return False
        heard: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._queue.append(_Entry(change, self._clock.monotonic(), heard, required))
        self._wake()
        return await heard

    async def asked(self, keys: Sequence[Key]) -> Sequence[Key]:
        """Return those of `keys` that are asked to end; none if the store doesn't answer."""
        try:
            return await self._limited(self._store.asked(keys), CALL_S)
        except (StoreUnavailable, ConfigurationError):
            return ()  # what is written meanwhile says so in the log
        except Exception as bug:  # noqa: BLE001 - a fault of a store ends no job
            logger.error(  # noqa: TRY400 - one line
                "the job store %s couldn't say which jobs are to end: %s", self._store.what, redact(named(bug))
            )
            return ()

    async def caught_up(self) -> None:
        """Return once the store has what was noted so far, or doesn't answer."""
        entries = self._queue or self._flying
        if entries:
            last = entries[-1]
            if last.heard is None:
                last.heard = asyncio.get_running_loop().create_future()
            await asyncio.wait([last.heard])

    async def flush(self, within_s: float = WAIT_S) -> bool:
        """Wait until everything is written, for at most `within_s`; return whether it is."""
        if tasks := [task for task in (self._writer, self._starter) if task is not None]:
            await asyncio.wait(tasks, timeout=within_s)
        return not (self._writer or self._starter)

    async def close(self, within_s: float = WAIT_S) -> None:
        """Write what is left, within `within_s`. What the store hasn't taken by then is dropped, and counted. Idempotent."""
        self._closing.set()
        if self._trims is not None:
            self._trims.cancel()
        try:
            await self.flush(within_s)
        finally:
            self._closed = True
            dropped_before = self.dropped
            tasks = [task for task in (self._writer, self._starter, self._trimmer) if task is not None]
            for task in tasks:
                task.cancel()  # what it was at is dropped
            if tasks:
                await asyncio.wait(tasks, timeout=WAIT_S)
            for entry in self._queue:
                _tell(entry.heard, False)
            self.dropped += len(self._kept) + sum(isinstance(entry.what, Change) for entry in self._queue)
            self._queue.clear()
            self._kept.clear()
            self._kept_bytes = 0
            if lost := self.dropped - dropped_before:
                logger.warning(
                    "the job store %s didn't take the last %d changes of jobs: %s",
                    self._store.what,
                    lost,
                    self._why or "the process ended before its answer",
                )

    def _wake(self) -> None:
        """Write in a later step of the loop, so that whatever comes in this one shares a call."""
        if self._writer is None and not self._closed:
            self._writer = asyncio.get_running_loop().create_task(self._write_all())
            self._writer.add_done_callback(self._stopped_writing)
        if self._trims is None and not self._closed:
            self._trim_later()

    def _stopped_writing(self, task: asyncio.Task[None]) -> None:
        if self._writer is not task:
            return
        self._writer = None
        if task.cancelled() and (self._queue or self._kept):  # by the end of a whole program, whose worker still drains
            self._wake()

    async def _write_all(self) -> None:
        await asyncio.sleep(0)  # an eager task factory begins at once
        failed = 0
        while self._queue or self._kept:
            if failed:
                base_s, cap_s = _RETRY_S
                wait_s = full_jitter(failed, base_s=base_s, cap_s=cap_s, rng=self._rng)
                await first_of(self._clock.sleep(wait_s), self._closing.wait())
            last = self._closing.is_set()
            if await self._write(self._batch()):
                failed = 0
            elif last:
                break
            else:
                failed += 1
        self._writer = (
            None  # now, and not in a later step of the loop: what comes in between would be written by nobody
        )

    def _batch(self) -> Sequence[_Entry]:
        """Take the next entries of the queue, and after them of what is kept, which stays there until it is written."""
        count = size = 0
        for entry in self._queue:
            if count == _MOST_BATCH or size > _MOST_BATCH_BYTES:
                break
            count, size = count + 1, size + _size(entry.what)
        batch, self._queue = self._queue[:count], self._queue[count:]
        now = self._clock.monotonic()
        for change in islice(self._kept.values(), _MOST_BATCH - count):
            if size > _MOST_BATCH_BYTES:
                break
            size += _size(change)
            batch.append(_Entry(change, now))
        return batch

    async def _write(self, batch: Sequence[_Entry], flying: Sequence[_Entry] = ()) -> bool:
        """Write a batch; return False if the store doesn't answer, after which each entry waits where it did before.

        `flying` are the entries whose jobs wait for the call, if they are more than the batch.
        """
        self._flying = flying or batch
        timing = self._timing(batch[0].since)
        try:
            await self._limited(self._store.write([entry.what for entry in batch]), CALL_S)
        except (StoreUnavailable, ConfigurationError) as error:
            self._put_back(batch)
            self._unwell(said_by(error))
            return False
        except Exception as bug:  # noqa: BLE001 - a fault of a store costs neither the jobs nor the other changes
            timing.cancel()
            if len(batch) == 1:
                self._refuse(batch[0], bug)
                return True
            for index in range(len(batch)):
                if not await self._write(batch[index : index + 1], batch[index:]):
                    self._put_back(batch[index + 1 :])
                    return False
            return True
        except BaseException:
            self._put_back(batch)
            raise
        finally:
            timing.cancel()
            self._flying = ()
        for entry in batch:
            if entry.heard is not None:
                _tell(entry.heard, True)
            if isinstance(entry.what, Change):
                self.written += 1
                if self._kept:
                    self._forget(entry.what)
        self._answered(timing.took_s)
        return True

    def _put_back(self, batch: Sequence[_Entry]) -> None:
        """Let entries wait again: a required one in the queue, and the last change of each other job in memory."""
        waiting: list[_Entry] = []
        for entry in batch:
            if entry.required and entry.heard is not None and not entry.heard.done():
                waiting.append(entry)
                continue
            _tell(entry.heard, False)
            if isinstance(entry.what, Change):
                self._keep(entry.what)
        self._queue[:0] = waiting

    def _refuse(self, entry: _Entry, bug: Exception) -> None:
        """Drop what the store refuses for a reason that another try won't change."""
        logger.error(
            "the job store %s refused a change of job %s, which is dropped: %s",
            self._store.what,
            entry.what.job_id,
            redact(named(bug)),
        )
        _tell(entry.heard, False)
        if isinstance(entry.what, Change):
            self.dropped += 1
            self._forget(entry.what)

    def _keep(self, change: Change) -> None:
        """Keep a change in memory, if nothing later is kept of its job and there is room; wake the writer."""
        if self._closed:
            self.dropped += 1
            return
        key = change.key
        old = self._kept.get(key)
        if old is not None and old.rank >= change.rank:
            return
        share = 1 if STAGES[change.state] == 2 else 2
        kept_bytes = self._kept_bytes if old is None else self._kept_bytes - _size(old)
        most, room = MOST_KEPT // share, MOST_KEPT_BYTES // share - kept_bytes
        if change.result is not None and _size(change) > room:
            why = "the job store was down, and the result didn't fit into the worker's memory until it was back"
            change = msgspec.structs.replace(change, result=None, content_type="", reason=why)
        if _size(change) > room or (old is None and len(self._kept) >= most):
            self.dropped += 1
            return
        self._kept[key] = change
        self._kept_bytes = kept_bytes + _size(change)
        self._wake()

    def _forget(self, change: Change) -> None:
        """Forget a change that was kept, unless a later one has taken its place."""
        if self._kept.get(change.key) is change:
            del self._kept[change.key]
            self._kept_bytes -= _size(change)

    def _wake_starter(self) -> None:
        """Ask for verdicts in a later step of the loop, so that all runs of a claim share a call."""
        if self._starter is None:
            self._starter = asyncio.get_running_loop().create_task(self._start_all())
            self._starter.add_done_callback(self._stopped_starting)
        if self._trims is None:
            self._trim_later()

    def _stopped_starting(self, _: asyncio.Task[None]) -> None:
        self._starter = None
        if self._starts:
            self._wake_starter()

    async def _start_all(self) -> None:
        await asyncio.sleep(0)  # as above
        while self._starts:
            starts, self._starts = self._starts[:_MOST_BATCH], self._starts[_MOST_BATCH:]
            await self._ask(starts)

    async def _ask(self, starts: Sequence[_Start], waiting: Sequence[_Start] = ()) -> None:
        """Ask for verdicts. `waiting` are the runs that wait for the call, if they are more than those that it is for."""
        self._starting = waiting or starts
        timing = self._timing(starts[0].since)
        try:
            verdicts = await self._limited(self._store.begin([start.change for start in starts]), CALL_S)
            for start, verdict in zip(starts, verdicts, strict=True):
                _tell(start.verdict, verdict)
            self.written += len(verdicts)
            self._answered(timing.took_s)
        except (StoreUnavailable, ConfigurationError) as error:
            self._unwell(said_by(error))
        except Exception as bug:  # noqa: BLE001 - a fault of the store costs neither the run nor the other verdicts
            timing.cancel()
            if len(starts) == 1:
                self._start_refused(starts[0], bug)
            else:
                for index in range(len(starts)):
                    await self._ask(starts[index : index + 1], starts[index:])
        except BaseException:
            self._release()
            raise
        finally:
            timing.cancel()
            self._starting = ()

    def _start_refused(self, start: _Start, bug: Exception) -> None:
        """Let a run begin of which the store takes nothing."""
        logger.error(
            "the job store %s refused the start of job %s, which runs without it: %s",
            self._store.what,
            start.change.job_id,
            redact(named(bug)),
        )
        self.unasked += 1
        self.dropped += 1
        _tell(start.verdict, "go")

    def _go(self, change: Change) -> None:
        """Note a run that begins without a verdict."""
        self.unasked += 1
        self._keep(change)

    def _timing(self, since: float) -> _Timing:
        """Time a call that begins now. Nothing waits for it any more once what it has for the store has waited since `since` for 2 s."""
        late_s = max(since + WAIT_S - self._clock.monotonic(), SLOW_S)
        return _Timing(self._clock, late_s, lambda: self._unwell("its answer takes too long"))

    def _release(self) -> None:
        """Let all runs begin that wait for a verdict."""
        for start in (*self._starting, *self._starts):
            if not start.verdict.done():
                start.verdict.set_result("go")
                self._go(start.change)
        self._starts.clear()

    async def _limited(self, call: Awaitable[_T], limit_s: float) -> _T:
        """Await a call of the store. Raises StoreUnavailable after `limit_s`."""
        try:
            async with asyncio.timeout(None) as limit:
                over = _Timing(self._clock, limit_s, lambda: limit.reschedule(0.0))
                try:
                    return await call
                finally:
                    over.cancel()
        except TimeoutError as error:
            msg = f"no answer within {limit_s:g} s"
            raise StoreUnavailable(msg) from error

    def _answered(self, took_s: float) -> None:
        """Judge the store by the time that its answer took."""
        if took_s > SLOW_S:
            self._unwell(f"its answer took {took_s:.1f} s")
        elif not self._well:
            self._well = True
            down_s = self._clock.monotonic() - self._down_since
            # a store that is slow now and then is told once a minute, as its trouble
            logger.log(
                logging.INFO if self._told >= self._down_since else logging.DEBUG,
                "the job store %s answers again after %.0f s; changes that are written now: %d, dropped so far: %d",
                self._store.what,
                down_s,
                len(self._kept),
                self.dropped,
            )

    def _unwell(self, why: str) -> None:
        """Let nothing wait for the store until it has answered quickly."""
        now = self._clock.monotonic()
        self._why = redact(why)
        if self._well:
            self._well = False
            self._down_since = now
        for entry in self._flying:
            if not entry.required:
                _tell(entry.heard, False)
        waiting, self._queue = self._queue, []
        self._put_back(waiting)
        self._release()
        if now - self._told >= _TELL_EVERY_S:
            self._told = now
            logger.warning(
                "the job store %s doesn't answer as it should, so jobs don't wait for it: %s; "
                "changes that wait in memory: %d, dropped: %d",
                self._store.what,
                self._why,
                len(self._kept),
                self.dropped,
            )

    def _trim_later(self) -> None:
        """Delete old records after a while, at another time in each process."""
        self._trims = self._clock.call_later(TRIM_EVERY_S * self._rng.uniform(0.5, 1.5), self._trim, limit=True)

    def _trim(self) -> None:
        if self._well and (self._trimmer is None or self._trimmer.done()):
            self._trimmer = asyncio.get_running_loop().create_task(self._trim_all())
        self._trim_later()

    async def _trim_all(self) -> None:
        """Delete all records whose time is over, a batch at a time: a process that is never idle would delete too few of them."""
        with suppress(StoreUnavailable, ConfigurationError):
            while await self._limited(self._store.trim(_MOST_TRIMMED), CALL_S) == _MOST_TRIMMED and self._well:
                await self._clock.sleep(_TRIM_PAUSE_S)


def _size(what: Change | Progress) -> int:
    """Return about how many bytes of memory a change takes."""
    if isinstance(what, Progress):
        return _OWN_BYTES
    return _OWN_BYTES + len(what.result or b"") + len(what.body or b"") + len(what.error) + len(what.reason)


def _tell(waits: asyncio.Future[_T] | None, answer: _T) -> None:
    if waits is not None and not waits.done():
        waits.set_result(answer)
