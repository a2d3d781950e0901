"""Inspect and repair the queues of a PostgreSQL schema, for the command line."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias, final

import asyncpg

from leveret.admin import DeadLetters, Depth
from leveret.job import Queue
from leveret.runtime import Runtime

from ..letters import PAGE, Letters
from ..rows import Row
from ..turns import Access, Taker
from .address import Address
from .schema import in_schema
from .statements import LEVEL_NAMES, READ, Statements, columns
from .store import Store

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

log = logging.getLogger("leveret.postgresql")

_PURGED_AT_ONCE = 5000
_LEVELS = f"ARRAY[{', '.join(map(str, LEVEL_NAMES))}]::smallint[]"

# By the number of the level: a name for each of ten million rows would take as long as to count them five times.
_READY = "SELECT level, count(*) FROM {schema}.jobs WHERE queue = $1 GROUP BY level"
# A lookup for each job that is held, and not a join, which may read the whole queue.
_HELD = (
    "SELECT j.level, count(*) FROM {schema}.claims c CROSS JOIN LATERAL (SELECT level FROM {schema}.jobs"  # noqa: S608
    f" WHERE queue = $1 AND level = ANY({_LEVELS}) AND seq = c.seq OFFSET 0) j WHERE c.worker IS NOT NULL GROUP BY j.level"
)
_DELAYED = (
    "SELECT level, due_ms <= extract(epoch FROM clock_timestamp()) * 1000, count(*)"
    " FROM {schema}.delayed WHERE queue = $1 GROUP BY 1, 2"
)
_DEAD = "SELECT count(*) FROM {schema}.dead WHERE queue = $1"
_KNOWN = "SELECT EXISTS (SELECT FROM {schema}.queues WHERE name = $1)"
# In the order of the index, and from behind the last batch: the rows of the batches before are still there, until a vacuum.
_PURGE = (
    "WITH free AS (SELECT j.ctid, j.level, j.seq FROM {schema}.jobs j"
    " WHERE j.queue = $1 AND (j.level, j.seq) > ($3::smallint, $4::bigint)"
    " AND (SELECT c.worker FROM {schema}.claims c WHERE c.seq = j.seq) IS NULL"
    " ORDER BY j.level, j.seq LIMIT $2 FOR UPDATE SKIP LOCKED),"
    " gone AS (DELETE FROM {schema}.claims WHERE ctid = ANY (ARRAY(SELECT c.ctid FROM free"
    " CROSS JOIN LATERAL (SELECT ctid FROM {schema}.claims WHERE seq = free.seq OFFSET 0) c))),"
    " deleted AS (DELETE FROM {schema}.jobs WHERE ctid = ANY (ARRAY(SELECT free.ctid FROM free)))"
    " SELECT count(*) OVER (), level, seq FROM free ORDER BY level DESC, seq DESC LIMIT 1"
)
_BY_INDEX = (
    "SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL plan_cache_mode = force_generic_plan"
)
_START = (0, 0)
_PAGE_OF_DEAD = (
    "WITH page AS (SELECT seq FROM {schema}.dead WHERE queue = $2 AND reader IS NULL AND seq > $3 AND seq <= $4"  # noqa: S608 - columns of ours
    " ORDER BY seq LIMIT $5 FOR UPDATE SKIP LOCKED)"
    " UPDATE {schema}.dead d SET reader = $1 FROM page WHERE d.queue = $2 AND d.seq = page.seq"
    f" RETURNING d.seq, {READ.replace('queue', 'd.queue', 1)}"
)
# A vacuum keeps each row that the oldest snapshot may see. Only those of this database count, and those without one: slots and standbys.
HORIZON = """
SELECT format('process %s (%s of user %s, %s)', pid, coalesce(nullif(application_name, ''), 'a program'), usename, state), xact_start
FROM pg_stat_activity
WHERE datname = current_database() AND backend_xmin IS NOT NULL AND xact_start < now() - interval '1 minute' AND backend_type = 'client backend'
UNION ALL
SELECT format('the prepared transaction %L of user %s', gid, owner), prepared
FROM pg_prepared_xacts WHERE database = current_database() AND prepared < now() - interval '1 minute'
UNION ALL
SELECT format('the replication slot %L%s, %s transactions behind', slot_name, CASE WHEN active THEN '' ELSE ' (which nobody uses)' END, age(xmin)), NULL
FROM pg_replication_slots WHERE xmin IS NOT NULL AND age(xmin) > 10000
UNION ALL
SELECT format('the standby %s, which feeds its snapshots back', coalesce(nullif(application_name, ''), client_addr::text)), NULL
FROM pg_stat_replication WHERE backend_xmin IS NOT NULL AND age(backend_xmin) > 10000
ORDER BY 2 NULLS LAST LIMIT 5
"""
_ROWS_KEPT = "SELECT sum(n_dead_tup)::bigint FROM pg_stat_all_tables WHERE schemaname = $1"
_LAST_DEAD = "SELECT coalesce(max(seq), 0) FROM {schema}.dead WHERE queue = $1"
_TAKE_DEAD = "DELETE FROM {schema}.dead WHERE queue = $1 AND seq = $2 AND reader = $3"


@final
class _Letters(Letters):
    """The dead letters of one queue, claimed page by page under a separate lease."""

    store = "the PostgreSQL broker"

    def __init__(self, admin: PostgresAdmin, queue: Queue, taker: Taker) -> None:
        super().__init__(queue.name)
        self._admin = admin
        self._taker = taker

    async def _last(self) -> int:
        async def read(connection: Connection) -> int:
            found: int = await connection.fetchval(self._admin.sql(_LAST_DEAD), self.queue)
            return found

        last: int = await self._admin.access.run("the dead letters", read)
        return last

    async def _page(self, seen: int, last: int) -> list[asyncpg.Record]:
        async def claim(connection: Connection) -> list[asyncpg.Record]:
            reader = self._taker.lease.id
            rows = await connection.fetch(self._admin.sql(_PAGE_OF_DEAD), reader, self.queue, seen, last, PAGE)
            return sorted(rows, key=lambda row: int(row[0]))

        page: list[asyncpg.Record] = await self._admin.access.run("the dead letters", claim)
        return page

    async def _take(self, seq: int, about: str, job: Row | None) -> bool:
        admin = self._admin

        async def take(connection: Connection) -> bool:
            taken = await connection.execute(admin.sql(_TAKE_DEAD), self.queue, seq, self._taker.lease.id)
            if taken != "DELETE 1":
                return False
            if job is not None:
                await connection.execute(admin.statements.add_jobs, *columns([job], 0.0))
            return True

        taken: bool = await admin.access.run(about, take)
        return taken


@final
class PostgresAdmin:
    """An `Admin` on the schema at `address`.

    Every call ends within the setting `connect_timeout_s`: BrokerUnavailable if the tables stay locked, and at once if no server can be
    reached.
    """

    def __init__(self, address: Address, runtime: Runtime) -> None:
        self._address = address
        self._store = Store(address, runtime, name="leveret admin", patient=False)
        self.access = Access(self._store.turns, runtime, log)
        self.statements = Statements(address.schema)

    def sql(self, text: str) -> str:
        """Return a statement for the schema."""
        return in_schema(self._address.schema, text)

    async def depths(self, queues: Sequence[Queue]) -> list[Depth]:
        """As `Admin.depths`; no lock of a row stops the read. The jobs of a dead worker count as unsettled until another worker runs."""

        async def read(connection: Connection) -> list[Depth]:
            return [await self._read(connection, queue) for queue in queues]

        rows: list[Depth] = await self.access.look("the read of the queues", read)
        return rows

    async def _read(self, connection: Connection, queue: Queue) -> Depth:
        async def count(statement: str) -> int:
            found: int = await connection.fetchval(self.sql(statement), queue.name)
            return found

        levels = {level.value: 0 for level in queue.levels}
        levels |= {LEVEL_NAMES[row[0]]: row[1] for row in await connection.fetch(self.sql(_READY), queue.name)}
        held = {LEVEL_NAMES[row[0]]: row[1] for row in await connection.fetch(self.sql(_HELD), queue.name)}
        for level, jobs in held.items():
            levels[level] -= jobs
        delayed = 0
        for number, due, jobs in await connection.fetch(self.sql(_DELAYED), queue.name):
            if due:
                level = LEVEL_NAMES[number]
                levels[level] = levels.get(level, 0) + jobs
            else:
                delayed += jobs
        dead, known = await count(_DEAD), await count(_KNOWN)
        return Depth(
            queue=queue.name,
            ready=sum(levels.values()),
            levels=levels,
            unsettled=sum(held.values()),
            delayed=delayed,
            dead=dead,
            consumers=None,
            exists=bool(known or delayed or dead or held or any(levels.values())),
        )

    async def delayed(self) -> None:
        """As `Admin.delayed`; returns None, since `depths` counts the delayed jobs of each queue."""

    async def notes(self) -> list[str]:
        """As `Admin.notes`: who keeps the vacuum from removing the rows of finished jobs, and since when."""

        async def read(connection: Connection) -> list[str]:
            holders = await connection.fetch(HORIZON)
            kept: int = await connection.fetchval(_ROWS_KEPT, self._address.schema) or 0
            return [
                f"vacuum can't remove the rows of finished jobs (now {kept}) because of {who}"
                + (f", since {since:%Y-%m-%d %H:%M:%S} UTC" if since is not None else "")
                for who, since in holders
            ]

        notes: list[str] = await self.access.look("the read of what holds vacuum back", read)
        return notes

    async def purge(self, queue: Queue) -> int:
        """As `Admin.purge`, some thousands of jobs per transaction, so that workers get their turns in between."""
        behind = _START

        async def delete(connection: Connection) -> tuple[int, int, int]:
            await connection.execute(self.statements.move_due, _PURGED_AT_ONCE)
            await connection.execute(_BY_INDEX)
            last = await connection.fetchrow(self.sql(_PURGE), queue.name, _PURGED_AT_ONCE, *behind)
            return (0, *_START) if last is None else (last[0], last[1], last[2])

        purged = 0
        while True:
            deleted: tuple[int, int, int] = await self.access.run(f"the purge of queue {queue.name!r}", delete)
            count, level, seq = deleted
            purged += count
            if count == _PURGED_AT_ONCE:
                behind = (level, seq)
            elif behind == _START:
                return purged
            else:  # once more: jobs fell due, or were freed, behind the batches before
                behind = _START

    @asynccontextmanager
    async def dead(self, queue: Queue) -> AsyncGenerator[DeadLetters]:
        """As `Admin.dead`; if this process dies, its letters are free again as the jobs of a dead worker are."""
        async with self.access.reader(queue) as taker:
            yield _Letters(self, queue, taker)

    async def close(self) -> None:
        """As `Admin.close`."""
        await self._store.close()
