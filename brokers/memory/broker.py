"""The broker inside one process, for users' tests: real envelopes, windows, priorities, delays and dead letters; nothing survives.

`memory://name` is one `MemoryStore` for every broker and admin of this process that is opened by that URL, whatever its loop or
thread. A test that wants its own makes one: `MemoryBroker(MemoryStore(), runtime)`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import final

from leveret.broker import Consumption, Delivery, Features, Sink, Subscription
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable, ConfigurationError
from leveret.job import Queue
from leveret.runtime import Runtime

from .consumption import MemoryConsumption, owned
from .store import MemoryStore, sent


@final
class MemoryBroker:
    """A `Broker` on a `MemoryStore`, under `runtime`'s clock; the store is private to whoever has it."""

    def __init__(self, store: MemoryStore, runtime: Runtime) -> None:
        self._contents = store.contents
        self._clock = runtime.clock
        self._consumptions: list[MemoryConsumption] = []
        self._closed = False

    features = Features(durable=False, shared=False, counts_redelivery=True)

    def _due(self, delay_s: float) -> float | None:
        return self._clock.monotonic() + delay_s if delay_s > 0 else None

    def post(self, queue: Queue, envelope: Envelope, *, deadline: float) -> None:
        """Never at once here: `publish` groups what comes together by itself."""

    async def publish(self, queue: Queue, envelope: Envelope, *, delay_s: float, deadline: float) -> None:
        """As `Broker.publish`; every queue exists, so that none is unroutable."""
        await asyncio.sleep(
            0
        )  # no broker answers within one turn of the loop, and a loop of publishes must let consumers run
        with self._contents.lock:
            if self._closed:
                msg = f"job {envelope.job_id} wasn't published: this memory broker was closed"
                raise BrokerUnavailable(msg, job_id=envelope.job_id)
            self._contents.check_accepts(envelope, deadline)
            self._contents.put(*sent(envelope, queue.name), self._due(delay_s))

    async def consume(self, subscriptions: Sequence[Subscription], sink: Sink) -> Consumption:
        """As `Broker.consume`; it is ready at once, and deliveries come from the loop's next turn on."""
        if self._closed:
            msg = "this memory broker was closed; open a new one"
            raise ConfigurationError(msg)
        consumption = MemoryConsumption(self._contents, self._clock, subscriptions, sink)
        self._consumptions.append(consumption)
        return consumption

    def done(self, delivery: Delivery) -> None:
        """As `Broker.done`."""
        own = owned(delivery)
        with self._contents.lock:
            own.consumption.settled(own)

    async def again(self, delivery: Delivery, envelope: Envelope, *, delay_s: float, deadline: float) -> None:
        """As `Broker.again`; in one step with the ack, and no effect on a delivery that isn't live."""
        own = owned(delivery)
        await asyncio.sleep(0)
        with self._contents.lock:
            if own.live:
                self._contents.check_accepts(envelope, deadline)
                self._contents.put(*sent(envelope, own.queue.name), self._due(delay_s))
                own.consumption.settled(own)

    async def bury(self, delivery: Delivery, envelope: Envelope, *, deadline: float) -> None:
        """As `Broker.bury`; in one step with the ack, and no effect on a delivery that isn't live."""
        own = owned(delivery)
        await asyncio.sleep(0)
        with self._contents.lock:
            if own.live:
                self._contents.check_accepts(envelope, deadline)
                buried, _ = sent(envelope, own.queue.name, origin=own.queue.name)
                self._contents.bury(buried)
                own.consumption.settled(own)

    def give_back(self, delivery: Delivery) -> None:
        """As `Broker.give_back`; it stands where it stood before."""
        own = owned(delivery)
        with self._contents.lock:
            if own.consumption.settled(own):
                self._contents.put_back(own.stored)

    async def close(self) -> None:
        """As `Broker.close`; what is in the store stays there."""
        self._closed = True
        for consumption in self._consumptions:
            await consumption.close()
        self._consumptions.clear()
