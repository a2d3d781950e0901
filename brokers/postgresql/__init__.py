"""`postgresql://…`: a durable broker in a database that is already there."""

from __future__ import annotations

from leveret.admin import Admin
from leveret.broker import Broker
from leveret.migrator import Migrator
from leveret.runtime import Runtime

from .address import address_of

__all__ = ["open_admin", "open_broker", "open_migrator"]


def open_broker(url: str, runtime: Runtime) -> Broker:
    """Return a broker on the database of `url`, without connecting; ConfigurationError for a wrong URL."""
    from .broker import PostgresBroker

    return PostgresBroker(address_of(url), runtime)


def open_admin(url: str, runtime: Runtime) -> Admin:
    """Return an admin on the database of `url`, without connecting."""
    from .admin import PostgresAdmin

    return PostgresAdmin(address_of(url), runtime)


def open_migrator(url: str, runtime: Runtime) -> Migrator:
    """Return what makes and upgrades the tables of the database of `url`, without connecting."""
    from .migrator import PostgresMigrator

    return PostgresMigrator(address_of(url), runtime)
