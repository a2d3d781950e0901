"""`sqlite:///file.db`: a durable broker in one local file, for one host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leveret.admin import Admin
from leveret.broker import Broker
from leveret.runtime import Runtime

from .broker import SqliteBroker, path_of

if TYPE_CHECKING:
    from leveret.store import Store

__all__ = ["open_admin", "open_broker", "open_store"]


def open_broker(url: str, runtime: Runtime) -> Broker:
    """Return a broker on the file of `url`; the file is opened at first use."""
    return SqliteBroker(path_of(url), runtime)


def open_admin(url: str, runtime: Runtime) -> Admin:
    """Return an admin on the file of `url`; an admin never creates the file."""
    from .admin import SqliteAdmin

    return SqliteAdmin(path_of(url), runtime)


def open_store(url: str, runtime: Runtime) -> Store:
    """Return a job store in the file of `url`; the file is opened at first use."""
    from .jobs import SqliteJobs

    return SqliteJobs(path_of(url), url, runtime)
