"""The broker on Redis or Valkey: publishers and workers of any number of hosts share its keys.

How durable a confirmed job is, the server decides, and the URL: see `docs/operations.md`.

- Each level is a separate line, oldest job first. A delayed job joins the end of its line when it is due by the server's clock.
- `again`, `bury` and a replay are one script with the settlement: neither a loss nor a duplicate is possible between the two.
- `give_back` keeps the job's place and doesn't count as a delivery, since the job wasn't started. Jobs that a consumption holds
  when it closes, or when its process dies, are delivered again as redelivered.
- A lost connection costs no lease, also if an answer was lost with it: deliveries stay live while the worker connects again. The jobs of a
  dead process are delivered again 15 to 20 seconds after its last beat (see `leases`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, final

import msgspec

from leveret.broker import Features, Posted, PublisherState, QueueState, Sink, Subscription
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable, ConfigurationError
from leveret.job import Queue
from leveret.runtime import Runtime

from .. import turns
from .address import Address, Confirm
from .link import Link
from .store import Store
from .voice import shared_log

_FEATURES: Final = Features(
    durable=False,
    shared=True,
    counts_redelivery=True,
    counts_crashes=True,
    connected=False,
    queue_type=None,
    keeps_order=True,
    keeps_place=True,
    window_per_level=True,
    deletable=False,
)
_BY_CONFIRM: Final[dict[Confirm, Features]] = {
    "memory": msgspec.structs.replace(
        _FEATURES, durability="confirmed by the server's memory: `leveret queues` says what a power cut loses"
    ),
    "replica": msgspec.structs.replace(_FEATURES, durability="confirmed by the memory of the server and of a replica"),
    "fsync": msgspec.structs.replace(_FEATURES, durable=True, durability="durable: confirmed by the server's disk"),
}
_SYNCED: Final = msgspec.structs.replace(
    _FEATURES, durable=True, durability="durable: the server syncs its disk before it answers"
)
_WORST: Final = ("ready", "blocked", "connecting", "closed")


@final
class Consumption:
    """The consumption of several queues: one for each, with the same sink."""

    def __init__(self, parts: Sequence[turns.Consumption]) -> None:
        self._parts = parts

    async def open(self) -> None:
        """Register the consumer of each queue; if one can't be, end those of the others."""
        try:
            await asyncio.gather(*(part.open() for part in self._parts))
        except BaseException:
            await asyncio.gather(*(part.close() for part in self._parts), return_exceptions=True)
            raise

    @property
    def queues(self) -> Sequence[QueueState]:
        """As `Consumption.queues`."""
        return [state for part in self._parts for state in part.queues]

    async def failed(self) -> None:
        """As `Consumption.failed`: the first queue that fails."""
        waits = [asyncio.ensure_future(part.failed()) for part in self._parts]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in done:
                wait.result()
        finally:
            for wait in waits:
                wait.cancel()

    async def stop_taking(self) -> None:
        """As `Consumption.stop_taking`."""
        for part in self._parts:
            await part.stop_taking()

    async def close(self) -> None:
        """As `Consumption.close`."""
        await asyncio.gather(*(part.close() for part in self._parts))


@final
class RedisBroker:
    """A `Broker` on the server or the servers of `address`."""

    def __init__(self, address: Address, runtime: Runtime) -> None:
        self._runtime = runtime
        self._link = Link(address, runtime)
        self._log = shared_log()
        self._stores: dict[str, Store] = {}
        self._consumptions: list[Consumption] = []
        self._not_yet = PublisherState.at(runtime.clock.now(), "connecting", f"{address} wasn't reached yet")
        self._closed: PublisherState | None = None

    def features(self, _: Queue | None = None, /) -> Features:
        """As `Broker.features`; whether a job is durable is known once a server was asked, and before that by the URL alone."""
        return _SYNCED if self._link.synced else _BY_CONFIRM[self._link.address.confirm]

    @property
    def publishing(self) -> PublisherState:
        """As `Broker.publishing`: that of the queue for which it is worst."""
        if self._closed is not None:
            return self._closed
        found = [store.publishing for store in list(self._stores.values())]
        return max(found, key=lambda state: (_WORST.index(state.name), -state.since.timestamp()), default=self._not_yet)

    def _store(self, queue: Queue) -> Store:
        found = self._stores.get(queue.name)
        if found is None:
            found = self._stores[queue.name] = Store(self._link, queue.name, self._runtime, said_by=self._log)
        return found

    async def publish(self, queue: Queue, envelope: Envelope) -> None:
        """As `Broker.publish`; every queue exists, so no job is unroutable."""
        if self._closed is not None:
            msg = f"job {envelope.job_id} for queue {queue.name!r} wasn't published: the broker is closed"
            raise BrokerUnavailable(msg, job_id=envelope.job_id)
        await self._store(queue).turns.publish(queue, envelope)

    def post(self, queue: Queue, envelope: Envelope) -> Posted | None:
        """As `Broker.post`: all posts of a turn of the loop to one queue are one script."""
        return None if self._closed is not None else self._store(queue).turns.post_publish(queue, envelope)

    async def consume(self, subscriptions: Sequence[Subscription], sink: Sink) -> Consumption:
        """As `Broker.consume`; if no server answers, the call returns within a second, and the consumption goes on trying."""
        if self._closed is not None:
            msg = f"the broker on {self._link.address} is closed; open a new one"
            raise ConfigurationError(msg)
        parts = [turns.Consumption(self._store(one.queue).turns, [one], sink) for one in subscriptions]
        consumption = Consumption(parts)
        await consumption.open()
        self._consumptions.append(consumption)
        return consumption

    async def close(self) -> None:
        """As `Broker.close`; takes at most about fifteen seconds."""
        if self._closed is None:
            self._closed = PublisherState.at(self._runtime.clock.now(), "closed")
        consumptions, self._consumptions = self._consumptions, []
        try:
            await asyncio.gather(*(consumption.close() for consumption in consumptions))
        finally:
            await asyncio.gather(*(store.close() for store in self._stores.values()))
            self._link.close()
