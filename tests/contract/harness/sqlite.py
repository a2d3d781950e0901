"""A SQLite file under test; another connection's exclusive lock breaks it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Unpack

import pytest

from leveret.envelope import JSON
from leveret.ids import new_job_id
from leveret.job import Queue
from tests.contract.harness.base import PATIENCE_S, Foreign, Harness


class SqliteHarness(Harness):
    """A SQLite file; another connection's exclusive lock breaks it."""

    example = "sqlite:///jobs.db"

    @classmethod
    def make(cls, request: pytest.FixtureRequest, folder: Path) -> Harness:
        """Return a harness for one case."""
        return cls(folder / "jobs.db")

    def __init__(self, path: Path) -> None:
        super().__init__(f"sqlite:///{path}")
        self.path = path
        self._blocker: sqlite3.Connection | None = None

    async def put(self, queue: Queue, body: bytes, **fields: Unpack[Foreign]) -> None:
        from leveret.brokers.rows import headers_text

        with closing(sqlite3.connect(self.path, timeout=PATIENCE_S)) as connection, connection:
            connection.execute(
                "INSERT INTO jobs (queue, level, job_id, job, content_type, content_encoding, body, created_s, headers)"
                " VALUES (?, 'normal', ?, ?, ?, ?, ?, 0, ?)",
                (
                    queue.name,
                    fields.get("job_id") or new_job_id(),
                    fields.get("job", ""),
                    fields.get("content_type", JSON),
                    fields.get("content_encoding"),
                    body,
                    headers_text(fields.get("headers") or {}),
                ),
            )

    async def break_publishing(self) -> None:
        blocker = sqlite3.connect(self.path, timeout=PATIENCE_S, isolation_level=None)
        blocker.execute("BEGIN EXCLUSIVE")
        self._blocker = blocker

    async def heal(self) -> None:
        if self._blocker is not None:
            self._blocker.execute("ROLLBACK")
            self._blocker.close()
            self._blocker = None

    def cut(self) -> None:
        with closing(sqlite3.connect(self.path, timeout=PATIENCE_S)) as connection, connection:
            connection.execute("UPDATE jobs SET claimed_by = NULL")
            connection.execute("DELETE FROM workers")


HARNESSES: dict[str, type[Harness]] = {"sqlite": SqliteHarness}
