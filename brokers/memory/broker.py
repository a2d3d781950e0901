"""The broker inside one process, for users' tests: real envelopes, windows, priorities, delays and dead letters; nothing survives.

`memory://name` is one `MemoryStore` for every broker and admin of this process that is opened by that URL, whatever its loop or
thread. A test that wants its own makes one: `MemoryBroker(MemoryStore(), runtime)`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import final

from leveret.broker import Consumption, Features, Sink, Subscription
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
    connected=True,
    queue_type=None,
    window_per_level=True,
    deletable=False,
)


@final
class MemoryBroker:
    """A `Broker` on a `MemoryStore`, under `runtime`'s clock; the store is private to whoever has it."""

    def __init__(self, store: MemoryStore, runtime: Runtime) -> None:
        self._contents = store.contents
        self._clock = runtime.clock
        self._consumptions: list[MemoryConsumption] = []
        self._closed = False

    def features(self, _: Queue | None = None, /) -> Features:
        """As `Broker.features`."""
        return _FEATURES

    def post(self, queue: Queue, envelope: Envelope) -> None:
        """Never at once here: `publish` groups what comes together by itself."""

    async def publish(self, queue: Queue, envelope: Envelope) -> None:
        """As `Broker.publish`; every queue exists, so that no job is unroutable."""
        # no broker answers within one turn of the loop, and a loop of publishes must let consumers run
        await asyncio.sleep(0)
        with self._contents.lock:
            if self._closed:
                msg = f"job {envelope.job_id} wasn't published: this memory broker was closed"
                raise BrokerUnavailable(msg, job_id=envelope.job_id)
            self._contents.check_accepts(envelope)
            self._contents.put(*sent(envelope, queue.name), due_at(envelope, self._clock))

    async def consume(self, subscriptions: Sequence[Subscription], sink: Sink) -> Consumption:
        """As `Broker.consume`; it is ready at once, and deliveries come from the loop's next turn on."""
        if self._closed:
            msg = "this memory broker was closed; open a new one"
            raise ConfigurationError(msg)
        consumption = MemoryConsumption(self._contents, self._clock, subscriptions, sink)
        self._consumptions.append(consumption)
        return consumption

    async def close(self) -> None:
        """As `Broker.close`; what is in the store stays there."""
        self._closed = True
        for consumption in self._consumptions:
            await consumption.close()
        self._consumptions.clear()
