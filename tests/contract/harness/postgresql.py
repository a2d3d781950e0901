"""A PostgreSQL under test, direct or through PgBouncer; a lock of another connection breaks it, or a link that can freeze."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Unpack
from urllib.parse import urlsplit

import asyncpg
import pytest

from leveret.envelope import JSON
from leveret.ids import new_job_id
from leveret.job import Queue
from tests.contract.harness.base import Foreign, Harness
from tests.proxy import FaultProxy


class PostgresHarness(Harness):
    """A database; a lock that another connection holds on its tables breaks it."""

    example = "postgresql://localhost/shop"
    marks = (pytest.mark.postgres,)

    @classmethod
    def make(cls, request: pytest.FixtureRequest, folder: Path) -> Harness:
        """Return a harness for one case."""
        return cls(request.getfixturevalue("postgres_database"))

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.direct_url = url
        self._blocker: asyncpg.Connection[asyncpg.Record] | None = None

    async def _query(self, sql: str, *arguments: Any) -> list[asyncpg.Record]:
        connection = await asyncpg.connect(self.direct_url, timeout=30)
        try:
            return await connection.fetch(sql, *arguments)
        finally:
            await connection.close(timeout=5)

    async def put(self, queue: Queue, body: bytes, **fields: Unpack[Foreign]) -> None:
        from leveret.brokers.rows import headers_text

        await self._query(
            "INSERT INTO leveret.jobs (queue, job_id, job, content_type, content_encoding, body, created_s, headers)"
            " VALUES ($1, $2, $3, $4, $5, $6, 0, $7)",
            queue.name,
            fields.get("job_id") or new_job_id(),
            fields.get("job", ""),
            fields.get("content_type", JSON),
            fields.get("content_encoding"),
            body,
            headers_text(fields.get("headers") or {}),
        )

    async def break_publishing(self) -> None:
        blocker = await asyncpg.connect(self.direct_url, timeout=30)
        await blocker.execute("BEGIN; LOCK TABLE leveret.jobs, leveret.delayed, leveret.dead IN EXCLUSIVE MODE")
        self._blocker = blocker

    async def heal(self) -> None:
        if self._blocker is not None:
            await self._blocker.close(timeout=5)
            self._blocker = None

    def cut(self) -> None:
        # in a thread, since a worker must not go on meanwhile
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, self._cut()).result()

    async def _cut(self) -> None:
        """Kill all backends but this one, and end all leases, as another worker does with the lease of a silent one."""
        await self._query(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        await self._query("SELECT leveret.release(id, true) FROM leveret.workers")


class PooledHarness(PostgresHarness):
    """The same through PgBouncer, behind a link that can freeze."""

    @classmethod
    def make(cls, request: pytest.FixtureRequest, folder: Path) -> Harness:
        """Return a harness for one case."""
        harness = super().make(request, folder)
        assert isinstance(harness, cls)
        harness.pooled_url = request.getfixturevalue("postgres_pooled").url_of(harness.direct_url)
        return harness

    pooled_url: str
    prepared: ClassVar[str] = "off"
    _link: FaultProxy | None = None

    async def start(self) -> None:
        """Make the link; brokers that are opened later use it."""
        self._link = await FaultProxy(urlsplit(self.pooled_url).port or 0).__aenter__()
        self.url = f"{self._link.url_of(self.pooled_url)}?prepared={self.prepared}"

    async def break_publishing(self) -> None:
        assert self._link is not None
        self._link.freeze()

    async def heal(self) -> None:
        if self._link is not None:
            self._link.thaw()

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            if self._link is not None:
                await self._link.__aexit__(None, None, None)


HARNESSES: dict[str, type[Harness]] = {"postgresql": PostgresHarness, "postgresql-pgbouncer": PooledHarness}
