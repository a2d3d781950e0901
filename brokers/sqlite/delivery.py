"""A delivery: a claimed row, and the window in which it counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, final

import msgspec

from leveret.envelope import Envelope
from leveret.headers import MOST
from leveret.job import Queue

from .lease import Lease
from .rows import unpack


class Settles(Protocol):
    """Settles deliveries; see `leveret.broker.Delivery`."""

    async def begin(self, delivery: SqliteDelivery, /) -> bool:
        """As `Delivery.begin`."""
        ...

    def done(self, delivery: SqliteDelivery, /) -> None:
        """As `Delivery.done`."""
        ...

    async def again(self, delivery: SqliteDelivery, envelope: Envelope, /) -> bool:
        """As `Delivery.again`."""
        ...

    async def bury(self, delivery: SqliteDelivery, envelope: Envelope, /) -> bool:
        """As `Delivery.bury`."""
        ...

    def give_back(self, delivery: SqliteDelivery, /) -> None:
        """As `Delivery.give_back`."""
        ...


@final
class Window:
    """One level of one queue: the number of held jobs, and whether more may wait in the file. Only the store's thread uses it."""

    __slots__ = ("held", "level", "maybe", "prefetch", "queue", "settling")

    def __init__(self, queue: Queue, level: str, prefetch: int, settling: Settles) -> None:
        self.queue = queue
        self.level = level
        self.prefetch = prefetch
        self.settling = settling
        self.held = 0
        self.maybe = True


@final
class SqliteDelivery:
    """A claimed row."""

    __slots__ = ("envelope", "lease", "problem", "queue", "redelivered", "seq", "settled", "window")

    def __init__(self, window: Window, lease: Lease, row: Sequence[Any]) -> None:
        self.seq: int = row[0]
        self.redelivered: bool = row[1] > 1
        self.envelope, self.problem = unpack(row[3:])
        if row[2]:  # besides those of an earlier row, which are in the headers
            self.envelope = msgspec.structs.replace(self.envelope, crashes=min(self.envelope.crashes + row[2], MOST))
        self.queue = window.queue
        self.window = window
        self.lease = lease
        self.settled = False

    @property
    def counted(self) -> bool:
        """As `Delivery.counted`: the row counts."""
        return True

    async def begin(self) -> bool:
        """As `Delivery.begin`, committed before the job begins."""
        return await self.window.settling.begin(self)

    @property
    def consumers(self) -> int:
        """0: nobody counts the workers of a queue in a file."""
        return 0

    @property
    def live(self) -> bool:
        """Whether the lease is alive. A settled delivery stays live: a retry that was committed late isn't lost."""
        return self.lease.alive

    @property
    def unsettled(self) -> bool:
        """Whether the delivery can still be settled: its lease is alive and it isn't settled."""
        return self.lease.alive and not self.settled

    def done(self) -> None:
        """As `Delivery.done`; while the file is locked, the write is tried until it succeeds."""
        self.window.settling.done(self)

    async def again(self, envelope: Envelope, /) -> bool:
        """As `Delivery.again`, in one transaction with the ack."""
        return await self.window.settling.again(self, envelope)

    async def bury(self, envelope: Envelope, /) -> bool:
        """As `Delivery.bury`, in one transaction with the ack."""
        return await self.window.settling.bury(self, envelope)

    def give_back(self) -> None:
        """As `Delivery.give_back`; the job keeps its place, and doesn't count as redelivered."""
        self.window.settling.give_back(self)
