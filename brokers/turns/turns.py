"""The turns: what one event loop asks of a store passes here, from the loop to the driver and back."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, final

from leveret.backoff import full_jitter
from leveret.broker import PublisherState, PublisherStateName
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable, LeveretError, PublishTimeout
from leveret.job import Queue
from leveret.runtime import Runtime

from ..rows import packed, when_ms
from .claimed import Claimed
from .driver import Driver
from .takers import Taker, Takers
from .turn import Turn
from .writes import OVER, PENDING, TAKEN, Close, End, Look, Open, Posted, Publish, Write

if TYPE_CHECKING:
    from leveret.store import Change, Progress

BATCH_BYTES = 32 << 20
"""At most this many bytes of bodies in one transaction; a single larger job is written alone."""
UNDER_WAY = "the write is under way"
"""How far a write is that the driver has taken, unless the driver knows more."""
WINDOW = 1000
"""At most this many publishes are unconfirmed at once; further publishes wait, within their deadlines."""
CLOSE_S = 5.0
"""How long a close waits if the store can't be written."""

_Away: TypeAlias = Literal["blocked", "connecting"]


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
    `not_yet` says that a store over the network wasn't reached yet; a local store is ready from the start.
    """

    def __init__(
        self,
        where: str,
        runtime: Runtime,
        log: logging.Logger,
        driver: Driver,
        *,
        not_yet: str = "",
    ) -> None:
        self.where = where
        self.clock = runtime.clock
        self.missed: Callable[[Change | Progress], object] = _nobody
        """Called on the loop with what `End` couldn't enter into the job store, or may not have."""
        self._runtime = runtime
        self._log = log
        self._driver = driver
        self._not_yet = not_yet
        self._reset()

    def _reset(self) -> None:
        self.lock = threading.RLock()
        """Held while work passes from the loop to the driver; a driver on the loop is alone with it."""
        self.loop: asyncio.AbstractEventLoop | None = None
        self.takers = Takers(self.where, self._log)
        self.publishing = PublisherState.at(self.clock.now(), "connecting" if self._not_yet else "ready", self._not_yet)
        """Whether the store can be written, as `Broker.publishing`."""
        self.why = ""
        """Why the store can't be written now; empty if it can."""
        self.under_way = UNDER_WAY
        """How far the writes are that the driver has taken: what a publish says whose time ends meanwhile."""
        # used by the loop: collected in this turn of it
        self._out = _Work()
        self._flushing = False
        self._window = asyncio.Semaphore(WINDOW)
        self._posts: dict[Posted, None] = {}
        self._looking: asyncio.TimerHandle | None = None
        self._next_look = math.inf
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

    def post_publish(self, queue: Queue, envelope: Envelope) -> Posted | None:
        """As `Broker.post`: without a task, and without a future unless somebody waits. InvalidJob as `publish`."""
        if len(self._posts) >= WINDOW or self.closed:
            return None
        post = Posted(
            about=f"job {envelope.job_id} for queue {queue.name!r}",
            row=packed(queue.name, envelope, None),
            deadline=envelope.deadline,
            posts=self._posts,
        )
        self._posts[post] = None
        self.post(post)
        if post.deadline < self._next_look:
            self._look(post.deadline)
        return post

    def _look(self, at: float) -> None:
        """Look at `at` whether the deadlines of posts have passed: all posts share one timer."""
        loop = asyncio.get_running_loop()
        if self._looking is not None:
            self._looking.cancel()
        self._next_look = at
        self._looking = loop.call_at(at, self._expire_posts) if at != math.inf else None

    def _expire_posts(self) -> None:
        now = time.monotonic()
        for post in [post for post in self._posts if post.deadline <= now]:
            self._expire(post)
        self._look(min((post.deadline for post in self._posts), default=math.inf))

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
        """Delete the row of `delivery` in the next transaction, with its changes, trying until it succeeds."""
        delivery.settled = True
        loop = self._attach()
        if delivery.changes:
            self._out.writes.append(End(about="the end of a job", delivery=delivery, changes=delivery.changes))
        else:
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
            self._stop_by = self.close_by()
            self.publishing = self.publishing.then(self.clock.now(), "closed")
            self._stopped = stopped
            self._driver.wake()
        with suppress(TimeoutError):
            # the driver ends by itself unless the store hangs; then it is left running
            await asyncio.wait_for(stopped, CLOSE_S + 1.0)

    def close_by(self) -> float:
        """Return until when a close may wait, `time.monotonic()` seconds."""
        return time.monotonic() + CLOSE_S

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
        if write.ended:
            return
        with self.lock:
            maybe = write.state == TAKEN
            write.state = OVER
        write.refuse(self._late(write, maybe=maybe))

    def _late(self, write: Write, *, maybe: bool) -> PublishTimeout:
        away = self.why or self.publishing.why
        why = self.under_way if maybe else away or "its deadline passed before it could be written"
        return PublishTimeout(
            f"{write.about} wasn't confirmed in time by {self.where}: {why}", job_id=write.job_id, maybe_published=maybe
        )

    def _unavailable(self, write: Write, why: str) -> BrokerUnavailable:
        return BrokerUnavailable(f"{write.about} wasn't written to {self.where}: {why}", job_id=write.job_id)

    @property
    def pause_s(self) -> float:
        """How long to wait before the next try, after a failure, seconds; 0 once the turns are closed."""
        return 0.0 if self.closed else max(0.0, self._not_before - time.monotonic())

    def patience(self, poll_s: float) -> float | None:
        """Return how long the driver may wait to be woken, seconds; None means for ever. While a consumption takes jobs, at most `poll_s`.

        A thread holds `lock` from here until it waits.
        """
        now = time.monotonic()
        if self._in:
            return 0.0
        if self._stop_by is not None:
            self._drop_late(now)
            return min(self._stop_by, self._not_before) - now if self._left else 0.0
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
            return self._left and time.monotonic() < self._stop_by

    @property
    def _left(self) -> bool:
        """Whether a close has work to wait for: to a store that can't be written, a lease without jobs isn't worth it, and ends by itself."""
        work = self._work
        if not self.why:
            return bool(work)
        return bool(work.done or work.back) or any(
            not isinstance(write, Open | Close) or write.taker.holds for write in work.writes
        )

    def _drop_late(self, now: float) -> None:
        # a write whose deadline passed is never taken, even if the busy loop hasn't expired it yet
        self._work.writes = [write for write in self._work.writes if write.state == PENDING and write.deadline > now]

    def prepare(self, now: float) -> None:
        """Begin a turn: drop the writes whose deadlines passed, and take in new takers."""
        self._drop_late(now)
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

    @property
    def publishes_only(self) -> bool:
        """Whether publishes wait to be written, and nothing else."""
        work = self._work
        return bool(work) and not (work.done or work.back) and all(isinstance(write, Publish) for write in work.writes)

    def take(self, most: float = math.inf) -> Turn:
        """Take the writes of one transaction, at most so many; from here on a deadline can't cancel them."""
        taken: list[Write] = []
        size = 0
        now = time.monotonic()  # waiting for the store may have taken a while
        with self.lock:
            for write in self._work.writes:
                size += write.size
                if taken and (size > BATCH_BYTES or self._alone or len(taken) >= most):
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
        if self.publishing.name != "ready":
            self._can_write("ready", "")
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

    def no_room(self, turn: Turn, why: str) -> None:
        """Fail the publishes of a turn that the store has no room for; its other writes are tried again."""
        publishes = [write for write in turn.writes if isinstance(write, Publish)]
        self._fail(publishes, lambda write: self._unavailable(write, why))

    def hold_up(self, why: str, *, pause_s: float | None, quiet_s: float, state: _Away = "blocked") -> None:
        """Try again in `pause_s`, or after a back-off. Nothing is refused or lost: the writes wait until their deadlines.

        `state` says whether the store takes no writes, or can't be reached. Logged after `quiet_s`.
        """
        self._held_up(why, self._backed_off() if pause_s is None else pause_s, state)
        self._say(quiet_s)

    def fail(self, why: str) -> None:
        """Fail the writes that somebody waits for, and try again after a back-off."""
        self._held_up(why, self._backed_off(), "blocked")
        failed = [write for write in self._work.writes if write.awaited and not isinstance(write, Open)]
        self._fail(failed, lambda write: self._unavailable(write, why))
        self._say(0.0)

    def give_up(self, error: LeveretError) -> None:
        """Fail everything with `error`, without another try."""
        takers = self.takers.end()
        self._can_write("blocked", str(error))
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
        ends = [write.delivery for write in self._work.writes if isinstance(write, End)]
        kept = sum(delivery.lease.alive for delivery in (*self._work.done, *ends))
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

    def _can_write(self, state: PublisherStateName, why_not: str) -> None:
        self.why = why_not.removeprefix(f"{self.where}: ")  # what quotes it says where
        if not self.closed:
            self.publishing = self.publishing.then(self.clock.now(), state, " ".join(why_not.split()))

    def _backed_off(self) -> float:
        settings = self._runtime.settings
        self._failures += 1
        base_s, cap_s = settings.reconnect_base_s, settings.reconnect_cap_s
        return full_jitter(self._failures, base_s=base_s, cap_s=cap_s, rng=self._runtime.rng)

    def _held_up(self, why: str, pause_s: float, state: _Away) -> None:
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        self._not_before = now + pause_s
        self._can_write(state, why)

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


def _nobody(_: object) -> None:
    """Take what nobody asked for."""


def _unusable(write: Write, error: LeveretError) -> BrokerUnavailable:
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
    """On the loop: end the writes that succeeded."""
    for write in writes:
        write.answer()


def _refuse(refused: Iterable[tuple[Write, LeveretError]]) -> None:
    """On the loop: end the writes that failed."""
    for write, error in refused:
        write.refuse(error)
