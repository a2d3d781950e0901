"""PostgreSQL: a database for each contestant, new for each measurement, filled by the contestant itself."""

from __future__ import annotations

import asyncio
import re
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from benchmarks.peers.contestants import Contestant, queue
from benchmarks.peers.harness import prepare, publish
from benchmarks.peers.servers import Queue, Running
from tests.postgres.node import Node, Postgres, find_postgres


class Database(Queue):
    """A contestant's database: a copy of one in which only its tables were made."""

    def __init__(self, server: Postgres, contestant: Contestant, kind: str) -> None:
        name = re.sub(r"\W", "_", queue(contestant, kind))
        super().__init__(self._at(server, name), name)
        self._server = server
        self._contestant = contestant
        self._kind = kind
        self._made = ""

    @staticmethod
    def _at(server: Postgres, name: str) -> str:
        return urlsplit(server.url)._replace(path=f"/{name}").geturl()

    def _query(self, sql: str, *, inside: bool = False) -> list[Any]:
        return asyncio.run(self._server.query(sql, url=self.url if inside else None))

    def count(self) -> int:
        """As `Queue.count`: waiting and held jobs, so that 0 shows that each was settled."""
        [[found]] = self._query(self._contestant.waiting, inside=True)
        return int(found)

    def clear(self) -> None:
        """As `Queue.clear`: no dead rows and no statistics of an earlier measurement, nor its dirty pages."""
        if not self._made:
            made = f"{self.name}_made"
            self._drop(made)
            self._query(f"CREATE DATABASE {made}")
            prepare(self._contestant, self._at(self._server, made), self._kind)
            self._made = made
        self._drop(self.name)
        self._query(f"CREATE DATABASE {self.name} TEMPLATE {self._made}")
        self._query("CHECKPOINT")

    def fill(self, jobs: int, size: int = 200) -> None:
        """As `Queue.fill`; then the statistics are what autovacuum would have made them."""
        publish(self._contestant, self.url, self._kind, "fill", jobs, size=size)
        self._query("VACUUM ANALYZE", inside=True)

    def delete(self) -> None:
        """As `Queue.delete`."""
        self._drop(self.name)
        if self._made:
            self._drop(self._made)

    def _drop(self, name: str) -> None:
        self._query(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


class PostgreSQL(Running):
    """A server of the tests in its default settings, or that of LEVERET_TEST_POSTGRES."""

    def __init__(self, node: Postgres) -> None:
        super().__init__(node.url, ours=isinstance(node, Node))
        self._node = node

    @cached_property
    def version(self) -> str:
        """As `Running.version`."""
        [[version]] = asyncio.run(self._node.query("SHOW server_version"))
        return str(version).split()[0]

    def _queue(self, contestant: Contestant, kind: str) -> Database:
        return Database(self._node, contestant, kind)

    def _stop(self) -> None:
        asyncio.run(self._node.close())


def start() -> PostgreSQL:
    """Find a server, or start one; raises Unavailable where there is none."""
    found = find_postgres()
    node = found if isinstance(found, Postgres) else Node(found)
    if isinstance(node, Node):
        asyncio.run(node.start())
    return PostgreSQL(node)
