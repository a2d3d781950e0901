"""A taker: a consumption or an admin that claims rows under a lease."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, final

from leveret.errors import ConfigurationError

from ..leases import Lease
from .delivery import SqliteDelivery, Window


class Listener(Protocol):
    """Notified, on the loop, of the events of a `Taker`."""

    def arrived(self, deliveries: Sequence[SqliteDelivery], /) -> None:
        """Called with newly claimed deliveries."""
        ...

    def lost(self) -> None:
        """Called when the lease was lost."""
        ...

    def changed(self) -> None:
        """Called when the taker's queues are consumed, and when they aren't any more."""
        ...

    def cannot(self, error: ConfigurationError, /) -> None:
        """Called when the file can't be used and waiting won't help."""
        ...


@final
class Taker:
    """A consumption with its windows, or an admin with open dead letters, and its lease."""

    __slots__ = ("lease", "listener", "ready", "taking", "windows")

    def __init__(self, windows: Iterable[Window], listener: Listener | None) -> None:
        self.lease = Lease()
        self.listener = listener
        self.windows = list(windows)
        self.taking = bool(self.windows)
        self.ready = False
