"""What the server confirms: it has memory for a job, and the job is on the disk or on a replica, as the URL asks for."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final, final

from leveret.broker import PublisherState
from leveret.clock import Clock

from ..turns import UNDER_WAY, Turn, Turns, Write
from ..turns.writes import Again, Bury, Publish
from . import scripts
from .keys import Keys
from .link import Link, meaning_of
from .wire import Refused, Wire

TURN_S: Final = 10.0
"""How long a turn may take, seconds, and a second more for each MB of bodies; then the connection is given up."""
_UNCONFIRMED_S: Final = 2.0
"""How long a turn waits for a confirm if the one before got none, seconds; a file that is synced each second takes up to two."""
ROOM_S: Final = 1.0
"""How often a server that takes no jobs is asked whether it takes some again, seconds."""


@final
class Confirming:
    """Waits until the server has confirmed what a turn added, and knows whether it takes more."""

    def __init__(self, link: Link, keys: Keys, turns: Turns, clock: Clock, said_by: logging.Logger) -> None:
        self._link = link
        self._keys = keys
        self._turns = turns
        self._clock = clock
        self._said_by = said_by
        self._confirm = link.address.confirm
        self.blocked: PublisherState | None = None
        """Since when the server has no memory for a job, or nothing that confirms it."""
        self._next_look = 0.0
        self._unconfirmed = False
        """Whether the log said that nothing confirms jobs."""

    async def wait(self, wire: Wire, turn: Turn) -> None:
        """Wait for the disk or a replica. If neither confirms, what was added is in doubt; the rest of the turn counts.

        From then on each turn waits for some seconds only, until something is confirmed: jobs that end meanwhile are settled.
        """
        adds = [write for write in turn.writes if isinstance(write, Publish | Again | Bury)]
        until = time.monotonic() + (_UNCONFIRMED_S if self._unconfirmed else TURN_S)
        lacks = "no replica has" if self._confirm == "replica" else "its disk hasn't"
        why = self._turns.under_way = f"the server has it, and {lacks} confirmed it"
        try:
            while not await self._confirms(wire, 1000):
                if time.monotonic() >= until or all(write.ended for write in adds):
                    self._turns.doubt(Turn(list[Write](adds), [], []), why)
                    if not self._unconfirmed:
                        self._unconfirmed = True
                        self._said_by.warning(
                            "%s confirms no jobs: %s; publishes end with PublishTimeout, and retries take some seconds longer",
                            self._turns.where,
                            why,
                        )
                    self.block(why)
                    return
        finally:
            self._turns.under_way = UNDER_WAY
        self._takes_jobs()

    def _takes_jobs(self) -> None:
        """Note that the server takes jobs, and that they are confirmed as the URL asks for."""
        self.blocked = None
        if self._unconfirmed:
            self._unconfirmed = False
            self._said_by.info("%s confirms jobs again", self._turns.where)

    async def _confirms(self, wire: Wire, limit_ms: int) -> bool:
        """Whether the last writes on `wire` are confirmed as the URL asks for."""
        if self._confirm == "replica":
            return bool(await self._ask(wire, "WAIT", 1, limit_ms) >= 1)
        if wire.server.syncs:
            return True
        return bool((await self._ask(wire, "WAITAOF", 1, 0, limit_ms))[0] >= 1)

    async def _ask(self, wire: Wire, *words: str | int) -> Any:
        async with asyncio.timeout(TURN_S):
            return await wire.call(*words)

    def block(self, why: str) -> None:
        """Note that the server takes no jobs now."""
        self._next_look = time.monotonic() + ROOM_S
        now = self._clock.now()
        if self.blocked is None:
            self.blocked = PublisherState.at(now, "blocked", why)
        else:
            self.blocked = self.blocked.then(now, "blocked", why)

    async def look(self, wire: Wire) -> None:
        """Ask a server that took no jobs, if it is time, whether it takes them again."""
        if time.monotonic() < self._next_look:
            return
        try:
            await self._keys.evaluate(wire, scripts.ROOM, [])
            if self._confirm != "memory" and not await self._confirms(wire, 100):
                raise Refused("NOREPLICAS nothing confirms it")
        except Refused as error:
            if meaning_of(error) not in {"full", "blocked"}:
                raise
            self._next_look = time.monotonic() + ROOM_S
        else:
            self._takes_jobs()
