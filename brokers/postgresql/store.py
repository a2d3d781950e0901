"""A process's access to one database, through one connection, which a task of the loop uses.

The task drives the turns: it writes all that the loop collected during the last commit in one transaction.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, final

import asyncpg

from leveret.errors import BrokerUnavailable, ConfigurationError
from leveret.runtime import Runtime

from ..turns import WINDOW, Claimed, OnLoop, Taker, Turn, Turns
from .address import Address
from .cursors import Cursors
from .link import Link, meaning_of, reported
from .statements import LEVEL_NAMES, LEVEL_NUMBERS, UNKNOWN_LEVEL, Statements, columns, shortened

if TYPE_CHECKING:
    from leveret.store import Change, Progress

    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

log = logging.getLogger("leveret.postgresql")

FIRST_POLL_S = 0.01
"""How soon a worker that has found nothing looks again, seconds; the wait grows fivefold each time."""
POLL_S = 1.0
"""How often a worker that hears notices looks for jobs, seconds."""
POLL_WITHOUT_NOTICES_S = 0.1
"""How often a worker looks that hears none."""
LOOK_S = 0.5
"""How often a worker looks for workers whose backends are gone, seconds; who is missing twice is dead."""
TURN_S = 10.0
"""How long a turn may take, seconds, and a second more for each MB of bodies; then the connection is given up."""
_BYTES_A_SECOND = 1 << 20
_WRITES_AT_ONCE = WINDOW // 2
"""At most this many writes are in a transaction, so that a publisher can make as many while the server works."""
_MOVED_AT_ONCE = 1000
_PLACE = itemgetter(3, 4)
"""The queue and the level of a row of `claim`."""
_SAY_AFTER_S = 1.0
_BUSY_PAUSE_S = 0.02
_BEAT_WITHIN_S = 2.0


_Step: TypeAlias = Literal["before", "within", "commit", "alone"]
"""How far a turn came: before its transaction, within it, at its commit, or in the one statement that it is."""


@final
class Store(OnLoop):
    """The schema at `address`, which one loop of this process uses: the `Driver` of its `turns`."""

    def __init__(self, address: Address, runtime: Runtime, *, name: str = "leveret", patient: bool = True) -> None:
        super().__init__(log)
        self.turns = Turns(str(address), runtime, log, self, not_yet=f"{address} wasn't reached yet")
        self.enter: Callable[[Connection, Sequence[Change | Progress]], Awaitable[None]] | None = None
        """Enters changes into the job store, if that is in this schema."""
        self._clock = runtime.clock
        self._patient = patient
        """Whether a server that can't be reached is tried again until the deadlines of the writes."""
        self._sql = Statements(address.schema)
        self._link = Link(address, runtime, self._sql.channel, self._noticed, name=name)
        self._names: set[str] = set()
        """The queues that are known to be in the table."""
        self._leftover: list[int] = []
        """Leases of ours that ended in doubt, and are to be released."""
        self._cursors = Cursors()
        self._strange: set[int] = set()
        """The numbers of held jobs whose level leveret doesn't know."""
        self._missing: set[int] = set()
        """The workers whose backends weren't there at the last look."""
        self._idle = False
        """Whether the last look found nothing."""
        self._marks: dict[Taker, list[str]] = {}
        """The queues for which the connection is marked as waiting, so that publishers tell."""
        self._poll_s = 0.0
        self._losses = 0
        self._next_due = 0.0
        self._next_look = 0.0

    def _noticed(self, notice: str) -> None:
        self._told = True
        if notice == "freed":
            self._cursors.start_over()
        elif notice == "later":
            self._next_due = 0.0
        self._news.set()

    async def _leave(self) -> None:
        """Free all held jobs if the server answers; otherwise other workers free them when the leases end."""
        leases = [taker.lease.id for taker in self.turns.takers.all if taker.lease.id is not None]
        try:
            async with asyncio.timeout(2.0):
                if leases and (connection := self._link.opened):
                    await connection.execute(self._link.begin)
                    for lease in leases:
                        await connection.execute(self._sql.release, lease, False)
                    await connection.execute("COMMIT")
                await self._link.close()
        except Exception as error:  # noqa: BLE001 - what can't be freed now comes back when the leases end
            log.debug("%s: the leases weren't released: %s", self.turns.where, error)
        finally:
            self._link.abandon()

    def _wait_s(self) -> float:
        """Return how long a worker waits for a notice before it looks for jobs."""
        soonest = min(self._next_due, self._next_look) if self._link.direct else self._next_due
        return min(self._poll_s, max(0.0, soonest - time.monotonic()))

    async def _turn(self) -> None:
        turns = self.turns
        self._told = False
        turns.prepare(time.monotonic())
        turn: Turn | None = None
        step: _Step = "before"
        try:
            async with asyncio.timeout(TURN_S) as limit:
                connection = await self._link.connection(listen=turns.takers.taking)
                step = "within"
                await self._look(connection)
                if not (turns.waiting or turns.takers.all or turns.publishing.name == "connecting"):
                    turns.rest()
                    return
                if not turns.waiting and self._only_claims(time.monotonic()):
                    step = "alone" if len(turns.takers.all) == 1 else "commit"  # each claim is a transaction by itself
                    turn = turns.take()
                    await self._claim_all(connection, turn)
                elif self._only_publishes():
                    step = "alone"
                    turn = self._take(limit)
                    turn.gather()
                    await self._add_jobs(connection, turn)
                else:
                    if begun := self._leases_due(time.monotonic()):
                        await connection.execute(self._link.begin)
                    step = "within"
                    turn = self._take(limit)
                    await self._transact(connection, turn, begun=begun)
                    step = "commit"
                    await connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - asyncpg's errors have several bases; `meaning_of` sorts them
            await self._failed(error, turn, step)
        else:
            self._committed(turn)

    def _take(self, limit: asyncio.Timeout) -> Turn:
        turn = self.turns.take(_WRITES_AT_ONCE)
        if (size := sum(write.size for write in turn.writes)) > _BYTES_A_SECOND:
            limit.reschedule(asyncio.get_running_loop().time() + TURN_S + size / _BYTES_A_SECOND)
        return turn

    def _committed(self, turn: Turn) -> None:
        self._names |= turn.names
        self._leftover.clear()
        self._losses = 0
        self._link.fresh = False
        if self._strange:
            self._strange -= {delivery.seq for gone in turn.gone.values() for delivery in gone}
        if turn.claimed:
            self._idle, self._poll_s = False, FIRST_POLL_S
        elif not self._idle:
            # looks once more: a publisher that asked who waits, before this turn was committed, told nobody
            self._idle, self._poll_s = True, 0.0
        else:
            self._poll_s = min(max(self._poll_s * 5, FIRST_POLL_S), self._longest_s)
        self.turns.committed(turn)

    @property
    def _longest_s(self) -> float:
        return POLL_S if self._link.listens else POLL_WITHOUT_NOTICES_S

    async def _failed(self, error: Exception, turn: Turn | None, step: _Step) -> None:
        """End a turn that failed, by what its error means."""
        turns = self.turns
        meaning = meaning_of(error)
        if meaning is None:
            raise error
        said = " ".join(str(error).split()) or ("no answer in time" if isinstance(error, TimeoutError) else repr(error))
        if meaning == "lost":
            self._link.lost(error)
        elif step != "before":
            await self._link.rollback()
        if step == "alone":
            step = "within" if reported(error) else "commit"
        if step == "commit" and meaning == "lost" and turn is not None:
            turns.doubt(turn, f"the connection was lost during the commit: {said}")
            for taker in turns.takers.all:  # what was claimed isn't known here, and is freed with the old lease
                self._leave_lease(taker)
        turns.rolled_back()
        self._start_over()
        if meaning == "wrong":
            turns.give_up(error if isinstance(error, ConfigurationError) else self._wrong(error, said))
        elif step == "before" and isinstance(error, BrokerUnavailable) and not self._patient:
            turns.give_up(error)
        elif meaning == "lease":
            lost = str(getattr(error, "detail", ""))
            for taker in turns.takers.all:
                if str(taker.lease.id) == lost:
                    turns.takers.expired(taker)
            self._told = True
        elif meaning == "busy":
            turns.hold_up(f"its tables are locked: {said}", pause_s=_BUSY_PAUSE_S, quiet_s=_SAY_AFTER_S)
            if turn is not None and turn.changes:
                await self._beat()
        elif meaning == "refused" and turn is not None and turn.writes:
            turns.refuse(turn, f"PostgreSQL refuses it: {said}")
        elif meaning == "full":
            turns.fail(said)
        else:
            # the first try comes at once: a server that ends connections, as a fail-over does, takes new ones
            self._losses += 1
            self._told = True  # tries again, even if nobody waits for it: a publisher's state is looked at
            pause_s = 0.0 if self._losses == 1 and step != "before" else None
            turns.hold_up(said, pause_s=pause_s, quiet_s=_SAY_AFTER_S, state="connecting")

    async def _beat(self) -> None:
        """Raise the beats by themselves: a lock on the job store's table holds up this worker, and not those that would take it for dead."""
        if (connection := self._link.opened) is not None:
            try:
                async with asyncio.timeout(_BEAT_WITHIN_S):
                    await connection.execute(self._sql.beat, self.turns.takers.ids)
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                self._link.abandon()

    def _wrong(self, error: Exception, said: str) -> ConfigurationError:
        what = (
            "the role lacks a right" if isinstance(error, asyncpg.InsufficientPrivilegeError) else "the schema is wrong"
        )
        wrong = ConfigurationError(f"{self.turns.where}: {what}: {said}")
        wrong.__cause__ = error
        return wrong

    def _leave_lease(self, taker: Taker) -> None:
        if taker.lease.id is not None:
            self._leftover.append(taker.lease.id)
        self.turns.takers.lose(taker)

    def _start_over(self) -> None:
        self._cursors.start_over()
        self._next_due = 0.0
        self._idle = False
        self._marks.clear()
        self._missing.clear()

    async def _look(self, connection: Connection) -> None:
        looks = self.turns.looks()
        if looks:
            await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL lock_timeout = '2s'")
            for look in looks:
                look.result = await look.call(connection)
            await connection.execute("COMMIT")
            self.turns.looked(looks)

    async def _transact(self, connection: Connection, turn: Turn, *, begun: bool) -> None:
        """Do all the work of a turn in a transaction; `begun` says that it was begun, since leases come first."""
        takers, statements = self.turns.takers, [self._link.begin]
        if begun:
            await self._hold(connection, turn)
            statements.clear()
        turn.gather()
        statements += self._settlements(turn)
        if statements:  # at once: while the server settles, the loop runs the jobs that the last turn claimed
            await connection.execute("; ".join(statements))
        if turn.names:
            await connection.execute(self._sql.add_queues, sorted(turn.names))
        if turn.jobs:
            await self._add_jobs(connection, turn)
        if turn.letters:
            await connection.execute(self._sql.add_letters, *columns(turn.letters, None))
        if turn.changes:
            assert self.enter is not None
            await self.enter(connection, turn.changes)
        for begin in turn.begins:
            delivery = begin.delivery
            begin.result = (await connection.execute(self._sql.begin, delivery.seq, delivery.lease.id)) == "UPDATE 1"
        for run in turn.calls:
            run.result = await run.call(connection)
        for taker in turn.closing:
            if taker.lease.id is not None:
                await self._release(connection, taker.lease.id)
        if turn.closing and self._marks:
            self._marks.clear()
            await connection.execute("SELECT pg_advisory_unlock_all()")
        if takers.taking:
            await self._move_due(connection)
            await self._claim_all(connection, turn)

    async def _add_jobs(self, connection: Connection, turn: Turn) -> None:
        table = columns(turn.jobs, self._clock.now() * 1000)
        if len(turn.jobs) == 1:  # the driver takes longer for an array, and the server 70 µs more to repeat values
            await connection.execute(self._sql.add_job, *(value for (value,) in table))
        else:
            await connection.execute(self._sql.add_shortened, *shortened(table))
        if any(row[2] is not None for row in turn.jobs):
            self._next_due = 0.0

    def _only_publishes(self) -> bool:
        """Whether a turn has to add jobs and no more, which is one statement on a connection to the server itself."""
        return self._link.direct and not (self.turns.takers.all or self._leftover) and self.turns.publishes_only

    def _only_claims(self, now: float) -> bool:
        """Whether a turn without work has to claim and no more, which a connection to the server itself does without a transaction block."""
        return self._link.direct and not self._leases_due(now) and now < self._next_due

    def _leases_due(self, now: float) -> bool:
        """Whether a turn has to see to leases."""
        takers = self.turns.takers
        if self._leftover or (takers.all and (self._link.fresh or takers.due(now))):
            return True
        return self._link.direct and takers.taking and now >= self._next_look

    async def _hold(self, connection: Connection, turn: Turn) -> None:
        """Get the leases that are missing, raise the beats, and free what dead workers hold."""
        takers, now = self.turns.takers, time.monotonic()
        for lease in self._leftover:
            await self._release(connection, lease)
        if takers.all and now >= takers.next_beat:
            kept = {row[0] for row in await connection.fetch(self._sql.beat, takers.ids)}
            for taker in takers.all:
                if taker.lease.id is not None and taker.lease.id not in kept:
                    takers.expired(taker)
            beats = [(row[0], row[1]) for row in await connection.fetch(self._sql.beats)]
            for worker in takers.silent(turn, beats):
                await self._release(connection, worker, died=True)
        named = False
        for taker in takers.all:
            if taker.lease.id is None:
                takers.lease(taker, await connection.fetchval(self._sql.register))
                turn.names |= {window.queue.name for window in taker.windows} - self._names
                named = True
        if self._link.direct and takers.all and (named or self._link.fresh):
            await connection.execute(self._sql.identify, takers.ids)
        if self._link.direct and takers.taking and now >= self._next_look:
            self._next_look = now + LOOK_S
            missing = {row[0] for row in await connection.fetch(self._sql.missing, takers.ids)}
            for worker in missing & self._missing:
                await self._release(connection, worker, died=True)
            self._missing = missing - self._missing

    async def _release(self, connection: Connection, lease: int, *, died: bool = False) -> None:
        await connection.execute(self._sql.release, lease, died)
        self._cursors.start_over()

    def _settlements(self, turn: Turn) -> list[str]:
        """Return the statements that delete the rows of finished jobs, and free those that were given back."""
        sql, found = self._sql, list[str]()
        for lease, deliveries in turn.gone.items():
            names = [delivery.queue.name for delivery in deliveries]
            levels = [self._number(delivery) for delivery in deliveries]
            found.append(sql.settle(lease.id, names, levels, [delivery.seq for delivery in deliveries]))
        for lease, deliveries in turn.given_back.items():
            found.append(sql.give_back(lease.id, [delivery.seq for delivery in deliveries]))
            found.append(sql.freed({delivery.queue.name for delivery in deliveries}))
            self._cursors.start_over()
        return found

    def _number(self, delivery: Claimed) -> int:
        return UNKNOWN_LEVEL if delivery.seq in self._strange else LEVEL_NUMBERS[delivery.window.level]

    async def _move_due(self, connection: Connection) -> None:
        now = time.monotonic()
        if now >= self._next_due:
            due_in_ms: float | None = await connection.fetchval(self._sql.move_due, _MOVED_AT_ONCE)
            self._next_due = now + min(self._longest_s, math.inf if due_in_ms is None else due_in_ms / 1000)

    async def _claim_all(self, connection: Connection, turn: Turn) -> None:
        """Claim jobs for all takers, from behind the last ones, or from the start once in a while."""
        began = time.monotonic()
        first = self._cursors.look(began)
        self.turns.takers.may_find_jobs()
        for taker in self.turns.takers.all:
            await self._claim(connection, taker, turn, first=first)
        if first:
            now = time.monotonic()
            self._cursors.took(now - began, now)

    async def _claim(self, connection: Connection, taker: Taker, turn: Turn, *, first: bool) -> None:
        """Claim jobs for the windows that have room; at the start also one whose level leveret doesn't know."""
        wanted = {(window.queue.name, window.level): (window, free) for window, free in turn.wanted(taker)}
        if not wanted:
            return
        queues: list[str] = []
        levels: list[int] = []
        counts: list[int] = []
        for (queue, level), (_, free) in wanted.items():
            strange = int(first and level == "normal" and free > 1)
            queues += [queue] * (1 + strange)
            levels += [LEVEL_NUMBERS[level], UNKNOWN_LEVEL][: 1 + strange]
            counts += [free - strange, 1][: 1 + strange]
        places = list(zip(queues, levels, strict=True))
        behind = [self._cursors.behind(place) for place in places]
        marked = self._marks.get(taker, []) if self._link.listens else None
        rows: list[Any] = await connection.fetch(
            self._sql.claim, taker.lease.id, queues, levels, behind, counts, marked
        )
        if marked is not None:
            self._marks[taker] = [] if rows else sorted(set(queues))
        claimed = {place: list(found) for place, found in groupby(rows, _PLACE)}
        for (queue, level), found in claimed.items():
            window, free = wanted.get((queue, level)) or wanted[queue, "normal"]
            if level != window.level:
                self._strange |= {row[0] for row in found}
            turn.claim(taker, window, free, found)
        for place, count in zip(places, counts, strict=True):
            found = claimed.get((place[0], LEVEL_NAMES[place[1]]), [])
            self._cursors.saw(place, found[-1][0] if found else None, all=len(found) < count)
