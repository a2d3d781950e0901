"""`postgresql://…`: a durable broker in a database that is already there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leveret.admin import Admin, OutboxAdmin
from leveret.broker import Broker
from leveret.migrator import Migrator
from leveret.outbox import Outbox
from leveret.runtime import Runtime

from .address import address_of

if TYPE_CHECKING:
    from leveret.store import Store

__all__ = ["open_admin", "open_broker", "open_migrator", "open_outbox", "open_outbox_admin", "open_store"]


def open_broker(url: str, runtime: Runtime) -> Broker:
    """Return a broker on the database of `url`, without connecting; ConfigurationError for a wrong URL."""
    from .broker import PostgresBroker

    return PostgresBroker(address_of(url), runtime)


def open_admin(url: str, runtime: Runtime) -> Admin:
    """Return an admin on the database of `url`, without connecting."""
    from .admin import PostgresAdmin

    return PostgresAdmin(address_of(url), runtime)


def open_outbox(url: str, runtime: Runtime) -> Outbox:
    """Return the outbox in the database of `url`, without connecting; ConfigurationError for a wrong URL."""
    from .outbox import PostgresOutbox

    return PostgresOutbox(address_of(url), runtime)


def open_outbox_admin(url: str, runtime: Runtime) -> OutboxAdmin:
    """Return the admin of the outbox in the database of `url`, without connecting."""
    from .outbox_admin import PostgresOutboxAdmin

    return PostgresOutboxAdmin(address_of(url), runtime)


def open_migrator(url: str, runtime: Runtime) -> Migrator:
    """Return what makes and upgrades the tables of the database of `url`, without connecting."""
    from .migrator import PostgresMigrator

    return PostgresMigrator(address_of(url), runtime)


def open_store(url: str, runtime: Runtime) -> Store:
    """Return a job store in the database of `url`, without connecting; ConfigurationError for a wrong URL."""
    from .jobs import PostgresJobs

    return PostgresJobs(address_of(url), runtime)
