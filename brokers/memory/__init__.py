"""`memory://`: the broker inside one process, for tests.

A job's path: `broker` puts the job into the `store`, and `consumption` takes it out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from leveret.admin import Admin
from leveret.runtime import Runtime

from .broker import MemoryBroker
from .store import MemoryStore, memory_store

if TYPE_CHECKING:
    from leveret.store import Store

__all__ = ["MemoryBroker", "MemoryStore", "open_admin", "open_broker", "open_store", "private_stores"]


def open_broker(url: str, runtime: Runtime) -> MemoryBroker:
    """Return a broker on the store of `url`."""
    return MemoryBroker(memory_store(url), runtime)


def open_admin(url: str, runtime: Runtime) -> Admin:
    """Return an admin on the store of `url`."""
    from .admin import MemoryAdmin

    return MemoryAdmin(memory_store(url), runtime)


def open_store(url: str, runtime: Runtime) -> Store:
    """Return a job store on the records of `url`."""
    from .jobs import MemoryJobs, memory_records

    return MemoryJobs(memory_records(url), url, runtime)


def private_stores(runtime: Runtime) -> Callable[[], Store]:
    """Return a function that opens job stores on records which only these stores share; for `leveret.testing`."""
    from .jobs import MemoryJobs, Records

    return partial(MemoryJobs, Records(), "memory://", runtime)
