"""The memory broker under test; its own switch breaks it."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Unpack

import pytest

from leveret.brokers.memory import MemoryStore
from leveret.brokers.memory.store import memory_store
from leveret.job import Queue
from tests.contract.harness.base import Foreign, Harness


class MemoryHarness(Harness):
    """The memory broker, on a store with a unique name."""

    example = "memory://"

    @classmethod
    def make(cls, request: pytest.FixtureRequest, folder: Path) -> Harness:
        """Return a harness for one case."""
        return cls()

    def __init__(self) -> None:
        super().__init__(f"{self.example}{uuid.uuid4().hex}")
        self.store = self.open_store(self.url)

    def open_store(self, url: str) -> MemoryStore:
        """Return the store of `url`."""
        return memory_store(url)

    async def put(self, queue: Queue, body: bytes, **fields: Unpack[Foreign]) -> None:
        self.store.inject(queue.name, body, **fields)

    async def break_publishing(self) -> None:
        self.store.refuse()

    async def heal(self) -> None:
        self.store.accept()

    def cut(self) -> None:
        self.store.disconnect()


HARNESSES: dict[str, type[Harness]] = {"memory": MemoryHarness}
