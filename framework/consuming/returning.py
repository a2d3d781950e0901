"""delivery → broker: back without a run. Where a give-back would look like a crash, the job is published again instead."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping

import msgspec

from ..broker import Delivery
from ..envelope import Envelope
from ..errors import PublishError
from ..outcome import NotStarted
from ..texts import said_by
from .following import uncounted
from .said import what
from .settlement import Settlement
from .slots import QueueHeld

logger = logging.getLogger("leveret.consumer")

PUT_BACK_S = 3.0
"""Seconds to publish a job again that was held or cut off at a stop."""


class Returning:
    """Returns jobs to the broker that haven't run, or that go on without their delivery.

    Args:
        settlement: Gives back, and counts.
        queues: The queues of the deliveries, by name.
    """

    def __init__(self, settlement: Settlement, queues: Mapping[str, QueueHeld]) -> None:
        self._settlement, self._queues = settlement, queues
        self._waiting: deque[tuple[Delivery, Envelope]] = deque()
        self._task: asyncio.Task[None] | None = None

    def publishes(self, delivery: Delivery) -> bool:
        """Whether a job is published again instead of given back: it would be marked as what killed its worker is."""
        return not self._queues[delivery.queue.name].counts_crashes and delivery.problem is None

    def give_back(self, delivery: Delivery) -> None:
        """Return a job that hasn't run."""
        if self.publishes(delivery):
            self._publish(delivery, began=False)
        else:
            self._settlement.end(delivery, None, NotStarted(), None)

    def give_back_began(self, delivery: Delivery) -> None:
        """Return a job that goes on without its delivery."""
        if self.publishes(delivery):
            self._publish(delivery, began=True)
        else:
            delivery.give_back()

    async def uncount(self, deliveries: Iterable[Delivery]) -> None:
        """Publish those jobs again that were cut off, if another worker would count that as one more crash."""
        counted = (each for each in deliveries if each.envelope.crashes and self.publishes(each))
        await asyncio.gather(*(self._again(each, uncounted(each, began=True)) for each in counted))

    async def finished(self) -> None:
        """Wait until what is returned is published, or given back."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def _publish(self, delivery: Delivery, *, began: bool) -> None:
        """Publish the job again, in a task that no grace cuts off."""
        self._waiting.append((delivery, uncounted(delivery, began=began)))
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._publish_all())

    async def _publish_all(self) -> None:
        """Publish what waits. The first job is confirmed before the others are written.

        A broker that confirms nothing may keep what was written, and the jobs that go back all the same would run twice.
        """
        confirms = await self._put_back(*self._waiting.popleft())
        while self._waiting:
            batch = list(self._waiting)
            self._waiting.clear()
            if confirms:
                confirms = all(await asyncio.gather(*(self._put_back(*each) for each in batch)))
            else:
                for delivery, _ in batch:
                    self._settlement.end(delivery, None, NotStarted(), None)

    async def _put_back(self, delivery: Delivery, envelope: Envelope) -> bool:
        """Publish a job again, and acknowledge its delivery; where that fails give it back, and return False."""
        if await self._again(delivery, envelope):
            self._settlement.returned(delivery)
            return True
        failed = delivery.live
        self._settlement.end(delivery, None, NotStarted(), None)
        return not failed

    async def _again(self, delivery: Delivery, envelope: Envelope) -> bool:
        """Publish a job again, if that is quick; return whether it is published."""
        try:
            return await delivery.again(msgspec.structs.replace(envelope, deadline=time.monotonic() + PUT_BACK_S))
        except PublishError as error:
            logger.debug("%s goes back as redelivered, since it can't be published: %s", what(envelope), said_by(error))
            return False
