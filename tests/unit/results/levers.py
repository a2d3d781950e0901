"""A job store that a test can break: in front of the memory store, whose records the test also writes."""

from collections.abc import Callable, Sequence
from random import getrandbits

import msgspec

from leveret.brokers.memory.jobs import MemoryJobs, Records
from leveret.runtime import Runtime
from leveret.store import Abort, Change, Key, Progress, Record, State, Store, Verdict

from .stores import Answer, at_once


class Breakable:
    """A `Store` of which each call awaits `answer` first."""

    what = "tests://store"

    def __init__(self, store: Store, *, tells: bool = True) -> None:
        self._store = store
        self.answer: Answer = at_once
        self.questions: list[Sequence[Key]] = []
        """The keys of each call of `ended`."""
        self.begun: list[str] = []
        """The name of each call."""
        self.closed = False
        self._tells = tells

    def watch(self, ended: Callable[[Sequence[Key]], None], /) -> None:
        """Pass on, or never tell."""
        if self._tells:
            self._store.watch(ended)

    async def _called(self, name: str) -> Store:
        self.begun.append(name)
        await self.answer()
        return self._store

    async def write(self, changes: Sequence[Change | Progress], /) -> None:
        await (await self._called("write")).write(changes)

    async def begin(self, changes: Sequence[Change], /) -> Sequence[Verdict]:
        return await (await self._called("begin")).begin(changes)

    async def read(self, keys: Sequence[Key], /) -> Sequence[Record | None]:
        return await (await self._called("read")).read(keys)

    async def ended(self, keys: Sequence[Key], /) -> Sequence[Record]:
        self.questions.append(keys)
        return await (await self._called("ended")).ended(keys)

    async def newest(self, job_ids: Sequence[str], /) -> Sequence[Key | None]:
        return await (await self._called("newest")).newest(job_ids)

    async def abort(self, key: Key, /) -> Abort:
        return await (await self._called("abort")).abort(key)

    async def asked(self, keys: Sequence[Key], /) -> Sequence[Key]:
        return await (await self._called("asked")).asked(keys)

    async def list(
        self, *, state: State | None = None, queue: str | None = None, job: str | None = None, limit: int
    ) -> Sequence[Record]:
        return await (await self._called("list")).list(state=state, queue=queue, job=job, limit=limit)

    async def find(self, job_id: str, /, *, prefix: bool = False, limit: int = 100) -> Sequence[Record]:
        return await (await self._called("find")).find(job_id, prefix=prefix, limit=limit)

    async def drop(self, keys: Sequence[Key], /) -> int:
        return await (await self._called("drop")).drop(keys)

    async def trim(self, at_most: int, /) -> int:
        return await self._store.trim(at_most)

    async def close(self) -> None:
        self.closed = True
        await self._store.close()


def memory_jobs() -> MemoryJobs:
    """Return a store whose records nobody else has."""
    return MemoryJobs(Records(), "memory://", Runtime(app="test"))


def key_of(job_id: str) -> Key:
    """Return a new publish of an id."""
    return Key(job_id, getrandbits(64) - (1 << 63) or 1)


def change(key: Key, state: State, **fields: object) -> Change:
    """Return a change of a publish in its first pass and attempt."""
    plain = Change(
        job_id=key.job_id,
        publish=key.publish,
        queue="images",
        job="image.resize",
        state=state,
        passes=0,
        attempt=1,
        keep_s=60.0,
        at_ms=0,
    )
    return msgspec.structs.replace(plain, **fields)
