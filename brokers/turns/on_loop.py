"""A driver on the event loop: what a store over the network needs to take one turn after another."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress

from leveret.errors import ConfigurationError

from .turns import Turns


class OnLoop(ABC):
    """A `Driver` whose turns a task of the loop takes. A store does each of them by its own statements."""

    turns: Turns

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._told = False
        """Whether a notice came since the last turn began."""

    def start(self) -> None:
        """As `Driver.start`."""
        self._task = asyncio.get_running_loop().create_task(self._main())

    def wake(self) -> None:
        """As `Driver.wake`."""
        self._news.set()

    def tell(self, function: Callable[..., object], /, *args: object) -> None:
        """As `Driver.tell`."""
        function(*args)

    async def close(self) -> None:
        """Close the turns, and end the task if it hangs in the network."""
        await self.turns.close()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    @abstractmethod
    async def _turn(self) -> None:
        """Take a turn, and end it."""

    @abstractmethod
    async def _leave(self) -> None:
        """Free all held jobs if the server answers; otherwise other workers free them when the leases end."""

    @abstractmethod
    def _wait_s(self) -> float:
        """Return how long a worker waits for a notice before it looks for jobs."""

    async def _main(self) -> None:
        try:
            while await self._collect():
                await self._turn()
        except Exception as error:  # noqa: BLE001 - a bug of ours: the consumption fails with it, and it is logged
            self._log.exception("the driver of %s ended; the jobs that it held are delivered again", self.turns.where)
            self.turns.give_up(
                ConfigurationError(f"the driver of {self.turns.where} ended because of a bug in leveret: {error!r}")
            )
        finally:
            await self._leave()
            self.turns.end()

    async def _collect(self) -> bool:
        """Wait for work; return False when the driver must end."""
        while (pause_s := self.turns.pause_s) > 0:  # new work isn't tried before the back-off is over
            await self._wait(pause_s)
        await self._wait(self._patience())
        return self.turns.collect()

    def _patience(self) -> float | None:
        """Return how long to wait for work; None means for ever."""
        told = self._told and not self.turns.closed
        return 0.0 if told else self.turns.patience(self._wait_s())

    async def _wait(self, limit_s: float | None) -> None:
        if limit_s is None:
            await self._news.wait()
        elif limit_s > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self._news.wait()
        self._news.clear()
