"""What `leveret work` was told; it travels to the worker processes as JSON."""

from __future__ import annotations

import msgspec

from ..consuming.slots import Limits
from ..consuming.worker import GRACE_S


class WorkOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `leveret work`, and what its supervisor adds."""

    app: str
    """module:attribute"""
    queues: dict[str, int | None] = {}
    """Queue and its own concurrency; none: every queue that the app has a handler for."""
    concurrency: int | None = None
    """Handlers at once in a process; None: 100 async and 8 threads, else so many of both."""
    processes: int = 1
    grace_s: float = GRACE_S
    log_level: str = "info"
    reload: bool = False
    lifeline: int | None = None
    """A file descriptor that reads end-of-file once the supervisor is gone."""
    report: int | None = None
    """A file descriptor for the line that says what is configured wrong; the supervisor prints it, once for all workers."""
    index: int = 0
    """Which of the processes this is."""

    @property
    def limits(self) -> Limits:
        """The concurrency of one process."""
        own = {name: limit for name, limit in self.queues.items() if limit is not None}
        if self.concurrency is None:
            most = max([100, *own.values()])
            return Limits(concurrency=most, queues=own)
        return Limits(concurrency=self.concurrency, threads=self.concurrency, queues=own)
