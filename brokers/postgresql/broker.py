"""The broker on a PostgreSQL database: publishers and workers of any number of hosts share its tables.

A confirmed job is committed with `synchronous_commit = on`: it survives the death of every process, and of the server's machine where
the server syncs its disk.

- Each level is a separate line, oldest job first. A delayed job joins the end of its line when it is due by the server's clock.
- `again`, `bury` and a replay are one transaction with the settlement: neither a loss nor a duplicate is possible between the two.
- `give_back` keeps the job's place and doesn't count as a delivery, since the job wasn't started. Jobs that a consumption holds
  when it closes, or when its process dies, are delivered again as redelivered.
- A lost connection costs no lease: deliveries stay live while the worker connects again. The jobs of a dead process are delivered again
  within about a second if its backend is seen to be gone, and otherwise 15 to 20 seconds after its last beat (see `leases`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, final

from leveret.broker import Features, Posted, PublisherState, Sink, Subscription
from leveret.envelope import Envelope
from leveret.errors import ConfigurationError
from leveret.job import Queue
from leveret.runtime import Runtime

from ..turns import Consumption
from .address import Address
from .store import Store
from .within import Once, jobs_within

if TYPE_CHECKING:
    from leveret.store import Change, Progress
    from leveret.store import Store as JobStore

_FEATURES = Features(
    durable=True,
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


@final
class PostgresBroker:
    """A `Broker` on the schema at `address`."""

    def __init__(self, address: Address, runtime: Runtime) -> None:
        self._address = address
        self._store = Store(address, runtime)
        self._turns = self._store.turns
        self._consumptions: list[Consumption] = []
        self.publish = self._turns.publish
        """As `Broker.publish`; every queue exists, so no job is unroutable."""
        within = jobs_within(address.schema, runtime.clock)
        self.within, self.within_blocking = within.within, within.within_blocking
        """As `Transactional`."""
        once = Once(address.schema, runtime.settings.inbox_s)
        self.once, self.once_blocking = once.once, once.once_blocking
        """As `Inbox`."""

    def features(self, _: Queue | None = None, /) -> Features:
        """As `Broker.features`."""
        return _FEATURES

    def shares(self, store: JobStore, missed: Callable[[Change | Progress], object], /) -> bool:
        """As `Sharing.shares`: a store with the same URL is in the same schema."""
        from .jobs import PostgresJobs

        if not isinstance(store, PostgresJobs) or store.address != self._address:
            return False
        self._store.enter, self._turns.missed = store.enter, missed
        return True

    @property
    def publishing(self) -> PublisherState:
        """As `Broker.publishing`: connecting until a server is reached, blocked while the tables are locked or can't be written."""
        return self._turns.publishing

    def post(self, queue: Queue, envelope: Envelope) -> Posted | None:
        """As `Broker.post`: all posts of a turn of the loop are one statement."""
        return self._turns.post_publish(queue, envelope)

    async def consume(self, subscriptions: Sequence[Subscription], sink: Sink) -> Consumption:
        """As `Broker.consume`; if no server answers, the call returns within a second, and the consumption goes on trying."""
        if self._turns.closed:
            msg = f"the broker on {self._turns.where} is closed; open a new one"
            raise ConfigurationError(msg)
        consumption = Consumption(self._turns, subscriptions, sink)
        await consumption.open()
        self._consumptions.append(consumption)
        return consumption

    async def close(self) -> None:
        """As `Broker.close`; takes at most about fifteen seconds."""
        consumptions, self._consumptions = self._consumptions, []
        try:
            await asyncio.gather(*(consumption.close() for consumption in consumptions))
        finally:
            await self._store.close()
