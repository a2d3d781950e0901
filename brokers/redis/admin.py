"""Inspect and repair the queues of a Redis, for the command line."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, final

from leveret.admin import DeadLetters, Depth
from leveret.errors import BrokerUnavailable
from leveret.job import Queue
from leveret.runtime import Runtime

from ..letters import PAGE, Letters
from ..rows import Row
from ..turns import Access, Taker
from . import scripts
from .address import Address, Node, shown
from .entries import read, seq_bytes, tail_of
from .keys import LEVEL_NAMES, LEVEL_NUMBERS
from .link import Link, info
from .store import Store
from .wire import Server, Wire

log = logging.getLogger("leveret.redis")

_NEARLY_FULL: Final = 0.9
_LOST_BY_SYNC: Final = {
    "everysec": "confirmed jobs of up to a second (appendfsync everysec)",
    "no": "confirmed jobs of half a minute or more (appendfsync no)",
    None: "confirmed jobs unless appendfsync is always, which the server doesn't let us read",
}


@final
class _Letters(Letters):
    """The dead letters of one queue, held page by page under a separate lease."""

    store = "the Redis broker"

    def __init__(self, access: Access, store: Store, queue: Queue, taker: Taker) -> None:
        super().__init__(queue.name)
        self._access = access
        self._keys = store.keys
        self._taker = taker

    async def _last(self) -> int:
        async def ask(wire: Wire) -> int:
            return int(await wire.call("GET", self._keys["seq"]) or 0)

        last: int = await self._access.run("the dead letters", ask)
        return last

    async def _page(self, seen: int, last: int) -> list[tuple[Any, ...]]:
        async def claim(wire: Wire) -> list[bytes] | None:
            reader = self._taker.lease.id or 0
            page: list[bytes] | None = await self._keys.evaluate(
                wire, scripts.READ, [self._keys.read(reader)], reader, seen, last, PAGE
            )
            return page

        page: list[bytes] | None = await self._access.run("the dead letters", claim)
        if page is None:
            msg = f"the dead letters of queue {self.queue!r} can't be read on: this reader's lease was lost"
            raise BrokerUnavailable(msg)
        rows = [read(entry, self.queue, LEVEL_NAMES[len(LEVEL_NAMES)])[0] for entry in page]
        return [(row[0], *row[3:]) for row in rows]

    async def _take(self, seq: int, about: str, job: Row | None) -> bool:
        added = () if job is None else (LEVEL_NUMBERS[job[1]], tail_of(job))

        async def take(wire: Wire) -> bool:
            reader = self._taker.lease.id or 0
            names = [self._keys.read(reader)]
            return bool(await self._keys.evaluate(wire, scripts.TAKE, names, reader, seq_bytes(seq), *added))

        taken: bool = await self._access.run(about, take)
        return taken


@final
class RedisAdmin:
    """An `Admin` on the server or the servers of `address`.

    Every call ends within the setting `connect_timeout_s`, with BrokerUnavailable if no server answers.
    """

    def __init__(self, address: Address, runtime: Runtime) -> None:
        self._runtime = runtime
        self._link = Link(address, runtime, name="leveret admin")
        self._stores: dict[str, Store] = {}

    def _store(self, queue: str) -> tuple[Store, Access]:
        found = self._stores.get(queue)
        if found is None:
            found = self._stores[queue] = Store(self._link, queue, self._runtime, patient=False)
        return found, Access(found.turns, self._runtime, log)

    async def depths(self, queues: Sequence[Queue]) -> list[Depth]:
        """As `Admin.depths`. The jobs of a dead worker count as unsettled until another worker runs."""
        return [await self._depth(queue) for queue in queues]

    async def _depth(self, queue: Queue) -> Depth:
        store, access = self._store(queue.name)

        async def read(wire: Wire) -> list[int]:
            workers = [int(worker) for worker in await wire.call("HKEYS", store.keys["workers"])]
            names = [*map(store.keys.held, workers), *map(store.keys.read, workers)]
            counts: list[int] = await store.keys.evaluate(wire, scripts.DEPTH, names)
            return counts

        *counts, held, delayed, dead, known = await access.look(f"the read of queue {queue.name!r}", read)
        found = {LEVEL_NAMES[number]: count for number, count in enumerate(counts, 1)}
        asked = {level.value for level in queue.levels}
        levels = {name: count for name, count in found.items() if name in asked or count}
        return Depth(
            queue=queue.name,
            ready=sum(levels.values()),
            levels=levels,
            unsettled=held,
            delayed=delayed,
            dead=dead,
            consumers=None,
            exists=bool(known or delayed or dead or held),
        )

    async def delayed(self) -> None:
        """As `Admin.delayed`; returns None, since `depths` counts the delayed jobs of each queue."""

    async def notes(self) -> list[str]:
        """As `Admin.notes`: what of a server may lose jobs, or stop it from taking more. What isn't so on all nodes of a cluster names those."""

        async def read(wire: Wire) -> list[tuple[str, list[str]]]:
            if self._link.address.kind != "cluster":
                return [("", await self._said_by(wire))]
            nodes = await self._link.primaries()
            return list(zip(map(shown, nodes), await asyncio.gather(*map(self._said_at, nodes)), strict=True))

        _, access = self._store("notes")
        servers = await access.look("the read of the server", read)
        said: dict[str, list[str]] = {}
        for name, notes in servers:
            for note in notes:
                said.setdefault(note, []).append(name)
        return [note if len(names) == len(servers) else f"{', '.join(names)}: {note}" for note, names in said.items()]

    async def _said_at(self, node: Node) -> list[str]:
        try:
            async with asyncio.timeout(self._runtime.settings.connect_timeout_s / 2):
                return await self._said_by(await self._link.to(node))
        except (BrokerUnavailable, OSError) as error:
            return [f"the server can't be asked: {error or 'no answer in time'}"]

    async def _said_by(self, wire: Wire) -> list[str]:
        told = await info(wire, "memory", "persistence", "replication")
        return [*self._durability(told, wire.server), *_memory(told)]

    def _durability(self, told: dict[str, str], server: Server) -> list[str]:
        notes: list[str] = []
        confirm = self._link.address.confirm
        if told.get("aof_enabled") == "0":
            notes.append("the server writes no append-only file: a restart of it loses jobs")
        elif confirm == "memory" and not server.syncs:
            notes.append(f"a power cut of the server loses {_LOST_BY_SYNC[server.sync]}")
        if confirm == "replica" and told.get("connected_slaves") == "0":
            notes.append("the server has no replica now: with confirm=replica no job is confirmed until one has it")
        for name, what in (
            ("aof_last_write_status", "the append-only file couldn't be written"),
            ("aof_last_bgrewrite_status", "the append-only file couldn't be rewritten"),
            ("rdb_last_bgsave_status", "the last snapshot failed"),
        ):
            if told.get(name, "ok") != "ok":
                notes.append(f"{what}; look at the server's log")
        return notes

    async def purge(self, queue: Queue) -> int:
        """As `Admin.purge`."""
        store, access = self._store(queue.name)

        async def delete(wire: Wire) -> tuple[int, int]:
            count, more = await store.keys.evaluate(wire, scripts.PURGE, [])
            return count, more

        purged, more = 0, 1
        while more:  # some thousands that are due are moved at a time
            count, more = await access.run(f"the purge of queue {queue.name!r}", delete)
            purged += count
        return purged

    @asynccontextmanager
    async def dead(self, queue: Queue) -> AsyncGenerator[DeadLetters]:
        """As `Admin.dead`; if this process dies, its letters are free again as the jobs of a dead worker are."""
        store, access = self._store(queue.name)
        async with access.reader(queue) as taker:
            yield _Letters(access, store, queue, taker)

    async def close(self) -> None:
        """As `Admin.close`."""
        for store in self._stores.values():
            await store.close()
        self._link.close()


def _memory(told: dict[str, str]) -> list[str]:
    used, most = int(told.get("used_memory", 0)), int(told.get("maxmemory", 0))
    if not most or used < most * _NEARLY_FULL:
        return []
    return [
        f"the server's memory is nearly full: {used >> 20} of {most >> 20} MiB (maxmemory); then it takes no more jobs"
    ]
