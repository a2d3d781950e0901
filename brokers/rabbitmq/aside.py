"""A physical queue that can't be consumed, tried on a connection of its own, so that it costs no other queue anything."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from leveret.backoff import full_jitter
from leveret.errors import ConfigurationError

from .connection import Connection
from .consumers import Consumers, Home, Wanted
from .session import FAULTS, ConnectionLost, Sick, counts, reason_of

logger = logging.getLogger("leveret.rabbitmq")

BASE_S, CAP_S = 1.0, 60.0
"""The ceilings of the first wait between two tries, and of every wait. A try may cost a message one of its deliveries."""
ANSWER_S = 90.0
"""How long the answer to a consume is waited for: the broker takes up to 41 s, and carries out later what nobody waits for."""
_LOOK_S = 2.0
_TELL_EVERY_S = 60.0


class Aside:
    """One physical queue: tried with back-off, one try at a time. Once it is consumed, it stays on its own connection."""

    def __init__(
        self,
        home: Home,
        wanted: Wanted,
        sick: Sick,
        connection: Callable[[], Connection | None],
    ) -> None:
        self.wanted = wanted
        self.why = str(sick)
        """Why the queue isn't consumed; empty while it is."""
        self.sick = True
        """Whether the last try failed because of the queue; False once it is consumed, and after its connection was lost."""
        self.consumers: Consumers | None = None
        self._home = home
        self._connection = connection
        self._told = time.monotonic()
        self._task = asyncio.create_task(self._run())

    @property
    def idle(self) -> bool:
        """Whether the queue isn't known to be sick and isn't consumed here: the main connection may have it back."""
        return not self.sick and self.consumers is None

    @property
    def ended(self) -> asyncio.Task[None]:
        """The task, which ends only by a bug or `close`."""
        return self._task

    async def _run(self) -> None:
        attempt = 1
        while True:
            await self._pause(attempt)
            attempt += 1
            try:
                consumers = await self._try()
            except Sick as sick:
                self.sick = True
                self._tell(str(sick))
                self._home.failed(1)
            except (ConnectionLost, ConfigurationError) as error:
                self._tell(str(error))
            else:
                attempt = 1
                await self._consumed(consumers)

    async def _pause(self, attempt: int) -> None:
        """Wait for the back-off, or until messages are seen where none were: the queue has a leader again."""
        ends = time.monotonic() + full_jitter(attempt, base_s=BASE_S, cap_s=CAP_S, rng=self._home.runtime.rng)
        [name] = self.wanted.names
        empty = False
        while (left_s := ends - time.monotonic()) > 0:
            await self._home.runtime.clock.sleep(min(_LOOK_S, left_s))
            connection = self._connection()
            if connection is None or not connection.usable:
                continue
            try:
                found = (await counts(connection, (name,), _LOOK_S))[name]
            except FAULTS:
                continue
            if empty and found != (0, 0):
                return
            empty = found == (0, 0)

    async def _try(self) -> Consumers:
        settings = self._home.runtime.settings
        name = f"leveret {self._home.runtime.app} consume aside"
        connection = await self._home.nodes.connect(name, settings.connect_timeout_s)
        consumers = Consumers(self._home, connection)
        try:
            await consumers.start([self.wanted], patience_s=ANSWER_S, trial=True)
        except BaseException as error:
            consumers.end()
            await consumers.close()
            self._home.sink.lost()  # what was delivered, and comes back, killed nobody
            if isinstance(error, FAULTS):
                raise ConnectionLost(f"RabbitMQ at {connection.address}: {reason_of(error)}") from error
            raise
        return consumers

    async def _consumed(self, consumers: Consumers) -> None:
        """Consume until the connection is lost."""
        self.consumers, self.sick, self.why = consumers, False, ""
        self._home.changed()
        try:
            self.why = await asyncio.shield(consumers.lost)
            self.sick = consumers.sick is not None
            self.consumers = None
            consumers.end()
            self._home.sink.lost()
            self._home.changed()
        finally:
            consumers.end()
            await consumers.close()

    def _tell(self, why: str) -> None:
        """Keep the reason, and log it once a minute; the first time it is logged as the worker's state."""
        if why != self.why:
            self.why = why
            self._home.changed()
        if time.monotonic() - self._told >= _TELL_EVERY_S:
            self._told = time.monotonic()
            logger.warning("%s; trying again", why)

    async def close(self) -> None:
        """End the tries, or the connection with its consumers, after their settlements."""
        self._task.cancel()
        await asyncio.wait([self._task])
