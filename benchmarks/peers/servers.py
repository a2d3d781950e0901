"""What a server has to offer to be measured on. `on_<server>.py` has a class of each, and `start`, which returns one that runs."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

from benchmarks.peers.contestants import Contestant
from benchmarks.peers.harness import Refused

SETTLED_S = 15.0
"""How long a queue may take until it holds what it should."""


class Queue(ABC):
    """The jobs of one contestant, on one kind of queue. `url` is what the contestant gets."""

    def __init__(self, url: str, name: str) -> None:
        self.url = url
        self.name = name

    @abstractmethod
    def count(self) -> int:
        """Return how many jobs wait."""

    @abstractmethod
    def clear(self) -> None:
        """Begin a measurement without jobs."""

    @abstractmethod
    def fill(self, jobs: int, size: int = 200) -> None:
        """Put so many of the contestant's own jobs into the queue."""

    @abstractmethod
    def delete(self) -> None:
        """Delete what the contestant made."""

    def expect(self, expected: int) -> None:
        """Refuse unless the queue comes to hold exactly that many."""
        end = time.monotonic() + SETTLED_S
        while (found := self.count()) != expected:
            if time.monotonic() > end:
                msg = f"{self.name} holds {found} messages, not {expected}"
                raise Refused(msg)
            time.sleep(0.05)


class Running(ABC):
    """A server that runs: `url` is its own, and `ours` says whether it was started for this run."""

    def __init__(self, url: str, *, ours: bool) -> None:
        self.url = url
        self.ours = ours
        self._queues: dict[tuple[str, str], Queue] = {}

    @property
    @abstractmethod
    def version(self) -> str:
        """The server's version."""

    @abstractmethod
    def _queue(self, contestant: Contestant, kind: str) -> Queue:
        """Return a queue of this server."""

    @abstractmethod
    def _stop(self) -> None:
        """End the server if it was started for this run."""

    def queue(self, contestant: Contestant, kind: str) -> Queue:
        """Return the contestant's queue, the same each time."""
        key = contestant.name, kind
        if key not in self._queues:
            self._queues[key] = self._queue(contestant, kind)
        return self._queues[key]

    def close(self) -> None:
        """Delete all queues, and end the server."""
        try:
            for queue in self._queues.values():
                queue.delete()
        finally:
            self._stop()
