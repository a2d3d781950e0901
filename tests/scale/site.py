"""A server, a database with leveret's tables, and the worker process on it, watched from outside."""

import re
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg

from leveret import Publisher
from tests.fault.apps.counting import Counting
from tests.fault.bench import Bench, Worker, eventually
from tests.postgres.node import Node, migrate

_BUSY_S = 3600.0
_CLAIM = re.compile(r"^(\S+) LOG: +duration: ([\d.]+) ms +execute [^:]+: SELECT \* FROM \S+\.claim\(")
_COLUMNS = (
    "created_s, level, queue, job_id, job, content_type, content_encoding, body, app, correlation_id, reply_to, headers"
)
_FIRST = 3  # claims of a new connection, which make the plans
PREFIX = "%d "
"""The server's log_line_prefix: the database."""


class Site:
    """One database, its queue, and the app that serves it."""

    def __init__(self, node: Node, url: str, folder: Path) -> None:
        folder.mkdir()
        self.node = node
        self.url = url
        self.bench = Bench(folder, url)
        self.counting = Counting(self.bench.recorder.plan)
        self.database = urlsplit(url).path[1:]

    async def execute(self, *statements: str) -> None:
        """Run statements that may take long, each by itself."""
        connection = await asyncpg.connect(self.url)
        try:
            for statement in statements:
                await connection.execute(statement, timeout=_BUSY_S)
        finally:
            await connection.close()

    async def fill(self, count: int) -> None:
        """Let `count` jobs wait, all as a publisher wrote them, on tables that have nothing to clear."""
        await self.execute("TRUNCATE leveret.jobs, leveret.claims")
        async with self.counting.app.publisher() as publisher:
            await publisher.publish(self.counting.Mail(time.monotonic()))
        values = _COLUMNS.replace("job_id", "job_id || n")
        await self.execute(
            f"INSERT INTO leveret.jobs ({_COLUMNS}) SELECT {values} FROM leveret.jobs, generate_series(2, {count}) n",
            "VACUUM leveret.jobs",
            "CHECKPOINT",
        )

    async def publish(self, publisher: Publisher, count: int) -> float:
        """Publish jobs as fast as it goes; return how many a second."""
        began = time.monotonic()
        await publisher.publish_many([self.counting.Mail(began) for _ in range(count)], timeout_s=_BUSY_S)
        return count / (time.monotonic() - began)

    @asynccontextmanager
    async def worker(self) -> AsyncGenerator[Worker]:
        """A worker process, which ends in order."""
        worker = self.bench.start(app="counting")
        await worker.says("takes jobs from")
        yield worker
        await worker.drained()

    async def until_runs(self, count: int, limit_s: float = _BUSY_S) -> None:
        """Wait until handlers have run `count` jobs in all."""
        await eventually(
            lambda: self.counting.runs >= count, lambda: f"{self.counting.runs} ran; {self.bench.logs}", limit_s
        )

    async def size_mib(self) -> float:
        """What leveret's tables take with their indexes, MiB."""
        sizes = "SELECT sum(pg_total_relation_size(relid))::float8 FROM pg_stat_all_tables WHERE schemaname = 'leveret'"
        [[size]] = await self.node.query(sizes, url=self.url)
        return float(size) / (1 << 20)

    async def dead_rows(self) -> int:
        """How many rows wait for a vacuum, as the server counts them."""
        dead = "SELECT sum(n_dead_tup)::bigint FROM pg_stat_all_tables WHERE schemaname = 'leveret'"
        [[count]] = await self.node.query(dead, url=self.url)
        return int(count)

    @asynccontextmanager
    async def claims(self, took_ms: list[float]) -> AsyncGenerator[None]:
        """Add to `took_ms` how long each claim but the first takes in the server meanwhile, as the server logs it."""
        await _set(self.node, "log_min_duration_statement", "0")
        begins = self.node.log.stat().st_size
        yield
        await _set(self.node, "log_min_duration_statement", "-1")
        with self.node.log.open(errors="replace") as log:
            log.seek(begins)
            found = (_CLAIM.match(line) for line in log)
            took_ms += [float(claim[2]) for claim in found if claim and claim[1] == self.database][_FIRST:]


async def _set(node: Node, name: str, value: str) -> None:
    await node.query(f"ALTER SYSTEM SET {name} TO '{value}'")
    await node.query("SELECT pg_reload_conf()")


@asynccontextmanager
async def site(node: Node, folder: Path) -> AsyncGenerator[Site]:
    """Make a database on the server, and drop it at the end."""
    async with node.database() as url:
        await migrate(url)
        made = Site(node, url, folder / urlsplit(url).path[1:])
        try:
            yield made
        finally:
            made.bench.close()
