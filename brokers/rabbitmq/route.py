"""A route: the exchange and key of a publish, and the topology that must be declared first."""

from __future__ import annotations

import msgspec

from leveret.job import Queue

from .topology import Ladder


class Route(msgspec.Struct, frozen=True, eq=False):
    """The exchange and key of a publish, and the queue and ladder that must be declared first."""

    exchange: str
    key: str
    priority: int | None
    queue: Queue | None
    ladder: Ladder | None
    ends_at: str | None = None
    """The queue that the route leads to, if it isn't `queue`: a queue of dead letters, or a queue that needn't be declared."""
    due_in: str | None = None
    """The physical queue that a delayed job reaches when it is due; None without a delay."""
    kept: bool = False
    """Whether the route is made once and used for every publish to its level."""

    @property
    def lane(self) -> str:
        """The key or exchange of the first queue on the route, where a publish may get stuck."""
        return self.key if self.ladder is None else self.exchange

    @property
    def target(self) -> str:
        """The name of the target queue, for messages."""
        return self.ends_at or (self.queue.name if self.queue is not None else self.key)
