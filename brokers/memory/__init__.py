"""`memory://`: the broker inside one process, for tests.

A job's path: `broker` puts the job into the `store`, and `consumption` takes it out.
"""

from __future__ import annotations

from leveret.admin import Admin
from leveret.runtime import Runtime

from .broker import MemoryBroker
from .store import MemoryStore, memory_store

__all__ = ["MemoryBroker", "MemoryStore", "open_admin", "open_broker"]


def open_broker(url: str, runtime: Runtime) -> MemoryBroker:
    """Return a broker on the store of `url`."""
    return MemoryBroker(memory_store(url), runtime)


def open_admin(url: str, runtime: Runtime) -> Admin:
    """Return an admin on the store of `url`."""
    from .admin import MemoryAdmin

    return MemoryAdmin(memory_store(url), runtime)
