"""The consumption of a store: a taker that passes what was claimed to its sink."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, final

from leveret.broker import QueueState, Sink, Subscription
from leveret.errors import BrokerUnavailable, ConfigurationError, LeveretError, PublishTimeout

from .claimed import Claimed
from .takers import Taker, Window
from .writes import Close, Open

if TYPE_CHECKING:
    from .turns import Turns

_FIRST_TRY_S = 1.0


@final
class Consumption(Taker):
    """A consumption, with one window per level of each queue."""

    def __init__(self, turns: Turns, subscriptions: Sequence[Subscription], sink: Sink) -> None:
        super().__init__(
            Window(s.queue, level.value, s.prefetch, turns) for s in subscriptions for level in s.queue.levels
        )
        self._turns = turns
        self._sink = sink
        self._error: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # the exception is read here, since perhaps nobody waits for `failed`
        self._error.add_done_callback(lambda error: error.cancelled() or error.exception())
        self._closed = False
        self._names = [subscription.queue.name for subscription in subscriptions]

    async def open(self) -> None:
        """Register the consumer; return once registered, or after a second if the store can't be written."""
        write = Open(about="the registration of a consumer", taker=self)
        write.future = asyncio.get_running_loop().create_future()
        write.future.add_done_callback(lambda opened: opened.cancelled() or opened.exception())
        self._turns.post(write)
        try:
            await asyncio.wait({write.future}, timeout=_FIRST_TRY_S)
        except asyncio.CancelledError:
            self._turns.post(self._closing())
            raise
        if write.future.done():
            write.future.result()

    @property
    def queues(self) -> tuple[QueueState, ...]:
        """As `Consumption.queues`; a consumer is registered by a write, which also shows whether the store can be written."""
        if not self.taking:
            return tuple(QueueState(name, "stopped") for name in self._names)
        if self.ready:
            return tuple(QueueState(name, "consumed") for name in self._names)
        why = f"{self._turns.where} can't be written: {self._turns.why}" if self._turns.why else ""
        return tuple(QueueState(name, "connecting", why) for name in self._names)

    async def failed(self) -> None:
        """As `Consumption.failed`."""
        await asyncio.shield(self._error)

    async def stop_taking(self) -> None:
        """As `Consumption.stop_taking`; jobs that are claimed meanwhile are given back."""
        self.taking = False

    async def close(self) -> None:
        """As `Consumption.close`; if the store stays unwritable, held jobs come back when the lease ends, and finished jobs may run again.

        Without jobs, an unwritable store isn't waited for.
        """
        if self._closed:
            return
        self._closed = True
        self.taking = False
        if self._turns.closed:
            return
        if self._turns.why and not self.holds:
            self._turns.post(self._closing())
            return
        try:
            await self._turns.run(self._closing(self._turns.close_by()))
        except (PublishTimeout, BrokerUnavailable, ConfigurationError):
            self._turns.post(self._closing())  # once the store can be written

    def _closing(self, deadline: float = math.inf) -> Close:
        return Close(about="closing a consumer", taker=self, deadline=deadline)

    def arrived(self, deliveries: Sequence[Claimed], /) -> None:
        """Pass the claimed jobs to the sink, or give them back after `stop_taking`."""
        for delivery in deliveries:
            if self.taking:
                self._sink.deliver(delivery)
            else:
                delivery.give_back()

    def lost(self) -> None:
        """Call `lost` of the sink, and let the worker say what was lost."""
        self._sink.lost()
        self._sink.queues_changed()

    def changed(self) -> None:
        """Call `queues_changed` of the sink."""
        self._sink.queues_changed()

    def cannot(self, error: LeveretError, /) -> None:
        """Fail the consumption with `error`."""
        if not self._error.done():
            self._error.set_exception(error)
        self._sink.lost()
        self._sink.queues_changed()
