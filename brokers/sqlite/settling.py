"""The settlement of a delivery: each verb is part of one transaction, shared with the other writes of that turn."""

from __future__ import annotations

from typing import final

import msgspec

from leveret.clock import Clock
from leveret.envelope import Envelope
from leveret.errors import LeveretError

from ..rows import packed, when_ms
from .delivery import SqliteDelivery
from .turns import Turns
from .write import Again, Begin, Bury


@final
class Settling:
    """Settles the deliveries of one broker; see `leveret.broker.Delivery`."""

    def __init__(self, turns: Turns, clock: Clock) -> None:
        self._turns = turns
        self._clock = clock

    def done(self, delivery: SqliteDelivery) -> None:
        """Delete the row, trying until it succeeds while the file is locked."""
        if delivery.unsettled:
            self._turns.done(delivery)

    async def begin(self, delivery: SqliteDelivery) -> bool:
        """Note in the row that the job begins; False too if the disk fails."""
        about = f"the beginning of job {delivery.envelope.job_id} of queue {delivery.queue.name!r}"
        try:
            return bool(await self._turns.run(Begin(about, delivery)))
        except LeveretError:
            return False

    async def again(self, delivery: SqliteDelivery, envelope: Envelope) -> bool:
        """Add `envelope` to the queue in one transaction with the ack; do nothing if a late commit settled the delivery."""
        if delivery.unsettled:
            name = delivery.queue.name
            row = packed(name, envelope, when_ms(envelope, self._clock))
            about = f"the retry of job {envelope.job_id} in queue {name!r}"
            await self._turns.run(Again(about, delivery, row, envelope.deadline))
        return delivery.settled

    async def bury(self, delivery: SqliteDelivery, envelope: Envelope) -> bool:
        """Add `envelope` to the dead letters in one transaction with the ack; do nothing if a late commit settled the delivery."""
        if delivery.unsettled:
            name = delivery.queue.name
            buried = msgspec.structs.replace(envelope, origin=envelope.origin or name)
            row = packed(name, buried, int(self._clock.now() * 1000))
            about = f"the burial of job {envelope.job_id} from queue {name!r}"
            await self._turns.run(Bury(about, delivery, row, envelope.deadline))
        return delivery.settled

    def give_back(self, delivery: SqliteDelivery) -> None:
        """Free the row; the job keeps its place, and doesn't count as redelivered."""
        if delivery.unsettled:
            self._turns.give_back(delivery)
