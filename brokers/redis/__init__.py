"""`redis://…`: a broker on a Redis or Valkey that is already there; it says itself how durable it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leveret.runtime import Runtime

from .address import address_of

if TYPE_CHECKING:
    from leveret.store import Store

__all__ = ["open_store"]


def open_store(url: str, runtime: Runtime) -> Store:
    """Return a job store on the server of `url`, without connecting; ConfigurationError for a wrong URL."""
    from .jobs import RedisJobs

    return RedisJobs(address_of(url), runtime)
