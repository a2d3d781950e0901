"""A route: where a publish goes, and what must have been declared for it."""

from __future__ import annotations

import msgspec

from leveret.job import Queue


class Route(msgspec.Struct, frozen=True, eq=False):
    """Where a publish goes, and what must have been declared for it."""

    exchange: str
    key: str
    priority: int | None
    queue: Queue | None
    ladder: str | None
    dead: str | None = None
    """The dead-letter queue it is meant for, for errors."""
    kept: bool = False
    """Whether it is made once and used for every publish to its place."""

    @property
    def lane(self) -> str:
        """What stands for the queue that it comes to first, in which it may be stuck."""
        return self.key if self.ladder is None else self.exchange

    @property
    def target(self) -> str:
        """The queue, for people."""
        return self.dead or (self.queue.name if self.queue is not None else self.key)
