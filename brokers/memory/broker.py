"""The broker inside one process, for users' tests: real envelopes, windows, priorities, delays and dead letters; nothing is durable.

All brokers and admins that this process opens as `memory://name` share one `MemoryStore`, on any loop and thread. A test that
wants a private store makes one: `MemoryBroker(MemoryStore(), runtime)`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import final

from leveret.broker import Consumption, Features, PublisherState, Sink, Subscription
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable, ConfigurationError
from leveret.job import Queue
from leveret.runtime import Runtime

from .consumption import MemoryConsumption
from .store import MemoryStore, due_at, sent

_FEATURES = Features(
    durable=False,
    shared=False,
    counts_redelivery=True,
    counts_crashes=True,
    connected=True,
    queue_type=None,
    keeps_order=True,
    keeps_place=True,
    window_per_level=True,
    deletable=False,
)


@final
class MemoryBroker:
    """A `Broker` on a `MemoryStore`, using the clock of `runtime`."""

    def __init__(self, store: MemoryStore, runtime: Runtime) -> None:
        self._contents = store.contents
        self._clock = runtime.clock
        self._consumptions: list[MemoryConsumption] = []
        self._closed = False
        self.publishing = PublisherState.at(self._clock.now(), "ready")
        """As `Broker.publishing`."""

    def features(self, _: Queue | None = None, /) -> Features:
        """As `Broker.features`."""
        return _FEATURES

    def post(self, queue: Queue, envelope: Envelope) -> None:
        """Return None: this broker publishes only through `publish`."""

    async def publish(self, queue: Queue, envelope: Envelope) -> None:
        """As `Broker.publish`; every queue exists, so no job is unroutable."""
        # a real broker never answers within one turn of the loop, and publishing in a loop must let consumers run
        await asyncio.sleep(0)
        with self._contents.lock:
            if self._closed:
                msg = f"job {envelope.job_id} wasn't published: this memory broker is closed"
                raise BrokerUnavailable(msg, job_id=envelope.job_id)
            self._contents.check_accepts(envelope)
            self._contents.put(*sent(envelope, queue.name), due_at(envelope, self._clock))

    async def consume(self, subscriptions: Sequence[Subscription], sink: Sink) -> Consumption:
        """As `Broker.consume`; the consumption is ready at once, and deliveries start in the next turn of the loop."""
        if self._closed:
            msg = "this memory broker is closed; open a new one"
            raise ConfigurationError(msg)
        consumption = MemoryConsumption(self._contents, self._clock, subscriptions, sink)
        self._consumptions.append(consumption)
        return consumption

    async def close(self) -> None:
        """As `Broker.close`; the jobs stay in the store."""
        self._closed = True
        self.publishing = self.publishing.then(self._clock.now(), "closed")
        for consumption in self._consumptions:
            await consumption.close()
        self._consumptions.clear()
