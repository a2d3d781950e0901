"""A delivery of a store: a claimed row, which settles itself by a write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import msgspec

from leveret.envelope import Envelope
from leveret.errors import LeveretError
from leveret.headers import MOST

from ..leases import Lease
from ..rows import packed, unpack, when_ms
from .writes import Again, Begin, Bury

if TYPE_CHECKING:
    from leveret.store import Change, Progress

    from .takers import Window


@final
class Claimed:
    """A delivery: a claimed row, and the window in which it counts."""

    __slots__ = ("changes", "envelope", "lease", "problem", "queue", "redelivered", "seq", "settled", "window")

    def __init__(self, window: Window, lease: Lease, row: Sequence[Any]) -> None:
        """Read `row`: the store's number of it, how often it was delivered, how many workers it crashed, then `rows.COLUMNS`."""
        self.seq: int = row[0]
        self.redelivered: bool = row[1] > 1
        self.envelope, self.problem = unpack(row[3:])
        if row[2]:  # besides those of an earlier row, which are in the headers
            self.envelope = msgspec.structs.replace(self.envelope, crashes=min(self.envelope.crashes + row[2], MOST))
        self.queue = window.queue
        self.window = window
        self.lease = lease
        self.settled = False
        self.changes: Sequence[Change | Progress] = ()
        """As `Recorded.changes`."""

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
        if self.unsettled or (self.changes and not self.settled):  # without its lease, the changes are handed over
            self.window.turns.done(self)

    async def again(self, envelope: Envelope, /) -> bool:
        """As `Delivery.again`, in one transaction with the ack; does nothing if a late commit settled the delivery."""
        if self.unsettled:
            turns, name = self.window.turns, self.queue.name
            row = packed(name, envelope, when_ms(envelope, turns.clock))
            about = f"the retry of job {envelope.job_id} in queue {name!r}"
            write = Again(about=about, row=row, delivery=self, deadline=envelope.deadline, changes=self.changes)
            await turns.run(write)
        return self.settled

    async def bury(self, envelope: Envelope, /) -> bool:
        """As `Delivery.bury`, in one transaction with the ack; does nothing if a late commit settled the delivery."""
        if self.unsettled:
            turns, name = self.window.turns, self.queue.name
            buried = msgspec.structs.replace(envelope, origin=envelope.origin or name)
            row = packed(name, buried, int(turns.clock.now() * 1000))
            about = f"the burial of job {envelope.job_id} from queue {name!r}"
            write = Bury(about=about, row=row, delivery=self, deadline=envelope.deadline, changes=self.changes)
            await turns.run(write)
        return self.settled

    def give_back(self) -> None:
        """As `Delivery.give_back`; the job keeps its place, and doesn't count as redelivered."""
        if self.unsettled:
            self.window.turns.give_back(self)
