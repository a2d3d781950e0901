"""The options of `leveret work`, which go to the worker processes as JSON."""

from __future__ import annotations

import msgspec

from ..consuming.limits import COMMAND_LINE, Concurrency
from ..consuming.worker import GRACE_S


class WorkOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `leveret work`, and those that the supervisor adds."""

    app: str
    """module:attribute"""
    queues: dict[str, int | None] = {}
    """Queues, each with its concurrency or None; empty: every queue for which the app has a handler."""
    concurrency: int | None = None
    """Jobs at once per process, async and in threads each; None: as code or the environment say."""
    processes: int = 1
    grace_s: float = GRACE_S
    log_level: str = "info"
    reload: bool = False
    lifeline: int | None = None
    """A file descriptor that reads end-of-file when the supervisor has ended."""
    shared: int | None = None
    """A file descriptor of the memory that all workers share."""
    report: int | None = None
    """A file descriptor for the line of a configuration error; the supervisor prints the line once for all workers."""
    ignore_hangups: bool = False
    """Whether SIGHUP is ignored, as by the supervisor. uvloop starts a child with the default of every signal."""
    index: int = 0
    """The number of this process, from 0."""

    @property
    def number(self) -> int | None:
        """The number of this process for its log lines, if there are several."""
        return self.index if self.lifeline is not None and self.processes > 1 else None

    @property
    def limits(self) -> Concurrency:
        """The limits that the command line sets."""
        own = {name: limit for name, limit in self.queues.items() if limit is not None}
        return Concurrency(origin=COMMAND_LINE, process=self.concurrency, queues=own)
