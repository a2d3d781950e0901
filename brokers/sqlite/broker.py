"""The embedded broker: one SQLite file, nothing to install. Publishers and several worker processes of one machine share the file.

A confirmed job is on the disk (`synchronous=FULL`): it survives the death of every process and of the machine. The file must be on
a local disk, since SQLite's locks don't work on network file systems.

- Each level is a separate line, oldest job first. A delayed job joins the end of its line when it is due by the wall clock.
- `again`, `bury` and a replay are one transaction with the settlement: neither a loss nor a duplicate is possible between the two.
- `give_back` keeps the job's place and doesn't count as a delivery, since the job wasn't started. Jobs that a consumption holds
  when it closes, or when its process dies, are delivered again as redelivered.
- The jobs of a dead process are delivered again within about a second if this machine's process table shows the death, and
  otherwise 15 to 20 seconds after the process's last beat (see `leases`).
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, final
from urllib.parse import unquote, urlsplit

from leveret.broker import Features, PublisherState, Sink, Subscription
from leveret.envelope import Envelope
from leveret.errors import ConfigurationError
from leveret.job import Queue
from leveret.runtime import Runtime
from leveret.settings import redact_url

from ..turns import Consumption
from .schema import MIN_SQLITE
from .store import Store

if TYPE_CHECKING:
    from leveret.store import Change, Progress
    from leveret.store import Store as JobStore

_FEATURES = Features(
    durable=True,
    shared=True,
    counts_redelivery=True,
    counts_crashes=True,
    connected=False,
    queue_type=None,
    keeps_order=True,
    keeps_place=True,
    window_per_level=True,
    deletable=False,
)
_SLASHES = "write three slashes before a relative path, four before an absolute path"


def path_of(url: str) -> str:
    """Return the absolute path in `url`, relative to the current folder; ConfigurationError if `url` has no path."""
    parts = urlsplit(url)
    path = unquote(parts.path.removeprefix("/"))
    problem = None
    if parts.netloc:
        problem = f"has a host: {_SLASHES}"
    elif not url.partition(":")[2].startswith("//"):
        problem = f"has too few slashes: {_SLASHES}"
    elif parts.query or parts.fragment:
        problem = "takes no options"
    elif not path or "\0" in path:
        problem = "names no file"
    elif path == ":memory:":
        problem = "names no file; for a broker in memory use memory://"
    if problem:
        msg = f"the broker's URL {redact_url(url)!r} {problem}; for example sqlite:///jobs.db or sqlite:////var/lib/shop/jobs.db"
        raise ConfigurationError(msg)
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        msg = f"this Python has SQLite {sqlite3.sqlite_version}; the SQLite broker needs {'.'.join(map(str, MIN_SQLITE))} or later"
        raise ConfigurationError(msg)
    try:
        return os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links
    except FileNotFoundError:
        msg = f"the broker's URL {redact_url(url)!r} is relative to the working directory, which was deleted; change to another one and start again"
        raise ConfigurationError(msg) from None


@final
class SqliteBroker:
    """A `Broker` on the SQLite file at `path`."""

    def __init__(self, path: str, runtime: Runtime) -> None:
        self._store = Store(path, runtime)
        self._turns = self._store.turns
        self._consumptions: list[Consumption] = []
        self.publish = self._turns.publish
        """As `Broker.publish`; every queue exists, so no job is unroutable."""

    def features(self, _: Queue | None = None, /) -> Features:
        """As `Broker.features`."""
        return _FEATURES

    def shares(self, store: JobStore, missed: Callable[[Change | Progress], object], /) -> bool:
        """As `Sharing.shares`: a store on the same path is in the same file."""
        from .jobs import SqliteJobs

        if not isinstance(store, SqliteJobs) or store.path != self._store.path:
            return False
        self._store.enter, self._turns.missed = store.enter, missed
        return True

    @property
    def publishing(self) -> PublisherState:
        """As `Broker.publishing`: blocked while the file is locked or can't be written, as far as a write has shown it."""
        return self._turns.publishing

    def post(self, queue: Queue, envelope: Envelope) -> None:
        """Return None: `publish` already writes concurrent publishes in one transaction."""

    async def consume(self, subscriptions: Sequence[Subscription], sink: Sink) -> Consumption:
        """As `Broker.consume`; if the file is locked, the call returns within a second, and the consumption goes on trying."""
        if self._turns.closed:
            msg = f"the broker on {self._turns.where} is closed; open a new one"
            raise ConfigurationError(msg)
        consumption = Consumption(self._turns, subscriptions, sink)
        await consumption.open()
        self._consumptions.append(consumption)
        return consumption

    async def close(self) -> None:
        """As `Broker.close`; takes at most about ten seconds."""
        consumptions, self._consumptions = self._consumptions, []
        try:
            await asyncio.gather(*(consumption.close() for consumption in consumptions))
        finally:
            await self._turns.close()
