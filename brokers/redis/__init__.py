"""`redis://…`: a broker on a Redis or Valkey that is already there; it says itself how durable it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hiredis as hiredis  # where it isn't installed, `schemes.broker_module` says what brings it

from leveret.admin import Admin
from leveret.broker import Broker
from leveret.runtime import Runtime

from .address import address_of

if TYPE_CHECKING:
    from leveret.store import Store

__all__ = ["open_admin", "open_broker", "open_store"]


def open_broker(url: str, runtime: Runtime) -> Broker:
    """Return a broker on the Redis of `url`, without connecting; ConfigurationError for a wrong URL."""
    from .broker import RedisBroker

    return RedisBroker(address_of(url), runtime)


def open_admin(url: str, runtime: Runtime) -> Admin:
    """Return an admin on the Redis of `url`, without connecting."""
    from .admin import RedisAdmin

    return RedisAdmin(address_of(url), runtime)


def open_store(url: str, runtime: Runtime) -> Store:
    """Return a job store on the server of `url`, without connecting; ConfigurationError for a wrong URL."""
    from .jobs import RedisJobs

    return RedisJobs(address_of(url), runtime)
