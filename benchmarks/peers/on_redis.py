"""Redis: one server, emptied for each measurement, and filled by the contestant itself."""

from __future__ import annotations

import asyncio
import time
from functools import cached_property
from typing import Any

from benchmarks.peers.contestants import Contestant, queue
from benchmarks.peers.harness import Refused, publish
from benchmarks.peers.servers import SETTLED_S, Queue, Running
from tests.nodes import Unavailable
from tests.redis.node import Node, Server, find_redis


class Keys(Queue):
    """All keys of the server: one contestant's at a time."""

    def __init__(self, server: Server, contestant: Contestant, kind: str) -> None:
        super().__init__(server.url, queue(contestant, kind))
        self._server = server
        self._contestant = contestant
        self._kind = kind

    def count(self) -> int:
        """As `Queue.count`: waiting and held jobs, so that 0 shows that each was settled."""
        return int(_command(self._server, "EVAL", self._contestant.waiting, 0, self.name))

    def clear(self) -> None:
        """As `Queue.clear`: no key of another, and a file that begins anew."""
        _command(self._server, "FLUSHALL")
        if not _persistence(self._server)["aof_enabled"]:
            return
        _command(self._server, "BGREWRITEAOF")
        end = time.monotonic() + SETTLED_S
        while (found := _persistence(self._server))["aof_rewrite_scheduled"] or found["aof_rewrite_in_progress"]:
            if time.monotonic() > end:
                msg = f"Redis is still rewriting its file after {SETTLED_S:.0f} s"
                raise Refused(msg)
            time.sleep(0.02)

    def fill(self, jobs: int, size: int = 200) -> None:
        """As `Queue.fill`."""
        publish(self._contestant, self.url, self._kind, "fill", jobs, size=size)

    def delete(self) -> None:
        """As `Queue.delete`."""
        _command(self._server, "FLUSHALL")


class Redis(Running):
    """A server of the tests, whose file is synced once a second, or that of LEVERET_TEST_REDIS."""

    def __init__(self, node: Server) -> None:
        super().__init__(node.url, ours=isinstance(node, Node))
        self._node = node

    @cached_property
    def version(self) -> str:
        """As `Running.version`."""
        found = asyncio.run(self._node.info("server"))
        return str(found.get("valkey_version") or found["redis_version"])

    def _queue(self, contestant: Contestant, kind: str) -> Keys:
        return Keys(self._node, contestant, kind)

    def _stop(self) -> None:
        asyncio.run(self._node.close())


def _command(server: Server, *words: str | int) -> Any:
    return asyncio.run(server.command(*words))


def _persistence(server: Server) -> dict[str, Any]:
    return asyncio.run(server.info("persistence"))


def start() -> Redis:
    """Find a server, or start one; raises Unavailable where there is none, or where the measurements would delete what it holds."""
    found = find_redis()
    node = found if isinstance(found, Server) else Node(found)
    if isinstance(node, Node):
        asyncio.run(node.start())
    elif keys := _command(node, "DBSIZE"):
        msg = f"the server of LEVERET_TEST_REDIS holds {keys} keys, and each measurement begins by FLUSHALL: name one that is empty"
        raise Unavailable(msg)
    return Redis(node)
