"""The leases of this process on a queue's server, and the jobs that the server holds for each."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from typing import Final, final

from ..leases import BEAT_S, LEASE_S, Lease
from ..turns import Claimed, Taker, Turn, Turns
from . import scripts
from .entries import seq_bytes, seq_of
from .keys import Keys
from .wire import Wire

_LEASE_BITS: Final = 48  # a number of Lua is exact to 53


@final
class Leases:
    """The leases of the takers of `turns`, as far as this process knows."""

    def __init__(self, turns: Turns, keys: Keys, said_by: logging.Logger) -> None:
        self._turns = turns
        self._keys = keys
        self._said_by = said_by
        self.doubtful = False
        """Whether the server may hold other jobs for our leases than we know: an answer was lost, or it is another server."""
        self.term = 0
        """The number of such doubts. The leases on the server have it, so that a turn that arrives late does nothing."""
        self.died: list[int] = []
        """Leases of dead workers, to be released."""
        self._held: dict[Lease, dict[int, Claimed]] = {}
        """The jobs that each lease holds, by number."""
        self._registered: list[int] = []
        """Leases that a turn has got which isn't over."""
        self._leftover: list[int] = []
        """Leases that ended before they were used, or by somebody else's hand, and are to be released."""
        self._seen: set[int] = set()
        """All leases that the server had when it was asked last."""

    async def prepare(self, wire: Wire) -> None:
        """Free what dead workers and lost leases of ours hold, and get the leases that are missing."""
        takers = self._turns.takers
        while self.died:
            await self._release(wire, self.died[-1], died=True)
            self.died.pop()
        while self._leftover:
            await self._release(wire, self._leftover[-1], died=False)
            self._leftover.pop()
        if self.doubtful:
            self.term += 1
            for taker in takers.all:
                if taker.lease.id is not None:
                    await self._compare(wire, taker.lease, taker.lease.id)
            self.doubtful = False
        for taker in takers.all:
            if taker.lease.id is None:
                # no counter of the server's: that may go back at a fail-over, and two workers would have the same number
                lease = secrets.randbits(_LEASE_BITS)
                await self._keys.evaluate(wire, scripts.REGISTER, [], lease, self.term)
                self._registered.append(lease)
                takers.lease(taker, lease)

    async def _compare(self, wire: Wire, lease: Lease, worker: int) -> None:
        """Make what we know of the jobs of a lease agree with what the server has.

        A job that we don't know was claimed by a turn whose answer was lost, or its settlement was lost with a server: it is delivered
        again. One that the server doesn't hold for us was settled by such a turn, or waits on a server that lost its claim.
        """
        keys = self._keys
        names = [keys.held(worker)]
        fields: list[bytes] | None = await keys.evaluate(wire, scripts.HELD, names, worker, self.term)
        if fields is None:
            return
        known, there = self._held.get(lease, {}), set(map(seq_of, fields))
        if strange := [seq_bytes(seq) for seq in there - known.keys()]:
            await keys.evaluate(wire, scripts.RETURN, names, *strange)
        for seq in known.keys() - there:
            delivery = known[seq]
            if not delivery.settled:  # else its settlement is tried again, and finds nothing
                delivery.settled = True
                delivery.window.held -= 1
                del known[seq]

    async def release_all(self, wire: Wire) -> None:
        """Free all jobs that are held."""
        leases = [taker.lease.id for taker in self._turns.takers.all if taker.lease.id is not None]
        for lease in (*leases, *self._leftover):
            await self._release(wire, lease, died=False)

    async def _release(self, wire: Wire, lease: int, *, died: bool) -> None:
        keys = self._keys
        await keys.evaluate(wire, scripts.RELEASE, [keys.held(lease), keys.read(lease)], lease, int(died))

    def committed(self, turn: Turn) -> None:
        """Take over what a turn has claimed, settled and released."""
        self._registered.clear()
        for taker, deliveries in turn.claimed.items():
            self._held.setdefault(taker.lease, {}).update((delivery.seq, delivery) for delivery in deliveries)
        for settled in (turn.gone, turn.given_back):
            for lease, deliveries in settled.items():
                known = self._held.get(lease, {})
                for delivery in deliveries:
                    known.pop(delivery.seq, None)
        for taker in turn.closing:
            self._held.pop(taker.lease, None)

    def rolled_back(self) -> None:
        """Release the leases that a failed turn has got."""
        self._leftover += self._registered
        self._registered.clear()

    def saw(self, leases: Sequence[int]) -> None:
        """Note all leases that the server has. What one holds that is no longer there is freed by the next turn: nobody else may know of it."""
        there = set(leases)
        self._leftover += self._seen - there
        self._seen = there

    def expired(self, gone: Sequence[int]) -> None:
        """End the leases that the server no longer has: what it may still hold for them is freed by the next turn."""
        self._leftover += gone
        for taker in self._turns.takers.all:
            if taker.lease.id in gone:
                self._held.pop(taker.lease, None)
                self._lose(taker)

    def _lose(self, taker: Taker) -> None:
        takers = self._turns.takers
        if time.monotonic() - takers.next_beat + BEAT_S >= LEASE_S:
            takers.expired(taker)
            return
        self._said_by.warning(
            "the lease on %s is gone although its beats arrived: somebody deleted its keys (FLUSHALL?), a fail-over or a restart lost them, "
            "or this machine was suspended; the jobs that it held are delivered again if the server still has them",
            self._turns.where,
        )
        takers.lose(taker)
