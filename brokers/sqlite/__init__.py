"""`sqlite:///file.db`: a durable broker in one local file, for one host."""

from __future__ import annotations

from leveret.admin import Admin
from leveret.broker import Broker
from leveret.runtime import Runtime

from .broker import SqliteBroker, path_of

__all__ = ["open_admin", "open_broker"]


def open_broker(url: str, runtime: Runtime) -> Broker:
    """Make a broker on the file that `url` names; nothing is opened before the first use."""
    return SqliteBroker(path_of(url), runtime)


def open_admin(url: str, runtime: Runtime) -> Admin:
    """Make an admin on the file that `url` names; it never makes the file."""
    from .admin import SqliteAdmin

    return SqliteAdmin(path_of(url), runtime)
