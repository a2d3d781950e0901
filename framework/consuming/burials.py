"""The burials of one queue: few at a time, so that dead letters that take nothing don't hold the window of the jobs."""

from __future__ import annotations

import asyncio

PATIENCE_S = 1.0
"""How long a burial waits for its turn, seconds. Burials before it take so long only if the dead letters take nothing."""


class Burials:
    """The burials of one queue in this process.

    At most a quarter of the queue's prefetch (of one level) is burials. Those that the broker refuses stay here, unacknowledged,
    and are tried again. Any other burial has to wait in the broker.
    """

    def __init__(self, prefetch: int) -> None:
        self.parks = prefetch > 1
        """Whether a refused burial may stay: with a prefetch of 1 it would be all that the worker holds."""
        self.why = ""
        """Why the dead letters take nothing; empty if they do."""
        self.refused = 0
        """The number of burials that were refused and are tried again."""
        self._places = asyncio.Semaphore(max(1, prefetch // 4))
        self._waiting: set[asyncio.Timeout] = set()
        """The patience of each burial that waits for a place."""

    async def enter(self) -> bool:
        """Take a place; return False if there is none, because the dead letters take nothing."""
        if self.why and self._places.locked():
            return False
        patience = asyncio.timeout(PATIENCE_S)
        self._waiting.add(patience)
        try:
            async with patience:
                return await self._places.acquire()
        except TimeoutError:
            return False
        finally:
            self._waiting.discard(patience)

    def hurry(self) -> None:
        """Let nobody wait for a place any more: the dead letters refuse, and no place will be free soon."""
        for patience in self._waiting:
            if not patience.expired():
                patience.reschedule(0.0)

    def leave(self) -> None:
        """Give the place back."""
        self._places.release()
