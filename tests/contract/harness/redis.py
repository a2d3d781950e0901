"""A Redis under test, behind a link that can freeze; and a cluster of three, on which writes can be held up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Unpack
from urllib.parse import urlsplit

import msgspec
import pytest

from leveret.brokers.redis.keys import Keys
from leveret.brokers.redis.scripts import RELEASE
from leveret.envelope import JSON
from leveret.ids import new_job_id
from leveret.job import Queue
from tests.contract.harness.base import Foreign, Harness
from tests.proxy import FaultProxy
from tests.redis.node import Cluster, Server


def _keys(queue: Queue) -> Keys:
    return Keys("lv", queue.name)


async def _put(server: Server, queue: Queue, body: bytes, fields: Foreign) -> None:
    """Push a body alone if it says nothing of itself, else the columns of a row."""
    from leveret.brokers.rows import headers_text

    columns = (
        fields.get("job_id") or new_job_id(),
        fields.get("job", ""),
        fields.get("content_type", JSON),
        fields.get("content_encoding"),
        body,
        0,
        None,
        None,
        None,
        headers_text(fields.get("headers") or {}),
    )
    await server.command("RPUSH", _keys(queue)["normal"], msgspec.msgpack.encode(columns) if fields else body)


async def _end_leases(server: Server, queue: Queue) -> None:
    """End all leases, as another worker does with the lease of a silent one."""
    keys = _keys(queue)
    for worker in await server.command("HKEYS", keys["workers"]):
        of_worker = (keys.held(int(worker)), keys.read(int(worker)))
        names = (*keys.common, *of_worker)
        await server.command("EVAL", RELEASE.text, len(names), *names, worker, 1)


async def _delete(server: Server, queue: Queue) -> None:
    keys = _keys(queue)
    await server.command("DEL", *keys.common, keys["ids"])


def _in_a_thread(program: Coroutine[None, None, None]) -> None:
    """Run it to its end while this thread waits, since a worker must not go on meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, program).result()


class RedisHarness(Harness):
    """A server behind a link that can freeze."""

    example = "redis://localhost/0"
    marks = (pytest.mark.redis,)

    @classmethod
    def make(cls, request: pytest.FixtureRequest, folder: Path) -> Harness:
        """Return a harness for one case."""
        return cls(request.getfixturevalue("redis"))

    def __init__(self, server: Server) -> None:
        super().__init__(server.url)
        self._server = server
        self._link: FaultProxy | None = None

    async def start(self) -> None:
        """Make the link; brokers that are opened later use it."""
        parts = urlsplit(self._server.url)
        self._link = await FaultProxy(parts.port or 6379, host=parts.hostname or "127.0.0.1").__aenter__()
        self.url = self._link.url_of(self._server.url)

    async def put(self, queue: Queue, body: bytes, **fields: Unpack[Foreign]) -> None:
        await _put(self._server, queue, body, fields)

    async def break_publishing(self) -> None:
        assert self._link is not None
        self._link.freeze()

    async def heal(self) -> None:
        if self._link is not None:
            self._link.thaw()

    def cut(self) -> None:
        assert self._link is not None
        self._link.reset()
        _in_a_thread(self._end_leases())

    async def _end_leases(self) -> None:
        for queue in self.queues:
            await _end_leases(self._server, queue)

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            if self._link is not None:
                await self._link.__aexit__(None, None, None)
        for queue in self.queues:
            await _delete(self._server, queue)


class ClusterHarness(Harness):
    """Three servers, on which writes can be held up."""

    example = "redis+cluster://localhost"
    marks = (pytest.mark.redis,)

    @classmethod
    def make(cls, request: pytest.FixtureRequest, folder: Path) -> Harness:
        """Return a harness for one case."""
        return cls(request.getfixturevalue("redis_cluster"))

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster.url)
        self._cluster = cluster
        self._held = False

    async def _owner(self, queue: Queue) -> Server:
        return await self._cluster.owner(_keys(queue).base)

    async def put(self, queue: Queue, body: bytes, **fields: Unpack[Foreign]) -> None:
        await _put(await self._owner(queue), queue, body, fields)

    async def break_publishing(self) -> None:
        self._held = True
        for node in self._cluster.nodes:
            await node.hold("WRITE")

    async def heal(self) -> None:
        if self._held:
            self._held = False
            for node in self._cluster.nodes:
                await node.release()

    def cut(self) -> None:
        _in_a_thread(self._cut())

    async def _cut(self) -> None:
        for node in self._cluster.nodes:
            await node.disconnect()
        for queue in self.queues:
            await _end_leases(await self._owner(queue), queue)

    async def close(self) -> None:
        await super().close()
        for queue in self.queues:
            await _delete(await self._owner(queue), queue)


HARNESSES: dict[str, type[Harness]] = {"redis": RedisHarness, "redis-cluster": ClusterHarness}
