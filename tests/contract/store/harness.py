"""The stores under test, and the levers that break and heal them."""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from leveret.brokers.memory.jobs import Records, memory_records
from leveret.runtime import Runtime
from leveret.schemes import open_store
from leveret.settings import Settings
from leveret.store import Store
from tests.proxy import FaultProxy
from tests.redis.node import Cluster

PATIENCE_S = 15.0
"""How long a test waits for an event on a loaded machine, seconds; a passing test never waits this long."""


class StoreHarness(ABC):
    """The records of one test."""

    marks: ClassVar[tuple[pytest.MarkDecorator, ...]] = ()
    tells: ClassVar[bool]
    """Whether the store hears of others' ends, and calls who watches."""

    @classmethod
    @abstractmethod
    def make(cls, request: pytest.FixtureRequest, folder: Path) -> StoreHarness:
        """Return a harness for one test."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.opened: list[Store]

    async def start(self) -> None:
        """Make what the test needs before it opens a store."""
        self.opened = []

    def open(self, limit_s: float = PATIENCE_S) -> Store:
        """Return another store, whose calls end within `limit_s`."""
        runtime = Runtime(app="contract", settings=Settings(connect_timeout_s=limit_s))
        store = open_store(self.url, runtime)
        self.opened.append(store)
        return store

    @abstractmethod
    async def break_(self) -> None:
        """Let no store answer."""

    @abstractmethod
    async def heal(self) -> None:
        """Undo `break_`."""

    async def close(self) -> None:
        """Undo everything."""
        await self.heal()


class MemoryStoreHarness(StoreHarness):
    """Records in memory, under a unique name; their own switch breaks them."""

    tells = True
    example = "memory://"

    @classmethod
    def make(cls, request: pytest.FixtureRequest, folder: Path) -> StoreHarness:
        """Return a harness for one test."""
        return cls(f"{cls.example}{uuid4().hex}")

    @property
    def records(self) -> Records:
        """The records of the store."""
        return memory_records(self.url)

    async def break_(self) -> None:
        self.records.refuse()

    async def heal(self) -> None:
        self.records.accept()


class SqliteStoreHarness(StoreHarness):
    """A SQLite file; another connection's lock breaks it."""

    tells = True

    @classmethod
    def make(cls, request: pytest.FixtureRequest, folder: Path) -> StoreHarness:
        """Return a harness for one test."""
        return cls(f"sqlite:///{folder / 'jobs.db'}")

    _blocker: sqlite3.Connection | None = None

    async def break_(self) -> None:
        self._blocker = sqlite3.connect(self.url.removeprefix("sqlite:///"), timeout=PATIENCE_S, isolation_level=None)
        self._blocker.execute("BEGIN EXCLUSIVE")

    async def heal(self) -> None:
        if self._blocker is not None:
            self._blocker.close()
            self._blocker = None


class PostgresStoreHarness(StoreHarness):
    """A database behind a link that freezes."""

    marks = (pytest.mark.postgres,)
    tells = True
    options = ""

    @classmethod
    def make(cls, request: pytest.FixtureRequest, folder: Path) -> StoreHarness:
        """Return a harness for one test."""
        return cls(request.getfixturevalue("postgres_database"))

    async def start(self) -> None:
        """Make the link; stores that are opened later use it."""
        await super().start()
        self._link = await FaultProxy(urlsplit(self.url).port or 0).__aenter__()
        self.url = f"{self._link.url_of(self.url)}{self.options}"

    async def break_(self) -> None:
        self._link.freeze()

    async def heal(self) -> None:
        self._link.thaw()

    async def close(self) -> None:
        """Undo everything."""
        await super().close()
        await self._link.__aexit__(None, None, None)


class PooledStoreHarness(PostgresStoreHarness):
    """The same through PgBouncer."""

    tells = False
    options = "?prepared=off"

    @classmethod
    def make(cls, request: pytest.FixtureRequest, folder: Path) -> StoreHarness:
        """Return a harness for one test."""
        database = request.getfixturevalue("postgres_database")
        return cls(request.getfixturevalue("postgres_pooled").url_of(database))


class RedisStoreHarness(StoreHarness):
    """A Redis behind a link that freezes."""

    marks = (pytest.mark.redis,)
    tells = True

    @classmethod
    def make(cls, request: pytest.FixtureRequest, folder: Path) -> StoreHarness:
        """Return a harness for one test."""
        return cls(request.getfixturevalue("redis").url)

    async def start(self) -> None:
        """Make the link; stores that are opened later use it."""
        await super().start()
        parts = urlsplit(self.url)
        self._link = await FaultProxy(parts.port or 6379, host=parts.hostname or "127.0.0.1").__aenter__()
        self.url = self._link.url_of(self.url)

    async def break_(self) -> None:
        self._link.freeze()

    async def heal(self) -> None:
        self._link.thaw()

    async def close(self) -> None:
        """Undo everything."""
        await super().close()
        await self._link.__aexit__(None, None, None)


class RedisClusterStoreHarness(StoreHarness):
    """A cluster of three, whose processes hang."""

    marks = (pytest.mark.redis,)
    tells = True

    @classmethod
    def make(cls, request: pytest.FixtureRequest, folder: Path) -> StoreHarness:
        """Return a harness for one test."""
        return cls(request.getfixturevalue("redis_cluster"))

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster.url)
        self._cluster = cluster

    async def break_(self) -> None:
        for node in self._cluster.nodes:
            node.pause()

    async def heal(self) -> None:
        for node in self._cluster.nodes:
            node.resume()
