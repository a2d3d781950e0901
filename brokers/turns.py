"""Turns: what one event loop asks of a store, gathered into one transaction after another.

A store keeps jobs as rows, and a taker claims rows under a lease. While one transaction is under way, `Turns` collects the
publishes, settlements and claims of its loop; all of them share the next one. This module names no database and does no input
or output. A store has a `Driver`, which does each `Turn` by its own statements: on a thread, or on the loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeAlias, final

import msgspec

from leveret.backoff import full_jitter
from leveret.broker import PublisherState, QueueState, Sink, Subscription
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable, ConfigurationError, LeveretError, PublishTimeout
from leveret.job import Queue
from leveret.runtime import Runtime

from . import leases
from .leases import Beats, Count, Lease
from .rows import BODY, JOB_ID, Row, packed, unpack, when_ms

BATCH_BYTES = 32 << 20
"""At most this many bytes of bodies in one transaction; a single larger job is written alone."""
WINDOW = 1000
"""At most this many publishes are unconfirmed at once; further publishes wait, within their deadlines."""
CLOSE_S = 5.0
"""How long `close` waits if the store can't be written."""
_FIRST_TRY_S = 1.0

PENDING, TAKEN, OVER = range(3)
"""The states of a `Write`: it can still be cancelled; it is in a transaction; its future has ended."""

Call: TypeAlias = Callable[[Any], Any]
"""Statements of a store: called with what the store's driver gives, a connection for example."""


class Driver(Protocol):
    """Takes the turns of a store, one after another, and does them by its own statements: a thread, or a task of the loop."""

    def start(self) -> None:
        """Begin to take turns. Called on the loop at the first work, and again if the driver ended before `Turns.close`."""
        ...

    def wake(self) -> None:
        """End the wait for work. Called on the loop, at most once per turn of it, by a thread that holds `Turns.lock`."""
        ...

    def tell(self, function: Callable[..., object], /, *args: object) -> None:
        """Call `function` on the loop, after what was told before."""
        ...


@final
class Window:
    """One level of one queue: the number of held jobs, and whether more may wait in the store. Only the driver changes it."""

    __slots__ = ("held", "level", "maybe", "prefetch", "queue", "turns")

    def __init__(self, queue: Queue, level: str, prefetch: int, turns: Turns) -> None:
        self.queue = queue
        self.level = level
        self.prefetch = prefetch
        self.turns = turns
        self.held = 0
        self.maybe = True


@final
class Claimed:
    """A delivery: a claimed row, and the window in which it counts."""

    __slots__ = ("envelope", "lease", "problem", "queue", "redelivered", "seq", "settled", "window")

    def __init__(self, window: Window, lease: Lease, row: Sequence[Any]) -> None:
        """Read `row`: the store's number of it, how often it was delivered, how many workers it crashed, then `rows.COLUMNS`."""
        self.seq: int = row[0]
        self.redelivered: bool = row[1] > 1
        self.envelope, self.problem = unpack(row[3:])
        if row[2]:
            self.envelope = msgspec.structs.replace(self.envelope, crashes=row[2])
        self.queue = window.queue
        self.window = window
        self.lease = lease
        self.settled = False

    @property
    def counted(self) -> bool:
        """As `Delivery.counted`: the row counts."""
        return True

    @property
    def consumers(self) -> int:
        """As `Delivery.consumers`, 0: nobody counts the workers of a queue in a store."""
        return 0

    @property
    def live(self) -> bool:
        """Whether the lease is alive. A settled delivery stays live: a retry that was committed late isn't lost."""
        return self.lease.alive

    @property
    def unsettled(self) -> bool:
        """Whether the delivery can still be settled: its lease is alive and it isn't settled."""
        return self.lease.alive and not self.settled

    async def begin(self) -> bool:
        """As `Delivery.begin`, committed before the job begins; False too if the store fails."""
        about = f"the beginning of job {self.envelope.job_id} of queue {self.queue.name!r}"
        try:
            return bool(await self.window.turns.run(Begin(about=about, delivery=self)))
        except LeveretError:
            return False

    def done(self) -> None:
        """As `Delivery.done`; while the store can't be written, the write is tried until it succeeds."""
        if self.unsettled:
            self.window.turns.done(self)

    async def again(self, envelope: Envelope, /) -> bool:
        """As `Delivery.again`, in one transaction with the ack; does nothing if a late commit settled the delivery."""
        if self.unsettled:
            turns, name = self.window.turns, self.queue.name
            row = packed(name, envelope, when_ms(envelope, turns.clock))
            about = f"the retry of job {envelope.job_id} in queue {name!r}"
            await turns.run(Again(about=about, row=row, delivery=self, deadline=envelope.deadline))
        return self.settled

    async def bury(self, envelope: Envelope, /) -> bool:
        """As `Delivery.bury`, in one transaction with the ack; does nothing if a late commit settled the delivery."""
        if self.unsettled:
            turns, name = self.window.turns, self.queue.name
            buried = msgspec.structs.replace(envelope, origin=envelope.origin or name)
            row = packed(name, buried, int(turns.clock.now() * 1000))
            about = f"the burial of job {envelope.job_id} from queue {name!r}"
            await turns.run(Bury(about=about, row=row, delivery=self, deadline=envelope.deadline))
        return self.settled

    def give_back(self) -> None:
        """As `Delivery.give_back`; the job keeps its place, and doesn't count as redelivered."""
        if self.unsettled:
            self.window.turns.give_back(self)


class Taker:
    """Holds rows under a lease: a consumption, or a reader of dead letters, which has no windows and hears of nothing."""

    def __init__(self, windows: Iterable[Window] = ()) -> None:
        self.lease = Lease()
        self.windows = list(windows)
        self.taking = bool(self.windows)
        self.ready = False
        """Whether the store has registered the taker, and can be written."""

    def arrived(self, deliveries: Sequence[Claimed], /) -> None:
        """Take newly claimed deliveries. This method and the following are called on the loop."""

    def lost(self) -> None:
        """Hear that the lease was lost."""

    def changed(self) -> None:
        """Hear that the taker's queues are consumed, or aren't any more."""

    def cannot(self, error: ConfigurationError, /) -> None:
        """Hear that the store can't be used, and that waiting won't help."""


@final
class Consumption(Taker):
    """A consumption, with one window per level of each queue."""

    def __init__(self, turns: Turns, subscriptions: Sequence[Subscription], sink: Sink) -> None:
        super().__init__(
            Window(s.queue, level.value, s.prefetch, turns) for s in subscriptions for level in s.queue.levels
        )
        self._turns = turns
        self._sink = sink
        self._error: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # the exception is read here, since perhaps nobody waits for `failed`
        self._error.add_done_callback(lambda error: error.cancelled() or error.exception())
        self._closed = False
        self._names = [subscription.queue.name for subscription in subscriptions]

    async def open(self) -> None:
        """Register the consumer; return once registered, or after a second if the store can't be written."""
        write = Open(about="the registration of a consumer", taker=self)
        write.future = asyncio.get_running_loop().create_future()
        write.future.add_done_callback(lambda opened: opened.cancelled() or opened.exception())
        self._turns.post(write)
        try:
            await asyncio.wait({write.future}, timeout=_FIRST_TRY_S)
        except asyncio.CancelledError:
            self._turns.post(self._closing())
            raise
        if write.future.done():
            write.future.result()

    @property
    def queues(self) -> tuple[QueueState, ...]:
        """As `Consumption.queues`; a consumer is registered by a write, which also shows whether the store can be written."""
        if not self.taking:
            return tuple(QueueState(name, "stopped") for name in self._names)
        if self.ready:
            return tuple(QueueState(name, "consumed") for name in self._names)
        why = f"{self._turns.where} can't be written: {self._turns.why}" if self._turns.why else ""
        return tuple(QueueState(name, "connecting", why) for name in self._names)

    async def failed(self) -> None:
        """As `Consumption.failed`."""
        await asyncio.shield(self._error)

    async def stop_taking(self) -> None:
        """As `Consumption.stop_taking`; jobs that are claimed meanwhile are given back."""
        self.taking = False

    async def close(self) -> None:
        """As `Consumption.close`; if the store stays unwritable, held jobs come back when the lease ends, and finished jobs may run again."""
        if self._closed:
            return
        self._closed = True
        self.taking = False
        if self._turns.closed:
            return
        try:
            await self._turns.run(self._closing(time.monotonic() + CLOSE_S))
        except (PublishTimeout, BrokerUnavailable, ConfigurationError):
            self._turns.post(self._closing())  # once the store can be written

    def _closing(self, deadline: float = math.inf) -> Close:
        return Close(about="closing a consumer", taker=self, deadline=deadline)

    def arrived(self, deliveries: Sequence[Claimed], /) -> None:
        """Pass the claimed jobs to the sink, or give them back after `stop_taking`."""
        for delivery in deliveries:
            if self.taking:
                self._sink.deliver(delivery)
            else:
                delivery.give_back()

    def lost(self) -> None:
        """Call `lost` of the sink, and let the worker say what was lost."""
        self._sink.lost()
        self._sink.queues_changed()

    def changed(self) -> None:
        """Call `queues_changed` of the sink."""
        self._sink.queues_changed()

    def cannot(self, error: ConfigurationError, /) -> None:
        """Fail the consumption with `error`."""
        if not self._error.done():
            self._error.set_exception(error)
        self._sink.lost()
        self._sink.queues_changed()


class Write(msgspec.Struct, eq=False, kw_only=True):
    """One thing to do, all or nothing, and the future for its result."""

    about: str
    """What is written, for messages: "job … for queue 'emails'"."""
    deadline: float = math.inf
    future: asyncio.Future[Any] | None = None
    result: Any = None
    """The result of the future, after the commit."""
    state: int = PENDING

    @property
    def job_id(self) -> str | None:
        """The id of the job, if the write adds a row."""
        return None

    @property
    def size(self) -> int:
        """The size of the body, in bytes."""
        return 0


class _Addition(Write):
    row: Row

    @property
    def job_id(self) -> str:
        return self.row[JOB_ID]

    @property
    def size(self) -> int:
        return len(self.row[BODY])


@final
class Publish(_Addition):
    """Adds a job."""


@final
class Again(_Addition):
    """Settles a delivery and adds the job of its next attempt."""

    delivery: Claimed


@final
class Bury(_Addition):
    """Settles a delivery and adds a dead letter."""

    delivery: Claimed


@final
class Begin(Write):
    """Notes that the job of a delivery begins; the result is whether its row is still claimed under the delivery's lease."""

    delivery: Claimed


@final
class Open(Write):
    """Gets a lease for a taker."""

    taker: Taker


@final
class Close(Write):
    """Frees the rows that a taker holds, and deletes its lease."""

    taker: Taker


@final
class Run(Write):
    """Runs any statements in a turn; the result is what `call` returns."""

    call: Call


@final
class Look(Write):
    """Reads in a separate transaction, which no lock of a writer stops; it isn't part of a turn."""

    call: Call


@final
class Turn:
    """One transaction: its work, sorted by kind over all writes, and then its results."""

    def __init__(self, writes: list[Write], done: list[Claimed], back: list[Claimed]) -> None:
        self.writes = writes
        self.done = done
        """Deliveries that were acknowledged."""
        self.back = back
        """Deliveries that were given back."""
        self.jobs: list[Row] = []
        """Rows of jobs to add."""
        self.letters: list[Row] = []
        """Rows of dead letters to add."""
        self.gone: defaultdict[Lease, list[Claimed]] = defaultdict(list)
        """The deliveries whose rows are deleted, by lease."""
        self.given_back: defaultdict[Lease, list[Claimed]] = defaultdict(list)
        """The deliveries whose rows are freed, by lease."""
        self.settled: list[Claimed] = []
        """Deliveries that the writes settle; marked as settled after the commit."""
        self.closing: list[Taker] = []
        """Takers to release, after all other work."""
        self.begins: list[Begin] = []
        self.calls: list[Run] = []
        self.names: set[str] = set()
        """Queues that this transaction adds; the driver finds them."""
        self.freed: Counter[Window] = Counter()
        """The number of places that this transaction frees, by window."""
        self.claimed: defaultdict[Taker, list[Claimed]] = defaultdict(list)
        """New deliveries, by taker; told after the commit."""
        self.too_late = 0
        """The number of finished jobs whose lease was lost."""
        self.lost: list[Taker] = []
        """Takers whose leases were lost."""
        self.ready: list[Taker] = []
        """Takers that this transaction registered, or the first after a failure."""
        self.beats: Count | None = None
        self.added = False
        """Whether other workers may find jobs to claim."""

    def _settle(self, delivery: Claimed) -> bool:
        """Delete the row of `delivery`; return False if its lease is lost, or an earlier attempt, committed late, settled it."""
        if not delivery.unsettled:
            return False
        self.gone[delivery.lease].append(delivery)
        self.freed[delivery.window] += 1
        self.settled.append(delivery)
        return True

    def gather(self) -> None:
        """Sort the work by kind; called once the leases of all takers are checked."""
        for write in self.writes:
            if isinstance(write, Publish):
                self.jobs.append(write.row)
            elif isinstance(write, Again):
                if self._settle(write.delivery):
                    self.jobs.append(write.row)
            elif isinstance(write, Bury):
                if self._settle(write.delivery):
                    self.letters.append(write.row)
            elif isinstance(write, Begin):
                self.begins.append(write)
            elif isinstance(write, Close):
                self.closing.append(write.taker)
            elif isinstance(write, Run):
                self.calls.append(write)
        for delivery in self.done:
            if delivery.lease.alive:
                self.gone[delivery.lease].append(delivery)
                self.freed[delivery.window] += 1
            else:
                self.too_late += 1
        for delivery in self.back:
            if delivery.lease.alive:
                self.given_back[delivery.lease].append(delivery)
                self.freed[delivery.window] += 1
        self.added = bool(self.jobs or self.given_back or self.closing)

    def wanted(self, taker: Taker) -> Iterator[tuple[Window, int]]:
        """Yield the windows of `taker` that may find jobs, and how many jobs each can `claim`."""
        if taker.taking and taker not in self.closing:
            for window in taker.windows:
                free = window.prefetch - window.held + self.freed[window]
                if window.maybe and free > 0:
                    yield window, free

    def claim(self, taker: Taker, window: Window, free: int, rows: Collection[Sequence[Any]]) -> None:
        """Deliver the claimed `rows` after the commit; fewer than `free` mean that no more jobs wait."""
        window.maybe = len(rows) == free
        if rows:
            self.claimed[taker] += [Claimed(window, taker.lease, row) for row in rows]


@final
class Takers:
    """The takers of one store: their leases, windows and beats. Only the driver calls the methods."""

    def __init__(self, where: str, log: logging.Logger) -> None:
        self.all: list[Taker] = []
        self._where = where
        self._log = log
        self._beats = Beats()
        self._opened: list[Lease] = []
        self._lost: list[Taker] = []

    @property
    def taking(self) -> bool:
        """Whether a consumption takes jobs."""
        return any(taker.taking for taker in self.all)

    @property
    def ids(self) -> list[int | None]:
        """The ids of the leases."""
        return [taker.lease.id for taker in self.all]

    @property
    def next_beat(self) -> float:
        """When the next beat is due, `time.monotonic()` seconds."""
        return self._beats.next

    def due(self, now: float) -> bool:
        """Whether a transaction is due for a beat, or for a taker without a lease."""
        return now >= self._beats.next or any(taker.lease.id is None for taker in self.all)

    def may_find_jobs(self) -> None:
        """Let every window look for jobs again."""
        for taker in self.all:
            for window in taker.windows:
                window.maybe = True

    def lease(self, taker: Taker, id: int) -> None:
        """Give `taker` the lease that has got the `id` in the present transaction."""
        taker.lease.id = id
        self._opened.append(taker.lease)

    def lose(self, taker: Taker) -> None:
        """End the lease of `taker`; its deliveries are lost, and it needs a new lease."""
        taker.lease.alive = False
        taker.lease = Lease()
        for window in taker.windows:
            window.held = 0
            window.maybe = True
        self._lost.append(taker)

    def expired(self, taker: Taker) -> None:
        """As `lose`: another worker ended the lease."""
        self._log.warning(
            "the lease on %s was lost: this process sent no beat for %g s; the jobs that it held are delivered again",
            self._where,
            leases.LEASE_S,
        )
        self.lose(taker)

    def silent(self, turn: Turn, beats: Iterable[tuple[int, int]]) -> list[int]:
        """Return which of all workers, given with their `beats`, are silent and lose their jobs."""
        turn.beats = self._beats.counted(beats, self.ids)
        for _ in turn.beats.silent:
            self._log.warning(
                "a worker on %s sent no beat for %g s; the jobs that it held are delivered again",
                self._where,
                leases.LEASE_S,
            )
        return turn.beats.silent

    def rolled_back(self) -> None:
        """Undo what a transaction that failed has noted here."""
        self.may_find_jobs()
        for lease in self._opened:
            lease.id = None
        self._opened.clear()

    def committed(self, turn: Turn) -> None:
        """Take over the results of `turn`, which was committed."""
        self._opened.clear()
        turn.lost, self._lost = self._lost, []
        if turn.beats is not None:
            self._beats.keep(turn.beats, time.monotonic())
        for delivery in turn.settled:
            delivery.settled = True
        for window, count in turn.freed.items():
            window.held -= count
        for deliveries in turn.claimed.values():
            for delivery in deliveries:
                delivery.window.held += 1
        for taker in turn.closing:
            taker.lease.alive = taker.ready = False
            if taker in self.all:
                self.all.remove(taker)
        turn.ready = [taker for taker in self.all if not taker.ready]
        for taker in turn.ready:
            taker.ready = True

    def end(self) -> list[Taker]:
        """End all leases, and return the takers that had them."""
        takers, self.all = self.all, []
        for taker in takers:
            taker.lease.alive = taker.ready = False
        return takers


@final
class _Work:
    """What a loop asks for: writes, and deliveries to acknowledge or to give back."""

    __slots__ = ("back", "done", "writes")

    def __init__(self) -> None:
        self.writes: list[Write] = []
        self.done: list[Claimed] = []
        self.back: list[Claimed] = []

    def __bool__(self) -> bool:
        return bool(self.writes or self.done or self.back)

    def add(self, other: _Work) -> None:
        self.writes += other.writes
        self.done += other.done
        self.back += other.back


@final
class Turns:
    """What one loop asks of the store at `where`.

    The loop calls the methods up to `close`. The `driver` calls those after it, one turn at a time: it waits for `patience`,
    collects, prepares, and takes a turn. It ends the turn by `committed`, or by `rolled_back` and then the method that says why.
    """

    def __init__(self, where: str, runtime: Runtime, log: logging.Logger, driver: Driver) -> None:
        self.where = where
        self.clock = runtime.clock
        self._runtime = runtime
        self._log = log
        self._driver = driver
        self._reset()

    def _reset(self) -> None:
        self.lock = threading.RLock()
        """Held while work passes from the loop to the driver; a driver on the loop is alone with it."""
        self.loop: asyncio.AbstractEventLoop | None = None
        self.takers = Takers(self.where, self._log)
        self.publishing = PublisherState.at(self.clock.now(), "ready")
        """Whether the store can be written, as `Broker.publishing`."""
        self.why = ""
        """Why the store can't be written now; empty if it can."""
        # used by the loop: collected in this turn of it
        self._out = _Work()
        self._flushing = False
        self._window = asyncio.Semaphore(WINDOW)
        # under the lock: handed over to the driver
        self._in = _Work()
        self._running = False
        self._stop_by: float | None = None
        self._stopped: asyncio.Future[None] | None = None
        # used by the driver
        self._work = _Work()
        self._alone = 0
        self._failures = 0
        self._not_before = 0.0
        self._failing_since: float | None = None
        self._said = False

    def forked(self) -> None:
        """In a forked child: drop the parent's work, and end its leases here."""
        self.takers.end()
        self._reset()

    async def publish(self, queue: Queue, envelope: Envelope) -> None:
        """As `Broker.publish`."""
        about = f"job {envelope.job_id} for queue {queue.name!r}"
        row, deadline = packed(queue.name, envelope, when_ms(envelope, self.clock)), envelope.deadline
        try:
            async with asyncio.timeout_at(deadline):
                await self._window.acquire()
        except TimeoutError:
            msg = (
                f"{about} wasn't published in time: {WINDOW} earlier publishes still wait to be written to {self.where}"
            )
            raise PublishTimeout(msg, job_id=envelope.job_id, maybe_published=False) from None
        try:
            await self.run(Publish(about=about, row=row, deadline=deadline))
        finally:
            self._window.release()

    async def run(self, write: Write) -> Any:
        """Do `write` and return its result; raise at its deadline, after which a write that isn't in a transaction is never done."""
        loop = self._attach()
        if self.closed:
            raise self._unavailable(write, "the broker is closed")
        if write.deadline <= time.monotonic():
            raise self._late(write, maybe=False)
        write.future = loop.create_future()
        timer = loop.call_at(write.deadline, self._expire, write) if write.deadline != math.inf else None
        self._out.writes.append(write)
        self._flush_soon(loop)
        try:
            return await write.future
        except asyncio.CancelledError:
            with self.lock:
                if write.state == PENDING:
                    write.state = OVER
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def post(self, write: Write) -> None:
        """Do `write` as soon as the store can be written, without waiting for it."""
        loop = self._attach()
        self._out.writes.append(write)
        self._flush_soon(loop)

    def done(self, delivery: Claimed) -> None:
        """Delete the row of `delivery` in the next transaction, trying until it succeeds."""
        delivery.settled = True
        loop = self._attach()
        self._out.done.append(delivery)
        self._flush_soon(loop)

    def give_back(self, delivery: Claimed) -> None:
        """Free the row of `delivery` in the next transaction, trying until it succeeds."""
        delivery.settled = True
        loop = self._attach()
        self._out.back.append(delivery)
        self._flush_soon(loop)

    async def close(self) -> None:
        """End the driver, which has `CLOSE_S` to do the remaining work. Idempotent."""
        loop = self._attach()
        if not self._running:
            self._stop_by = 0.0
            return
        self._flush()
        stopped = loop.create_future()
        with self.lock:
            self._stop_by = time.monotonic() + CLOSE_S
            self.publishing = self.publishing.then(self.clock.now(), "closed")
            self._stopped = stopped
            self._driver.wake()
        with suppress(TimeoutError):
            # the driver ends by itself unless the store hangs; then it is left running
            await asyncio.wait_for(stopped, CLOSE_S + 1.0)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._stop_by is not None

    def _attach(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if loop is not self.loop:
            self.loop = loop
            self._flushing = False
        return loop

    def _flush_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        # wakes the driver once per turn of the loop, with everything collected in that turn
        if not self._flushing:
            self._flushing = True
            loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        with self.lock:
            self._in.add(self._out)
            self._out = _Work()
            if not (self._running or self.closed):
                self._running = True
                self._driver.start()
            self._driver.wake()

    def _expire(self, write: Write) -> None:
        assert write.future is not None
        if write.future.done():
            return
        with self.lock:
            maybe = write.state == TAKEN
            write.state = OVER
        write.future.set_exception(self._late(write, maybe=maybe))

    def _late(self, write: Write, *, maybe: bool) -> PublishTimeout:
        why = "the write is under way" if maybe else self.why or "its deadline passed before it could be written"
        return PublishTimeout(
            f"{write.about} wasn't confirmed in time by {self.where}: {why}", job_id=write.job_id, maybe_published=maybe
        )

    def _unavailable(self, write: Write, why: str) -> BrokerUnavailable:
        return BrokerUnavailable(f"{write.about} wasn't written to {self.where}: {why}", job_id=write.job_id)

    def patience(self, poll_s: float) -> float | None:
        """Return how long the driver may wait to be woken, seconds; None means for ever. While a consumption takes jobs, at most `poll_s`.

        A thread holds `lock` from here until it waits.
        """
        now = time.monotonic()
        if self._in:
            return 0.0
        if self._stop_by is not None:
            return min(self._stop_by, self._not_before) - now
        if self._not_before > now:
            return self._not_before - now
        if self._work:
            return 0.0
        if self.takers.taking:
            return poll_s
        return max(0.0, self.takers.next_beat - now) if self.takers.all else None

    def collect(self) -> bool:
        """Take over the work that was handed over; return False when the driver must end."""
        with self.lock:
            self._work.add(self._in)
            self._in = _Work()
            if self._stop_by is None:
                return True
            return bool(self._work) and time.monotonic() < self._stop_by

    def prepare(self, now: float) -> None:
        """Begin a turn: drop the writes whose deadlines passed, and take in new takers."""
        # a write whose deadline passed is never taken, even if the busy loop hasn't expired it yet
        self._work.writes = [write for write in self._work.writes if write.state == PENDING and write.deadline > now]
        takers = self.takers.all
        takers += [write.taker for write in self._work.writes if isinstance(write, Open) and write.taker not in takers]

    def looks(self) -> list[Look]:
        """Return the reads that wait, for `looked`; they need no turn."""
        return [write for write in self._work.writes if isinstance(write, Look)]

    def looked(self, looks: Sequence[Look]) -> None:
        """Answer the reads."""
        self._work.writes = [write for write in self._work.writes if not isinstance(write, Look)]
        self._driver.tell(_answer, looks)

    @property
    def waiting(self) -> bool:
        """Whether there is something to write."""
        return bool(self._work)

    def rest(self) -> None:
        """End a turn in which nothing was to be done."""
        if not self._said:
            self._failing_since = None

    def take(self) -> Turn:
        """Take the writes of one transaction; from here on a deadline can't cancel them."""
        taken: list[Write] = []
        size = 0
        now = time.monotonic()  # waiting for the store may have taken a while
        with self.lock:
            for write in self._work.writes:
                size += write.size
                if taken and (size > BATCH_BYTES or self._alone):
                    break
                if write.state == PENDING and write.deadline > now:
                    write.state = TAKEN
                    taken.append(write)
        self._alone = max(0, self._alone - 1)
        return Turn(taken, self._work.done, self._work.back)

    def committed(self, turn: Turn) -> None:
        """End a turn that was committed, and tell its results."""
        self._work.writes = [write for write in self._work.writes if write.state == PENDING]
        self._work.done.clear()
        self._work.back.clear()
        self.takers.committed(turn)
        if turn.too_late:
            self._log.warning(
                "%d finished jobs of %s are delivered again, since their lease was lost", turn.too_late, self.where
            )
        self._failures = 0
        self._not_before = 0.0
        if self.why:
            self._can_write("")
        if self._said:
            assert self._failing_since is not None
            self._log.info("%s can be written again, after %.1f s", self.where, time.monotonic() - self._failing_since)
        self._failing_since, self._said = None, False
        self._driver.tell(_tell, turn)

    def rolled_back(self) -> None:
        """End a turn that left nothing behind: its writes wait again. One of the following says what comes next."""
        self.takers.rolled_back()
        with self.lock:
            for write in self._work.writes:
                if write.state == TAKEN:
                    write.state = PENDING

    def doubt(self, turn: Turn, why: str) -> None:
        """Fail the writes of a turn of which nobody knows whether it was committed."""
        self._fail(
            turn.writes,
            lambda write: PublishTimeout(f"{write.about}: {why}", job_id=write.job_id, maybe_published=True),
        )

    def refuse(self, turn: Turn, why: str) -> None:
        """Fail the write that the store refuses; of several, the next turns find out which, one write each."""
        if len(turn.writes) == 1:
            self._fail(turn.writes, lambda write: self._unavailable(write, why))
        else:
            self._alone = len(self._work.writes)

    def hold_up(self, why: str, *, pause_s: float, quiet_s: float) -> None:
        """Try again in `pause_s`. Nothing is refused or lost: the writes wait until their deadlines. Logged after `quiet_s`."""
        self._held_up(why, pause_s)
        self._say(quiet_s)

    def fail(self, why: str) -> None:
        """Fail the writes that somebody waits for, and try again after a back-off."""
        settings = self._runtime.settings
        self._failures += 1
        base_s, cap_s = settings.reconnect_base_s, settings.reconnect_cap_s
        self._held_up(why, full_jitter(self._failures, base_s=base_s, cap_s=cap_s, rng=self._runtime.rng))
        failed = [write for write in self._work.writes if write.future is not None and not isinstance(write, Open)]
        self._fail(failed, lambda write: self._unavailable(write, why))
        self._say(0.0)

    def give_up(self, error: ConfigurationError) -> None:
        """Fail everything with `error`: the store can't be used, and waiting won't help."""
        takers = self.takers.end()
        self._can_write(str(error))
        self._fail(self._work.writes, lambda write: error if write.job_id is None else _unusable(write, error))
        done = len(self._work.done)
        if done:
            self._log.warning("%d finished jobs couldn't be deleted from %s: %s", done, self.where, error)
        self._work.done.clear()
        self._work.back.clear()
        for taker in takers:
            self._driver.tell(taker.cannot, error)

    def end(self) -> None:
        """End all leases, and refuse what is left: the driver ends. The store has freed the held jobs, or a lease's end will."""
        kept = sum(delivery.lease.alive for delivery in self._work.done)
        if kept:
            self._log.warning(
                "%d finished jobs couldn't be deleted from %s and will run again: %s", kept, self.where, self.why
            )
        self.takers.end()
        with self.lock:
            left = [*self._work.writes, *self._in.writes]
            self._work, self._in = _Work(), _Work()
            self._running = False
        self._driver.tell(_refuse, [(write, self._unavailable(write, "the broker is closed")) for write in left])
        self._driver.tell(self._ended)

    def orphaned(self) -> None:
        """End the driver soon: the loop was closed without a call of `close`."""
        with self.lock:
            self._stop_by = self._stop_by or 0.0

    def _ended(self) -> None:
        if self._stopped is not None and not self._stopped.done():
            self._stopped.set_result(None)

    def _can_write(self, why_not: str) -> None:
        self.why = why_not
        if not self.closed:
            now = self.clock.now()
            self.publishing = self.publishing.then(now, "blocked" if why_not else "ready", " ".join(why_not.split()))

    def _held_up(self, why: str, pause_s: float) -> None:
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        self._not_before = now + pause_s
        self._can_write(why)

    def _say(self, quiet_s: float) -> None:
        assert self._failing_since is not None
        takers = list(self.takers.all)
        if self._said or time.monotonic() - self._failing_since < quiet_s or not (takers or self._work.done):
            return
        self._said = True
        for taker in takers:
            taker.ready = False
        self._driver.tell(_changed, takers)
        self._log.warning("%s can't be written: %s; trying again", self.where, self.why)

    def _fail(self, writes: Sequence[Write], error: Callable[[Write], LeveretError]) -> None:
        with self.lock:
            for write in writes:
                write.state = OVER
        self._work.writes = [write for write in self._work.writes if write.state != OVER]
        self._driver.tell(_refuse, [(write, error(write)) for write in writes])


def _unusable(write: Write, error: ConfigurationError) -> BrokerUnavailable:
    """Return the error of a publish, a retry or a burial to a store that can't be used: publishers handle `PublishError` only."""
    unavailable = BrokerUnavailable(str(error), job_id=write.job_id)
    unavailable.__cause__ = error
    return unavailable


def _tell(turn: Turn) -> None:
    """On the loop: report the results of `turn`."""
    _answer(turn.writes)
    for taker in turn.lost:
        taker.lost()
    _changed(turn.ready)
    for taker, deliveries in turn.claimed.items():
        taker.arrived(deliveries)


def _changed(takers: Iterable[Taker]) -> None:
    """On the loop: tell the consumptions that their queues are consumed, or aren't any more."""
    for taker in takers:
        taker.changed()


def _answer(writes: Iterable[Write]) -> None:
    """On the loop: end the futures of the writes that succeeded."""
    for write in writes:
        if write.future is not None and not write.future.done():
            write.future.set_result(write.result)


def _refuse(refused: Iterable[tuple[Write, LeveretError]]) -> None:
    """On the loop: end the futures of the writes that failed."""
    for write, error in refused:
        if write.future is not None and not write.future.done():
            write.future.set_exception(error)
