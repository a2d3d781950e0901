"""Looking into the queues of a `MemoryStore` and repairing: for the command line, and for tests."""

# pyright: reportPrivateUsage=false
# see `memory`: these classes work on the store's insides, with its lock held

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import final

from leveret.admin import DeadLetter, DeadLetters, Depth
from leveret.envelope import Envelope
from leveret.errors import LeveretError
from leveret.job import LEVELS, Queue
from leveret.runtime import Runtime

from .broker import Letter, MemoryStore, sent


@final
class _Letters:
    """The dead letters that were there when it was opened."""

    def __init__(self, store: MemoryStore, queue: str) -> None:
        self._store = store
        self._queue = queue
        self._last = 0

    async def __aenter__(self) -> _Letters:
        with self._store._lock:
            self._last = next(self._store._order)  # a job replayed and buried again meanwhile isn't read twice
        return self

    async def __aiter__(self) -> AsyncIterator[DeadLetter]:
        while (letter := self._next()) is not None:
            yield letter

    def _next(self) -> Letter | None:
        with self._store._lock:
            for letter in self._store._dead.get(self._queue, {}).values():
                if letter.order < self._last and letter.reader is None:
                    letter.reader = self
                    return letter
        return None

    def _check_open(self, letter: DeadLetter) -> Letter:
        if not isinstance(letter, Letter) or letter.reader is not self:
            msg = f"job {letter.envelope.job_id} isn't among the dead letters of {self._queue!r} that are open here; read it again"
            raise LeveretError(msg)
        return letter

    def _forget(self, letter: Letter) -> None:
        letter.reader = None
        del self._store._dead[self._queue][letter.order]
        self._store._changed()

    async def replay(self, letter: DeadLetter, envelope: Envelope) -> None:
        with self._store._lock:
            own = self._check_open(letter)
            self._store._check_accepts(envelope, float("inf"))
            self._store._put(*sent(envelope, own.envelope.queue))
            self._forget(own)

    async def drop(self, letter: DeadLetter) -> None:
        with self._store._lock:
            self._forget(self._check_open(letter))

    async def __aexit__(self, *_: object) -> None:
        with self._store._lock:
            for letter in self._store._dead.get(self._queue, {}).values():
                if letter.reader is self:
                    letter.reader = None


@final
class MemoryAdmin:
    """An `Admin` on a `MemoryStore`, under `runtime`'s clock."""

    def __init__(self, store: MemoryStore, runtime: Runtime) -> None:
        self._store = store
        self._clock = runtime.clock

    async def depths(self, queues: Sequence[Queue]) -> list[Depth]:
        """As `Admin.depths`; a queue is there once something was published to it or consumes it."""
        with self._store._lock:
            self._store._promote(self._clock.monotonic())
            return [self._depth(queue.name) for queue in queues]

    def _depth(self, name: str) -> Depth:
        store = self._store
        levels = {
            level.value: len(line) for level, line in store._ready.get(name, {level: [] for level in LEVELS}).items()
        }
        return Depth(
            queue=name,
            ready=sum(levels.values()),
            levels=levels,
            unsettled=sum(
                1
                for consumption in store._consumptions
                for delivery in consumption._held
                if delivery.queue.name == name
            ),
            delayed=sum(1 for _, _, stored in store._delayed if stored.envelope.queue == name),
            dead=len(store._dead.get(name, ())),
            consumers=sum(1 for consumption in store._consumptions if name in consumption._names),
            exists=name in store._ready,
        )

    async def delayed(self) -> None:
        """As `Admin.delayed`: `depths` tells it."""

    async def purge(self, queue: Queue) -> int:
        """As `Admin.purge`."""
        with self._store._lock:
            self._store._promote(self._clock.monotonic())
            lines = self._store._ready.get(queue.name, {}).values()
            count = sum(map(len, lines))
            for line in lines:
                line.clear()
            self._store._changed()
        return count

    def dead(self, queue: Queue) -> AbstractAsyncContextManager[DeadLetters, None]:
        """As `Admin.dead`; letters that are buried while it is open aren't among them."""
        return _Letters(self._store, queue.name)

    async def close(self) -> None:
        """Nothing to end."""
