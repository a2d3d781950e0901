"""delivery → suspect: a job that may have killed its worker runs beside the others once more, then alone, and is buried at last."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from ..broker import Delivery
from ..headers import MOST
from ..outcome import Suspect, WorkerLost
from ..runtime import Runtime
from ..waits import first_of
from .remembered import Remembered
from .said import what
from .slots import Held, Slots

logger = logging.getLogger("leveret.consumer")

SHARED_S = 30.0
"""Redeliveries that come so soon after the first one that follows a lost connection are put down to that loss, not to a crash."""
ALONE_AFTER_S = 60.0
"""How long a job that must run alone waits for the running ones, seconds; nothing else starts meanwhile."""
BURST_S = 1.0
"""For how long suspects run one after another before the other jobs have their turn, seconds; a longer run is a turn by itself."""
_NEXT_S = 0.05
"""How long the next suspect is waited for before the others go on, and the others before the next suspect, seconds."""


class Suspects:
    """Finds the jobs that may have crashed a worker, and runs each alone.

    Args:
        slots: The slots of this process, which pause while a suspect runs.
        runtime: Clock and settings.
        remembered: Knows what this process gave back.
        start: Starts a task that a stop of the worker waits for.
        changed: Waits until a job starts or ends, or the worker stops.
        give_back: Gives back a suspect that hasn't run.
    """

    def __init__(
        self,
        slots: Slots,
        runtime: Runtime,
        remembered: Remembered,
        *,
        start: Callable[[Coroutine[Any, Any, None]], None],
        changed: Callable[[], Coroutine[Any, Any, None]],
        give_back: Callable[[Delivery], None],
    ) -> None:
        self._slots, self._remembered = slots, remembered
        self._clock = runtime.clock
        self._limit = runtime.settings.crash_limit
        self._start, self._changed, self._give_back = start, changed, give_back
        self._waiting: deque[Held] = deque()
        self._came = asyncio.Event()
        self._stopped = asyncio.Event()
        self._under_way = False
        self._others_until = float("-inf")
        """No suspect starts before this time of the monotonic clock."""
        self._was_lost = False
        self._shared_until = float("-inf")

    def lost(self) -> None:
        """Note that this process lost a connection: the broker, or the network, returns the jobs."""
        self._was_lost = True

    def judge(self, delivery: Delivery) -> Suspect | WorkerLost | None:
        """Return how a redelivery ends without a run, since it may have crashed its worker; None if it runs."""
        crashes = delivery.envelope.crashes
        if not (delivery.counted or self._remembered.gave_back(delivery.envelope) or self._is_shared_loss()):
            crashes = min(crashes + 1, MOST)
            if crashes < self._limit:
                return Suspect()
        return WorkerLost(crashes) if crashes >= self._limit else None

    def _is_shared_loss(self) -> bool:
        """Whether a redelivery is put down to the last loss of a connection here."""
        now = self._clock.monotonic()
        if self._was_lost:
            self._was_lost = False
            self._shared_until = now + SHARED_S
        return now < self._shared_until

    def add(self, held: Held) -> None:
        """Run a suspect, alone, when its turn comes."""
        self._waiting.append(held)
        self._came.set()
        if not self._under_way:
            self._under_way = True
            self._start(self._run())

    def stop(self) -> None:
        """Give back the suspects that wait."""
        self._stopped.set()
        while self._waiting:
            self._give_back(self._waiting.popleft().delivery)

    async def _run(self) -> None:
        """Run the suspects in bursts; after each, the other jobs run for as long, if there are any."""
        try:
            while self._waiting:
                await self._rest()
                await self._burst()
        finally:
            self._under_way = False

    async def _rest(self) -> None:
        """Let the other jobs run until their time is over, or none of them is here."""
        while (left_s := self._others_until - self._clock.monotonic()) > 0 and not self._stopped.is_set():
            await first_of(self._stopped.wait(), self._clock.sleep(min(left_s, _NEXT_S)))
            if not (self._slots.running or self._slots.held):
                break

    async def _burst(self) -> None:
        """Run suspects one after another, each alone, for a second, or for one run that takes longer."""
        began = self._clock.monotonic()
        self._slots.pause()
        try:
            while self._waiting:
                await self._run_alone(self._waiting.popleft())
                if self._slots.stopping or self._clock.monotonic() - began >= BURST_S:
                    break
                await self._next()
        finally:
            now = self._clock.monotonic()
            # the next suspect may be here: it waits no longer than a delivery may
            self._others_until = now + min(now - began, self._slots.hold_s)
            self._slots.resume()

    async def _next(self) -> None:
        """Wait for a moment until a suspect is there: the broker delivers the next one once the last one is settled."""
        if not self._waiting:
            self._came.clear()
            await first_of(self._came.wait(), self._clock.sleep(_NEXT_S))

    async def _run_alone(self, held: Held) -> None:
        """Run a suspect once nothing else runs, or after a stated time; give it back if the worker stops."""
        ends = self._clock.monotonic() + ALONE_AFTER_S
        while self._slots.running and not self._slots.stopping and (left_s := ends - self._clock.monotonic()) > 0:
            await first_of(self._changed(), self._clock.sleep(left_s))
        if not held.delivery.live:
            return
        if self._slots.stopping:
            self._give_back(held.delivery)
            return
        logger.warning(
            "%s runs alone, since workers may have died of it: %d",
            what(held.delivery.envelope),
            held.delivery.envelope.crashes,
        )
        self._slots.give_slot(held, self._slots.queues[held.delivery.queue.name])
        if held.task is not None:
            await asyncio.wait([held.task])
