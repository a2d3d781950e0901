"""What an admin asks of a store, in its turns."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, final

from leveret.errors import BrokerUnavailable, ConfigurationError, PublishTimeout
from leveret.job import Queue
from leveret.runtime import Runtime

from .takers import Taker
from .turns import Turns
from .writes import Call, Close, Look, Open, Run, Write


@final
class Access:
    """Runs an admin's calls in `turns`. Each ends within the setting `connect_timeout_s`, with BrokerUnavailable if the store doesn't answer."""

    def __init__(self, turns: Turns, runtime: Runtime, log: logging.Logger) -> None:
        self._turns = turns
        self._limit_s = runtime.settings.connect_timeout_s
        self._log = log

    async def run(self, about: str, call: Call) -> Any:
        """Run `call` in a transaction that writes."""
        return await self._do(Run(about=about, call=call, deadline=self._deadline()))

    async def look(self, about: str, call: Call) -> Any:
        """Run `call`, which reads, outside of the transactions that write."""
        return await self._do(Look(about=about, call=call, deadline=self._deadline()))

    @asynccontextmanager
    async def reader(self, queue: Queue) -> AsyncGenerator[Taker]:
        """Hold a lease for a reader of the queue's dead letters. In the end the letters that it still holds are free again."""
        taker = Taker()
        try:
            await self._do(Open(about="opening the dead letters", taker=taker, deadline=self._deadline()))
            yield taker
        finally:
            try:
                await self._do(Close(about="closing the dead letters", taker=taker, deadline=self._deadline()))
            except (BrokerUnavailable, ConfigurationError) as error:
                # they are free again when this process has ended, as those of a killed process are
                self._log.warning(
                    "the dead letters of queue %r can't be opened by others until this process ends: %s",
                    queue.name,
                    error,
                )

    async def _do(self, write: Write) -> Any:
        try:
            return await self._turns.run(write)
        except PublishTimeout as error:
            raise BrokerUnavailable(str(error)) from error

    def _deadline(self) -> float:
        return time.monotonic() + self._limit_s
