"""The kinds of write: what a turn is made of."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, final

import msgspec

from leveret.errors import LeveretError, PublishError

from ..rows import BODY, JOB_ID, Row

if TYPE_CHECKING:
    from leveret.store import Change, Progress

    from .claimed import Claimed
    from .takers import Taker

PENDING, TAKEN, OVER = range(3)
"""The states of a `Write`: it can still be cancelled; it is in a transaction; its future has ended."""

Call: TypeAlias = Callable[[Any], Any]
"""Statements of a store: called with what the store's driver gives, a connection for example."""


class Write(msgspec.Struct, eq=False, kw_only=True):
    """One thing to do, all or nothing, and the future for its result."""

    about: str
    """What is written, for messages: "job … for queue 'emails'"."""
    deadline: float = math.inf
    future: asyncio.Future[Any] | None = None
    result: Any = None
    """The result of the future, after the commit."""
    state: int = PENDING

    @property
    def job_id(self) -> str | None:
        """The id of the job, if the write adds a row."""
        return None

    @property
    def size(self) -> int:
        """The size of the body, in bytes."""
        return 0

    @property
    def awaited(self) -> bool:
        """Whether somebody wants to hear of the end."""
        return self.future is not None

    @property
    def ended(self) -> bool:
        """Whether nobody waits for the end any more."""
        return self.future is None or self.future.done()

    def answer(self) -> None:
        """End the future, if any, with the result. On the loop, as `refuse`."""
        if self.future is not None and not self.future.done():
            self.future.set_result(self.result)

    def refuse(self, error: LeveretError) -> None:
        """End the future, if any, with `error`."""
        if self.future is not None and not self.future.done():
            self.future.set_exception(error)


class _Addition(Write):
    row: Row

    @property
    def job_id(self) -> str:
        return self.row[JOB_ID]

    @property
    def size(self) -> int:
        return len(self.row[BODY])


class Publish(_Addition):
    """Adds a job."""


@final
class Posted(Publish):
    """A publish that nobody may ever wait for; see `leveret.broker.Posted`."""

    posts: dict[Posted, None]
    """The posts that haven't ended; an ended one leaves them."""
    failure: PublishError | None = None

    @property
    def awaited(self) -> bool:
        """True: somebody asks for the error in the end."""
        return True

    @property
    def ended(self) -> bool:
        """Whether the job is confirmed or has failed."""
        return self not in self.posts

    def answer(self) -> None:
        """End the publish: the job is confirmed."""
        self.posts.pop(self, None)
        super().answer()

    def refuse(self, error: LeveretError) -> None:
        """End the publish with `error`."""
        if not self.ended:
            assert isinstance(error, PublishError)
            self.failure = error
            self.answer()

    async def wait(self) -> None:
        """Wait until the publish has ended."""
        if not self.ended:
            self.future = asyncio.get_running_loop().create_future()
            await self.future

    def error(self) -> PublishError | None:
        """Return the error of the ended publish; None if the job is confirmed."""
        return self.failure


@final
class Again(_Addition):
    """Settles a delivery and adds the job of its next attempt."""

    delivery: Claimed
    changes: Sequence[Change | Progress] = ()
    """What the job store hears of it."""


@final
class Bury(_Addition):
    """Settles a delivery and adds a dead letter."""

    delivery: Claimed
    changes: Sequence[Change | Progress] = ()
    """What the job store hears of it."""


@final
class End(Write):
    """Settles a delivery whose job has ended, and enters the end into the job store. Tried until it succeeds; nobody waits for it."""

    delivery: Claimed
    changes: Sequence[Change | Progress]
    late: bool = False
    """Whether the delivery's lease was lost before."""

    @property
    def size(self) -> int:
        """The size of the result, in bytes."""
        return len(getattr(self.changes[-1], "result", None) or b"")  # progress is before it

    def answer(self) -> None:
        """Hand the changes over, if they aren't in the store."""
        if self.late:
            self._missed()

    def refuse(self, error: LeveretError) -> None:  # noqa: ARG002 - whatever it is
        """Hand the changes over, and settle the delivery without them: they may be what the store refuses."""
        self._missed()
        self.delivery.changes = ()
        self.delivery.window.turns.done(self.delivery)

    def _missed(self) -> None:
        for each in self.changes:
            self.delivery.window.turns.missed(each)


@final
class Begin(Write):
    """Notes that the job of a delivery begins; the result is whether its row is still claimed under the delivery's lease."""

    delivery: Claimed


@final
class Open(Write):
    """Gets a lease for a taker."""

    taker: Taker


@final
class Close(Write):
    """Frees the rows that a taker holds, and deletes its lease."""

    taker: Taker


@final
class Run(Write):
    """Runs any statements in a turn; the result is what `call` returns."""

    call: Call


@final
class Look(Write):
    """Reads in a separate transaction, which no lock of a writer stops; it isn't part of a turn."""

    call: Call
