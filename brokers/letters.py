"""The dead letters of a queue, as the admin of a store reads them: page by page, and taken out one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, ClassVar, Final, final

from leveret.admin import DeadLetter
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable

from .rows import Row, packed, unpack

PAGE: Final = 100
"""At most this many letters are in a page."""


@final
class Letter:
    """A dead letter, as an admin hands it out."""

    __slots__ = ("envelope", "seq", "store")

    def __init__(self, store: str, seq: int, envelope: Envelope) -> None:
        self.store = store
        self.seq = seq
        self.envelope = envelope

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.envelope.job_id


class Letters(ABC):
    """Implements `DeadLetters`; a store reads and takes out its letters by its own statements."""

    store: ClassVar[str]
    """Whose letters these are, for messages: "the SQLite broker". No other admin takes them."""
    gone: ClassVar[str] = "this reader no longer holds the dead letter; read it again"
    """Why a letter couldn't be taken out."""

    def __init__(self, queue: str) -> None:
        self.queue = queue

    def __aiter__(self) -> AsyncIterator[DeadLetter]:
        """As `DeadLetters`. Jobs buried later aren't read: a replay that fails at once would be read again and again."""
        return self._pages()

    async def _pages(self) -> AsyncIterator[DeadLetter]:
        seen, last = 0, await self._last()
        while seen < last and (page := await self._page(seen, last)):
            for seq, *row in page:
                yield Letter(self.store, seq, unpack(row)[0])
                if seq <= last:  # a letter of a foreign producer may get its number only now
                    seen = seq

    async def replay(self, letter: DeadLetter, envelope: Envelope) -> None:
        """As `DeadLetters.replay`, at once or not at all. BrokerUnavailable if the letter is gone; then nothing is published."""
        await self._out(letter, f"the replay of job {envelope.job_id}", packed(letter.envelope.queue, envelope, None))

    async def drop(self, letter: DeadLetter) -> None:
        """As `DeadLetters.drop`."""
        await self._out(letter, f"the drop of job {letter.envelope.job_id}", None)

    async def _out(self, letter: DeadLetter, about: str, job: Row | None) -> None:
        if not isinstance(letter, Letter) or letter.store != self.store:
            msg = f"replay() and drop() take a dead letter of {self.store}, not {letter!r}"
            raise TypeError(msg)
        if not await self._take(letter.seq, about, job):
            msg = f"{about} wasn't done: {self.gone}"
            raise BrokerUnavailable(msg, job_id=letter.job_id)

    @abstractmethod
    async def _last(self) -> int:
        """Return the number of the last letter, or a higher one; 0 if there are none."""

    @abstractmethod
    async def _page(self, seen: int, last: int) -> Sequence[Iterable[Any]]:
        """Return the next letters behind the number `seen`, up to `last`, in their order: the number and `COLUMNS` of each."""

    @abstractmethod
    async def _take(self, seq: int, about: str, job: Row | None) -> bool:
        """Delete a letter and add `job`, if it isn't None, in one transaction; return False if the letter is gone."""
