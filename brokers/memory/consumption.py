"""One consumer of a store: its windows, the jobs that it holds, and its deliveries."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Sequence
from typing import final

from leveret.broker import QueueState, Sink, Subscription
from leveret.clock import Clock, Timer
from leveret.envelope import Envelope
from leveret.job import LEVELS, Queue

from .store import Contents, Stored, due_at, sent


@final
class MemoryDelivery:
    """A job that a consumption holds."""

    __slots__ = ("_contents", "consumption", "queue", "redelivered", "stored")

    def __init__(self, consumption: MemoryConsumption, queue: Queue, stored: Stored) -> None:
        self._contents = consumption.contents
        self.consumption = consumption
        self.queue = queue
        self.stored = stored
        self.redelivered = stored.delivered

    @property
    def envelope(self) -> Envelope:
        """As `Delivery.envelope`."""
        return self.stored.envelope

    counted = True
    """As `Delivery.counted`: no job of this broker outlives its process."""

    async def begin(self) -> bool:
        """As `Delivery.begin`."""
        return self.live

    @property
    def consumers(self) -> int:
        """0: nobody counts the workers of a queue in memory."""
        return 0

    @property
    def problem(self) -> str | None:
        """As `Delivery.problem`."""
        return self.stored.problem

    @property
    def live(self) -> bool:
        """Whether the consumption holds the job: neither settled nor lost."""
        return self in self.consumption.held

    def done(self) -> None:
        """As `Delivery.done`."""
        with self._contents.lock:
            self.consumption.settled(self)

    async def again(self, envelope: Envelope, /) -> bool:
        """As `Delivery.again`, in one step with the ack."""
        await asyncio.sleep(0)
        with self._contents.lock:
            if self.live:
                self._contents.check_accepts(envelope)
                self._contents.put(*sent(envelope, self.queue.name), due_at(envelope, self.consumption.clock))
                self.consumption.settled(self)
                return True
        return False

    async def bury(self, envelope: Envelope, /) -> bool:
        """As `Delivery.bury`, in one step with the ack."""
        await asyncio.sleep(0)
        with self._contents.lock:
            if self.live:
                self._contents.check_accepts(envelope)
                buried, _ = sent(envelope, self.queue.name, origin=self.queue.name)
                self._contents.bury(buried)
                self.consumption.settled(self)
                return True
        return False

    def give_back(self) -> None:
        """As `Delivery.give_back`; the job returns to its old place in the queue."""
        with self._contents.lock:
            if self.consumption.settled(self):
                self._contents.put_back(self.stored)


@final
class MemoryConsumption:
    """One consumer: one window per level of each of its queues, filled on the consumer's loop."""

    def __init__(self, contents: Contents, clock: Clock, subscriptions: Sequence[Subscription], sink: Sink) -> None:
        self.contents = contents
        self.clock = clock
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self.names = dict.fromkeys(each.queue.name for each in subscriptions)
        self._windows = [(each.queue, level, each.prefetch) for level in LEVELS for each in subscriptions]
        self._used = {(queue.name, level): 0 for queue, level, _ in self._windows}
        self.held: dict[object, Stored] = {}
        """The delivered, unsettled jobs, by delivery."""
        self._taking = True
        self._cut = False
        self._lost = False
        """Whether the sink is hearing of a cut."""
        self._woken = False
        self._timer: tuple[float, Timer] | None = None
        with contents.lock:
            for other in list(contents.consumers):
                other.end_if_orphaned()
            contents.consumers[self] = None
            for name in self.names:
                contents.levels(name)
            self.wake()

    @property
    def queues(self) -> tuple[QueueState, ...]:
        """As `Consumption.queues`."""
        if not self._taking:
            return tuple(QueueState(name, "stopped") for name in self.names)
        if self._cut or self._lost:
            return tuple(QueueState(name, "connecting", "the store was disconnected") for name in self.names)
        return tuple(QueueState(name, "consumed") for name in self.names)

    async def failed(self) -> None:
        """Never return: a store in memory has no permanent failures."""
        await asyncio.Future[None]()

    async def stop_taking(self) -> None:
        """As `Consumption.stop_taking`."""
        with self.contents.lock:
            self._taking = False

    async def close(self) -> None:
        """As `Consumption.close`."""
        with self.contents.lock:
            self._end()
        self._arm(None)

    def end_if_orphaned(self) -> None:
        """End if the loop was closed without a call of `close`."""
        if self._loop.is_closed():
            self._end()

    def _end(self) -> None:
        self._taking = self._cut = False
        self.contents.consumers.pop(self, None)
        self._release_all()

    def _release_all(self) -> None:
        held, self.held = self.held, {}
        self._used = dict.fromkeys(self._used, 0)
        for stored in held.values():
            self.contents.put_back(stored)

    def cut_off(self) -> None:
        """Put back every held job, as a lost connection does. The caller holds the lock."""
        self._cut = True
        self._release_all()
        self.wake()

    def wake(self) -> None:
        """Look for jobs in the next turn of the consumer's loop. The caller holds the lock."""
        if self._woken:
            return
        self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._pump)
        except RuntimeError:
            # the loop was closed without a call of `close`: the consumer is dead, and its jobs go to the other consumers
            self._end()

    def _pump(self) -> None:
        """Deliver until the windows are full or the lines are empty; wake again when the next delayed job is due."""
        contents = self.contents
        while True:
            with contents.lock:
                self._woken = False
                cut, self._cut = self._cut, False
                delivery = None if cut else self._take()
                if not cut and delivery is None:
                    due = contents.delayed[0][0] if self._taking and contents.delayed else None
                    break
            if delivery is None:
                self._tell_lost()
            else:
                self._sink.deliver(delivery)
        self._arm(due)

    def _tell_lost(self) -> None:
        """Tell the sink of a lost connection and of the next one, which stands at once."""
        self._lost = True
        self._sink.lost()
        self._sink.queues_changed()
        self._lost = False
        self._sink.queues_changed()

    def _take(self) -> MemoryDelivery | None:
        if not self._taking:
            return None
        self.contents.promote(self.clock.monotonic())
        for queue, level, prefetch in self._windows:
            line = self.contents.ready[queue.name][level]
            if line and self._used[queue.name, level] < prefetch:
                _, stored = heapq.heappop(line)
                delivery = MemoryDelivery(self, queue, stored)
                stored.delivered = True
                self._used[queue.name, level] += 1
                self.held[delivery] = stored
                self.contents.changed()
                return delivery
        return None

    def _arm(self, due: float | None) -> None:
        if self._timer is not None:
            if self._timer[0] == due:
                return
            self._timer[1].cancel()
        self._timer = None if due is None else (due, self.clock.call_later(due - self.clock.monotonic(), self._due))

    def _due(self) -> None:
        self._timer = None
        with self.contents.lock:
            self.wake()

    def settled(self, delivery: MemoryDelivery) -> bool:
        """Take `delivery` out of its window; return False if the delivery isn't live. The caller holds the lock."""
        if delivery not in self.held:
            return False
        del self.held[delivery]
        self._used[delivery.queue.name, delivery.envelope.priority] -= 1
        self.contents.changed()
        self.wake()
        return True
