"""The access of one event loop to one queue: a task of the loop drives its turns, each of which is one call of a script.

A queue has turns of its own, since a script may touch the keys of one slot only, and so that the doubt after a lost answer is of one queue.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final, final

import msgspec

from leveret.broker import PublisherState
from leveret.errors import BrokerUnavailable, ConfigurationError
from leveret.runtime import Runtime

from ..leases import Lease
from ..turns import WINDOW, OnLoop, Run, Taker, Turn, Turns, Window, Write
from ..turns.writes import Begin, Publish
from . import scripts
from .confirming import ROOM_S, TURN_S, Confirming
from .entries import Unkeepable, by_level, read, row_of, tail_of
from .keys import LEVEL_NUMBERS, Keys
from .leases import Leases
from .link import Link, meaning_of
from .wire import Lost, Refused, Wire, packed_words

log = logging.getLogger("leveret.redis")

FIRST_POLL_S: Final = 0.01
"""How soon a worker that has found nothing looks again, seconds; the wait grows fivefold each time."""
POLL_S: Final = 1.0
"""How often a worker that hears notices looks for jobs, seconds."""
POLL_WITHOUT_NOTICES_S: Final = 0.1
"""How often a worker looks that hears none."""
_BYTES_A_SECOND: Final = 1 << 20
_WRITES_AT_ONCE: Final = WINDOW // 2
"""At most this many writes are in a turn, so that a publisher can make as many while the server works."""
_CLAIMED_AT_ONCE: Final = 1000
_SAY_AFTER_S: Final = 1.0
_BUSY_PAUSE_S: Final = 0.02
_encode: Final = msgspec.msgpack.Encoder().encode


@final
class Store(OnLoop):
    """The queue `queue`, which one loop of this process uses through `link`: the `Driver` of its `turns`."""

    def __init__(
        self, link: Link, queue: str, runtime: Runtime, *, said_by: logging.Logger = log, patient: bool = True
    ) -> None:
        super().__init__(log)
        where = str(link.address)
        self.keys = Keys(link.address.prefix, queue)
        self._link = link
        self._said_by = said_by
        self._alone = link.address.confirm != "memory"
        reached = link.known(queue, alone=self._alone) is not None
        self.turns = Turns(where, runtime, said_by, self, not_yet="" if reached else f"{where} wasn't reached yet")
        self._queue = queue
        self._clock = runtime.clock
        self._patient = patient
        """Whether a server that can't be reached is tried again until the deadlines of the writes."""
        self._wire: Wire | None = None
        """The connection on which the queue's keys were examined."""
        self._listens = False
        """Whether notices arrive. If they don't, polling finds what is new."""
        self._tried = False
        self._leases = Leases(self.turns, self.keys, said_by)
        self._confirming = Confirming(link, self.keys, self.turns, runtime.clock, said_by)
        self._of: tuple[tuple[int, bool], ...] | None = None
        self._packed = (b"", 0)
        """The packed keys for the takers `_of`."""
        self._poll_s = 0.0
        self._losses = 0
        self._next_due = 0.0

    @property
    def publishing(self) -> PublisherState:
        """As `Broker.publishing`, of this queue."""
        state = self.turns.publishing
        return self._confirming.blocked or state if state.name == "ready" else state

    def _noticed(self, _: bytes = b"") -> None:
        self._told = True
        self._news.set()

    async def _leave(self) -> None:
        """Free all held jobs if the server answers; otherwise other workers free them when the leases end."""
        try:
            async with asyncio.timeout(2.0):
                if self._wire is not None and not self._wire.closed:
                    await self._leases.release_all(self._wire)
                    if self._listens:
                        await self._wire.unsubscribe(self.keys.news)
        except Exception as error:  # noqa: BLE001 - what can't be freed now comes back when the leases end
            log.debug("%s: the leases weren't released: %s", self.turns.where, error)

    def _patience(self) -> float | None:
        patience = super()._patience()
        if self._confirming.blocked is None:
            return patience
        return ROOM_S if patience is None else min(patience, ROOM_S)

    def _wait_s(self) -> float:
        """Return how long a worker waits for a notice before it looks for jobs."""
        return min(self._poll_s, max(0.0, self._next_due - time.monotonic()))

    async def _turn(self) -> None:
        turns = self.turns
        self._told = False
        turns.prepare(time.monotonic())
        turn: Turn | None = None
        wire: Wire | None = None
        called = False
        try:
            async with asyncio.timeout(TURN_S) as limit:
                wire = self._link.known(self._queue, alone=self._alone)
                if wire is None or wire is not self._wire:
                    wire = await self._link.wire(self._queue, alone=self._alone)
                    await self._examine(wire)
                if turns.takers.taking and not self._listens:
                    await self._listen(wire)
                if looks := turns.looks():
                    for look in looks:
                        look.result = await look.call(wire)
                    turns.looked(looks)
                if self._confirming.blocked is not None:
                    await self._confirming.look(wire)
                if not (turns.waiting or turns.takers.all or turns.publishing.name == "connecting"):
                    turns.rest()
                    return
                await self._leases.prepare(wire)
                turn = self._take(limit)
                if wire.closed:
                    raise Lost("the connection is closed")
                called = True
                lost = await self._transact(wire, turn)
            if lost:
                self._lost(lost)
            else:
                if self._alone and (turn.jobs or turn.letters):
                    await self._confirming.wait(wire, turn)
                self._committed(turn)
        except Exception as error:  # noqa: BLE001 - `meaning_of` sorts them
            self._failed(error, turn, wire, called=called)

    async def _examine(self, wire: Wire) -> None:
        """Find out on a new connection whether the scripts may do all that they do, before one of them fails in its middle."""
        names = [self.keys["probe"], self.keys["server"]]
        wrong: bytes = await self.keys.evaluate(wire, scripts.PROBE, names, wire.server.run_id)
        if wrong:
            msg = f"{self.turns.where}: the key {wrong.decode(errors='replace')}; choose another prefix=… in the URL"
            raise ConfigurationError(msg)
        if self._wire is not None and (wire.server.run_id != self._wire.server.run_id or not wire.server.run_id):
            self._leases.doubtful = True
        self._wire, self._listens, self._tried = wire, False, False
        self._next_due = 0.0
        wire.lost.add_done_callback(lambda _: self._noticed())

    async def _listen(self, wire: Wire) -> None:
        if self._tried:
            return
        self._tried = True
        try:
            await wire.subscribe(self.keys.news, self._noticed)
        except Refused as error:
            if error.code != "NOPERM":
                raise
            self._said_by.info(
                "%s passes no notices on (%s): what is new is looked for every 100 ms", self.turns.where, error
            )
        else:
            self._listens = True

    def _take(self, limit: asyncio.Timeout) -> Turn:
        turn = self.turns.take(_WRITES_AT_ONCE)
        if (size := sum(write.size for write in turn.writes)) > _BYTES_A_SECOND:
            limit.reschedule(asyncio.get_running_loop().time() + TURN_S + size / _BYTES_A_SECOND)
        return turn

    async def _transact(self, wire: Wire, turn: Turn) -> list[int]:
        """Do all the work of a turn by one script; return the leases that are gone, if any: then nothing was done."""
        takers = self.turns.takers
        turn.gather()
        jobs, later = by_level(turn.jobs, self._clock.now() * 1000)
        letters = [tail_of(row) for row in turn.letters]
        beat = bool(takers.all) and time.monotonic() >= takers.next_beat
        takers.may_find_jobs()
        wanted = [
            [(window, min(free, _CLAIMED_AT_ONCE)) for window, free in turn.wanted(taker)] for taker in takers.all
        ]
        begins = _begins(turn)
        # a worker whose hands are full moves what is due, too: else it would look again at once, for ever
        due = takers.taking and time.monotonic() >= self._next_due
        if beat or due or turn.writes or turn.done or turn.back or any(wanted):
            holders = [_holder(taker, turn, begins, wants) for taker, wants in zip(takers.all, wanted, strict=True)]
            counts, delays = list(map(len, jobs)), [delay_ms for delay_ms, _ in later]
            work = _encode(
                (beat, holders, counts, delays, len(letters), takers.taking, self._listens, self._leases.term)
            )
            blobs = (work, *chain.from_iterable(jobs), *(job for _, job in later), *letters)
            adds = any(isinstance(write, Publish) for write in turn.writes)
            words, count = self._words()
            answer = await wire.evaluate(
                scripts.ADDING_TURN if adds else scripts.TURN, words + packed_words(blobs), count + len(blobs)
            )
            if answer[0]:
                gone: list[int] = answer[0]
                return gone
            if adds and not self._alone:
                self._confirming.blocked = None
            self._read(answer, turn, begins, wanted)
        for run in turn.calls:
            run.result = await run.call(wire)
        return []

    def _words(self) -> tuple[bytes, int]:
        """Return the packed keys of a turn, and how many words its call has."""
        takers = tuple((taker.lease.id or 0, bool(taker.windows)) for taker in self.turns.takers.all)
        if takers != self._of:
            keys = self.keys
            names = (*keys.common, *(keys.held(lease) if takes else keys.read(lease) for lease, takes in takers))
            self._of, self._packed = takers, (packed_words((len(names), *names)), len(names) + 1)
        return self._packed

    def _read(
        self,
        answer: Sequence[Any],
        turn: Turn,
        begins: dict[Lease, list[Begin]],
        wanted: list[list[tuple[Window, int]]],
    ) -> None:
        """Take over what the script of a turn answers."""
        takers = self.turns.takers
        _, beats, claimed, due_ms, begun = answer
        if beats:
            numbers = list(map(int, beats))
            self._leases.died += takers.silent(turn, zip(numbers[::2], numbers[1::2], strict=True))
            self._leases.saw(numbers[::2])
        self._next_due = math.inf if due_ms is None else time.monotonic() + due_ms / 1000
        results = iter(begun)
        for taker in takers.all:
            for begin in begins.get(taker.lease, ()):
                begin.result = next(results) == 1
        found = iter(claimed)
        for taker, wants in zip(takers.all, wanted, strict=True):
            for window, free in wants:
                self._claim(turn, taker, window, free, next(found))

    def _claim(self, turn: Turn, taker: Taker, window: Window, free: int, entries: list[bytes]) -> None:
        queue = self._queue
        try:
            turn.claim(taker, window, free, [row_of(entry, queue) for entry in entries])
        except (ValueError, IndexError, TypeError):  # a foreign producer's: the others are read, and this one is buried
            for entry in entries:
                row, problem = read(entry, queue, window.level)
                turn.claim(taker, window, 1, [row])
                if problem is not None:
                    turn.claimed[taker][-1].problem = problem
            window.maybe = len(entries) == free

    def _committed(self, turn: Turn) -> None:
        self._losses = 0
        self._leases.committed(turn)
        if turn.claimed:
            self._poll_s = FIRST_POLL_S
        else:
            longest_s = POLL_S if self._listens else POLL_WITHOUT_NOTICES_S
            self._poll_s = min(max(self._poll_s * 5, FIRST_POLL_S), longest_s)
        if self._leases.died:
            self._told = True
        self.turns.committed(turn)

    def _lost(self, lost: list[int]) -> None:
        """End a turn that found leases gone: their jobs are somebody else's."""
        self.turns.rolled_back()
        self._leases.expired(lost)
        self._told = True

    def _failed(self, error: Exception, turn: Turn | None, wire: Wire | None, *, called: bool) -> None:
        """End a turn that failed, by what its error means."""
        turns = self.turns
        if isinstance(error, Unkeepable) and turn is not None:
            turns.rolled_back()
            turns.refuse(turn, f"Redis refuses it: {error}")
            self._told = True
            return
        meaning = meaning_of(error)
        if meaning is None:
            raise error
        silence = self._link.silence if wire is None else "no answer in time"
        said = " ".join(str(error).split()) or (silence if isinstance(error, TimeoutError) else repr(error))
        self._link.failed(wire, error)
        if meaning == "lost" and called and turn is not None:
            # what settles or begins is tried again, after the comparison with what the server has
            doubtful: list[Write] = [write for write in turn.writes if isinstance(write, Publish | Run)]
            turns.doubt(Turn(doubtful, [], []), f"the connection was lost before the answer: {said}")
            self._leases.doubtful = True
        self._leases.rolled_back()
        turns.rolled_back()
        self._next_due = 0.0
        if meaning == "wrong":
            turns.give_up(error if isinstance(error, ConfigurationError) else _wrong(turns.where, error, said))
        elif not called and isinstance(error, BrokerUnavailable) and not self._patient:
            turns.give_up(error)
        elif meaning == "busy":
            turns.hold_up(said, pause_s=_BUSY_PAUSE_S, quiet_s=_SAY_AFTER_S)
        elif meaning == "full" and turn is not None:
            self._confirming.block(said)
            turns.no_room(turn, said)
            self._told = True
        elif meaning in {"full", "blocked"}:
            turns.fail(said)
        else:
            # the first try comes at once: a server that ends connections, as a fail-over does, takes new ones
            self._losses += 1
            self._told = True  # tries again, even if nobody waits for it: a publisher's state is looked at
            pause_s = 0.0 if self._losses == 1 and wire is not None else None
            turns.hold_up(said, pause_s=pause_s, quiet_s=_SAY_AFTER_S, state="connecting")


def _begins(turn: Turn) -> dict[Lease, list[Begin]]:
    """Return the beginnings of jobs by lease; without a living lease a job doesn't begin."""
    found: dict[Lease, list[Begin]] = {}
    for begin in turn.begins:
        if begin.delivery.lease.alive:
            found.setdefault(begin.delivery.lease, []).append(begin)
        else:
            begin.result = False
    return found


def _holder(
    taker: Taker, turn: Turn, begins: dict[Lease, list[Begin]], wanted: list[tuple[Window, int]]
) -> tuple[object, ...]:
    """Return what a turn does for a taker, as its script takes it."""
    lease = taker.lease
    return (
        lease.id,
        [delivery.seq for delivery in turn.gone.get(lease, ())],
        [delivery.seq for delivery in turn.given_back.get(lease, ())],
        [begin.delivery.seq for begin in begins.get(lease, ())],
        [(LEVEL_NUMBERS[window.level], free) for window, free in wanted],
        taker in turn.closing,
        not taker.windows,
    )


def _wrong(where: str, error: Exception, said: str) -> ConfigurationError:
    wrong = ConfigurationError(f"{where}: {said}")
    wrong.__cause__ = error
    return wrong
