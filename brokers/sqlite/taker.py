"""A taker: somebody who claims rows under a lease, through windows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, final

from leveret.errors import ConfigurationError

from .delivery import SqliteDelivery, Window
from .lease import Lease


class Listener(Protocol):
    """Who hears, on the loop, what becomes of a `Taker`."""

    def arrived(self, deliveries: Sequence[SqliteDelivery], /) -> None:
        """These were claimed."""
        ...

    def lost(self) -> None:
        """The lease was lost."""
        ...

    def cannot(self, error: ConfigurationError, /) -> None:
        """It was given up for good."""
        ...


@final
class Taker:
    """Somebody with a lease: a consumption with its windows, or an admin with dead letters open."""

    __slots__ = ("lease", "listener", "ready", "taking", "windows")

    def __init__(self, windows: Iterable[Window], listener: Listener | None) -> None:
        self.lease = Lease()
        self.listener = listener
        self.windows = list(windows)
        self.taking = bool(self.windows)
        self.ready = False
