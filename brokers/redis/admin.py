"""Inspect and repair the queues of a Redis, for the command line."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, TypeVar, final

from leveret.admin import DeadLetter, DeadLetters, Depth
from leveret.errors import BrokerUnavailable, ConfigurationError, PublishTimeout
from leveret.job import Queue
from leveret.runtime import Runtime

from ..rows import Letter, Row, packed, unpack
from ..turns import Close, Look, Open, Run, Taker, Write
from . import scripts
from .address import Address, Node, shown
from .entries import read, seq_bytes, tail_of
from .keys import LEVEL_NAMES, LEVEL_NUMBERS
from .link import Link, info
from .store import Store
from .wire import Server, Wire

log = logging.getLogger("leveret.redis")
T = TypeVar("T")

_PAGE: Final = 100
_NEARLY_FULL: Final = 0.9
_LOST_BY_SYNC: Final = {
    "everysec": "confirmed jobs of up to a second (appendfsync everysec)",
    "no": "confirmed jobs of half a minute or more (appendfsync no)",
    None: "confirmed jobs unless appendfsync is always, which the server doesn't let us read",
}
_Call = Callable[[Wire], Awaitable[T]]


@final
class _Letter(Letter):
    """A dead letter that a reader holds."""

    __slots__ = ()


@final
class _Letters:
    """The dead letters of one queue, held page by page under a separate lease."""

    def __init__(self, admin: RedisAdmin, queue: Queue, taker: Taker) -> None:
        self._admin = admin
        self._queue = queue.name
        self._store = admin.store(queue.name)
        self._taker = taker

    def __aiter__(self) -> AsyncIterator[DeadLetter]:
        return self._pages()

    async def _pages(self) -> AsyncIterator[DeadLetter]:
        # jobs buried later aren't read: a replay that fails at once would be read again and again
        last: int = await self._admin.run(self._store, "the dead letters", self._last)
        seen = 0
        page: list[bytes] | None = [b""]
        while page:
            page = await self._admin.run(self._store, "the dead letters", self._read(seen, last))
            if page is None:
                msg = f"the dead letters of queue {self._queue!r} can't be read on: this reader's lease was lost"
                raise BrokerUnavailable(msg)
            for entry in page:
                row, _ = read(entry, self._queue, LEVEL_NAMES[len(LEVEL_NAMES)])
                if row[0] <= last:  # a foreign producer's has got a new number
                    seen = row[0]
                yield _Letter(row[0], unpack(row[3:])[0])

    async def _last(self, wire: Wire) -> int:
        return int(await wire.call("GET", self._store.keys["seq"]) or 0)

    def _read(self, seen: int, last: int) -> _Call[list[bytes] | None]:
        async def read(wire: Wire) -> list[bytes] | None:
            reader, keys = self._taker.lease.id or 0, self._store.keys
            page: list[bytes] | None = await self._store.evaluate(
                wire, scripts.READ, [keys.read(reader)], reader, seen, last, _PAGE
            )
            return page

        return read

    async def replay(self, letter: DeadLetter, envelope: Any) -> None:
        """As `DeadLetters.replay`, in one script. BrokerUnavailable if the lease was lost meanwhile; then nothing is published."""
        await self._take(letter, f"the replay of job {envelope.job_id}", packed(letter.envelope.queue, envelope, None))

    async def drop(self, letter: DeadLetter) -> None:
        """As `DeadLetters.drop`."""
        await self._take(letter, f"the drop of job {letter.envelope.job_id}", None)

    async def _take(self, letter: DeadLetter, about: str, row: Row | None) -> None:
        if not isinstance(letter, _Letter):
            msg = f"replay() and drop() take a dead letter of the Redis broker, not {letter!r}"
            raise TypeError(msg)
        job = () if row is None else (LEVEL_NUMBERS[row[1]], tail_of(row))

        async def take(wire: Wire) -> bool:
            reader, store = self._taker.lease.id or 0, self._store
            return bool(
                await store.evaluate(wire, scripts.TAKE, [store.keys.read(reader)], reader, seq_bytes(letter.seq), *job)
            )

        if not await self._admin.run(self._store, about, take):
            msg = f"{about} wasn't done: this reader no longer holds the dead letter; read it again"
            raise BrokerUnavailable(msg, job_id=letter.envelope.job_id)


@final
class _Open(AbstractAsyncContextManager[DeadLetters, None]):
    """Holds the dead letters of a queue for the time of a `with` block."""

    def __init__(self, admin: RedisAdmin, queue: Queue) -> None:
        self._admin = admin
        self._queue = queue
        self._taker = Taker()

    async def __aenter__(self) -> DeadLetters:
        try:
            await self._admin.hold(self._taker, self._queue)
        except BaseException:
            await self._admin.release(self._taker, self._queue)
            raise
        return _Letters(self._admin, self._queue, self._taker)

    async def __aexit__(self, *_: object) -> None:
        await self._admin.release(self._taker, self._queue)


@final
class RedisAdmin:
    """An `Admin` on the server or the servers of `address`.

    Every call ends within the setting `connect_timeout_s`, with BrokerUnavailable if no server answers.
    """

    def __init__(self, address: Address, runtime: Runtime) -> None:
        self._runtime = runtime
        self._link = Link(address, runtime, name="leveret admin")
        self._stores: dict[str, Store] = {}

    def store(self, queue: str) -> Store:
        """Return the access to a queue."""
        found = self._stores.get(queue)
        if found is None:
            found = self._stores[queue] = Store(self._link, queue, self._runtime, patient=False)
        return found

    async def run(self, store: Store, about: str, call: _Call[T]) -> T:
        """Run `call` in a turn."""
        result: T = await self._run(store, Run(about=about, call=call, deadline=self._deadline()))
        return result

    async def look(self, store: Store, about: str, call: _Call[T]) -> T:
        """Run `call`, which reads, before the next turn."""
        result: T = await self._run(store, Look(about=about, call=call, deadline=self._deadline()))
        return result

    async def _run(self, store: Store, write: Write) -> Any:
        try:
            return await store.turns.run(write)
        except PublishTimeout as error:
            raise BrokerUnavailable(str(error)) from error

    def _deadline(self) -> float:
        return time.monotonic() + self._runtime.settings.connect_timeout_s

    async def depths(self, queues: Sequence[Queue]) -> list[Depth]:
        """As `Admin.depths`. The jobs of a dead worker count as unsettled until another worker runs."""
        return [await self._depth(queue) for queue in queues]

    async def _depth(self, queue: Queue) -> Depth:
        store = self.store(queue.name)

        async def read(wire: Wire) -> list[int]:
            workers = [int(worker) for worker in await wire.call("HKEYS", store.keys["workers"])]
            names = [*map(store.keys.held, workers), *map(store.keys.read, workers)]
            counts: list[int] = await store.evaluate(wire, scripts.DEPTH, names)
            return counts

        about = f"the read of queue {queue.name!r}"
        *counts, held, delayed, dead, known = await self.look(store, about, read)
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

        servers = await self.look(self.store("notes"), "the read of the server", read)
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
        store = self.store(queue.name)

        async def delete(wire: Wire) -> tuple[int, int]:
            count, more = await store.evaluate(wire, scripts.PURGE, [])
            return count, more

        purged, more = 0, 1
        while more:  # some thousands that are due are moved at a time
            count, more = await self.run(store, f"the purge of queue {queue.name!r}", delete)
            purged += count
        return purged

    def dead(self, queue: Queue) -> AbstractAsyncContextManager[DeadLetters, None]:
        """As `Admin.dead`; if this process dies, its letters are free again as the jobs of a dead worker are."""
        return _Open(self, queue)

    async def hold(self, taker: Taker, queue: Queue) -> None:
        """Get a lease."""
        write = Open(about="opening the dead letters", taker=taker, deadline=self._deadline())
        await self._run(self.store(queue.name), write)

    async def release(self, taker: Taker, queue: Queue) -> None:
        """Free the letters that are held under the lease."""
        write = Close(about="closing the dead letters", taker=taker, deadline=self._deadline())
        try:
            await self._run(self.store(queue.name), write)
        except (BrokerUnavailable, ConfigurationError) as error:
            # they are free again when this process has ended, as those of a killed process are
            log.warning(
                "the dead letters of queue %r can't be opened by others until this process ends: %s", queue.name, error
            )

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
