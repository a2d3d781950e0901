"""`postgresql://…`: a durable broker in a database that is already there."""

from __future__ import annotations

from leveret.migrator import Migrator
from leveret.runtime import Runtime

from .address import address_of
from .migrator import PostgresMigrator

__all__ = ["open_migrator"]


def open_migrator(url: str, runtime: Runtime) -> Migrator:
    """Return what makes and upgrades the tables of the database of `url`, without connecting."""
    return PostgresMigrator(address_of(url), runtime)
