"""The names of a queue's keys. All have the queue's name as their hash tag, so that one script may use them on a cluster too.

| Key, after `lv:{emails}:` | What it holds |
|---|---|
| `urgent`, `high`, `normal`, `low` | a list: the jobs of a level that wait, by number |
| `held:<worker>` | a hash: the jobs that a worker holds, by number |
| `read:<reader>` | a hash: the dead letters that a reader holds |
| `delayed` | a sorted set: jobs by the moment at which they are due, Unix ms of the server |
| `dead` | a sorted set: dead letters by number |
| `workers` | a hash: the terms of the leases of workers and readers, and their beats |
| `seq` | the last number of a job |
| `server` | the run id of the server that gave the last numbers |
| `idle` | is there if a worker waits for a notice |
| `news` | no key, but the channel of notices |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, final

from leveret.job import LEVELS

from .wire import Part, Script, Wire, packed_words

LEVEL_NUMBERS: Final = {level.value: number for number, level in enumerate(LEVELS, 1)}
"""The numbers of the levels, the most urgent first."""
LEVEL_NAMES: Final = {number: name for name, number in LEVEL_NUMBERS.items()}
"""The names of the levels by their numbers."""


@final
class Keys:
    """The keys of the queue `queue`."""

    def __init__(self, prefix: str, queue: str) -> None:
        self.base = f"{prefix}:{{{queue}}}:"
        self.news = f"{self.base}news".encode()
        """The channel of notices."""
        self.common = tuple(
            self.base + name for name in ("seq", "workers", "idle", "delayed", "dead", "news", *LEVEL_NUMBERS)
        )
        """The first keys of each script."""

    def __getitem__(self, name: str) -> str:
        return self.base + name

    async def evaluate(self, wire: Wire, script: Script, others: Sequence[str], *arguments: Part) -> Any:
        """Call a script with the common keys, then `others`."""
        names = (*self.common, *others)
        words = packed_words((len(names), *names, *arguments))
        return await wire.evaluate(script, words, 1 + len(names) + len(arguments))

    def held(self, worker: int) -> str:
        """Return the key of what a worker holds."""
        return f"{self.base}held:{worker}"

    def read(self, reader: int) -> str:
        """Return the key of what a reader of dead letters holds."""
        return f"{self.base}read:{reader}"
