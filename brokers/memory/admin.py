"""Inspect and repair the queues of a `MemoryStore`: for the command line and for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import final

from leveret.admin import DeadLetter, DeadLetters, Depth
from leveret.envelope import Envelope
from leveret.errors import LeveretError
from leveret.job import LEVELS, Queue
from leveret.runtime import Runtime

from .store import Contents, Letter, MemoryStore, sent


@final
class _Letters:
    """The dead letters that existed when this reader was opened."""

    def __init__(self, contents: Contents, queue: str) -> None:
        self._contents = contents
        self._queue = queue
        self._last = 0

    async def __aenter__(self) -> _Letters:
        with self._contents.lock:
            self._last = next(self._contents.order)  # a job that is replayed and buried again is read only once
        return self

    async def __aiter__(self) -> AsyncIterator[DeadLetter]:
        while (letter := self._next()) is not None:
            yield letter

    def _next(self) -> Letter | None:
        with self._contents.lock:
            for letter in self._contents.dead.get(self._queue, {}).values():
                if letter.order < self._last and letter.reader is None:
                    letter.reader = self
                    return letter
        return None

    def _check_open(self, letter: DeadLetter) -> Letter:
        if not isinstance(letter, Letter) or letter.reader is not self:
            msg = f"job {letter.envelope.job_id} isn't one of the dead letters of queue {self._queue!r} that this reader holds; read it again"
            raise LeveretError(msg)
        return letter

    def _forget(self, letter: Letter) -> None:
        letter.reader = None
        del self._contents.dead[self._queue][letter.order]
        self._contents.changed()

    async def replay(self, letter: DeadLetter, envelope: Envelope) -> None:
        with self._contents.lock:
            own = self._check_open(letter)
            self._contents.check_accepts(envelope)
            self._contents.put(*sent(envelope, own.envelope.queue))
            self._forget(own)

    async def drop(self, letter: DeadLetter) -> None:
        with self._contents.lock:
            self._forget(self._check_open(letter))

    async def __aexit__(self, *_: object) -> None:
        with self._contents.lock:
            for letter in self._contents.dead.get(self._queue, {}).values():
                if letter.reader is self:
                    letter.reader = None


@final
class MemoryAdmin:
    """An `Admin` on a `MemoryStore`, using the clock of `runtime`."""

    def __init__(self, store: MemoryStore, runtime: Runtime) -> None:
        self._contents = store.contents
        self._clock = runtime.clock

    async def depths(self, queues: Sequence[Queue]) -> list[Depth]:
        """As `Admin.depths`; a queue exists once a job was published to it or a consumer subscribed to it."""
        with self._contents.lock:
            self._contents.promote(self._clock.monotonic())
            return [self._depth(queue.name) for queue in queues]

    def _depth(self, name: str) -> Depth:
        contents = self._contents
        levels = {
            level.value: len(line) for level, line in contents.ready.get(name, {level: [] for level in LEVELS}).items()
        }
        return Depth(
            queue=name,
            ready=sum(levels.values()),
            levels=levels,
            unsettled=sum(
                1
                for consumer in contents.consumers
                for stored in consumer.held.values()
                if stored.envelope.queue == name
            ),
            delayed=sum(1 for _, _, stored in contents.delayed if stored.envelope.queue == name),
            dead=len(contents.dead.get(name, ())),
            consumers=sum(1 for consumer in contents.consumers if name in consumer.names),
            exists=name in contents.ready,
        )

    async def delayed(self) -> None:
        """As `Admin.delayed`; returns None, since `depths` counts the delayed jobs of each queue."""

    async def notes(self) -> list[str]:
        """As `Admin.notes`; nothing is known that would slow it down."""
        return []

    async def purge(self, queue: Queue) -> int:
        """As `Admin.purge`."""
        with self._contents.lock:
            self._contents.promote(self._clock.monotonic())
            lines = self._contents.ready.get(queue.name, {}).values()
            count = sum(map(len, lines))
            for line in lines:
                line.clear()
            self._contents.changed()
        return count

    def dead(self, queue: Queue) -> AbstractAsyncContextManager[DeadLetters]:
        """As `Admin.dead`; jobs that are buried while the dead letters are open aren't read."""
        return _Letters(self._contents, queue.name)

    async def close(self) -> None:
        """Do nothing: an admin in memory holds no resources."""
