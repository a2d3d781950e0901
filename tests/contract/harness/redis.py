"""A Redis under test, behind a link that can freeze; and a cluster of three, whose processes can hang."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Unpack
from urllib.parse import urlsplit

import msgspec
import pytest

from leveret.envelope import JSON
from leveret.ids import new_job_id
from leveret.job import Queue
from tests.contract.harness.base import Foreign, Harness
from tests.proxy import FaultProxy
from tests.redis.node import Cluster


class RedisHarness(Harness):
    """A Redis behind a link; a link on which nothing moves breaks it."""

    example = "redis://localhost"
    marks = (pytest.mark.redis,)

    @classmethod
    def make(cls, request: pytest.FixtureRequest, folder: Path) -> Harness:
        """Return a harness for one case."""
        return cls(request.getfixturevalue("redis").url)

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.direct_url = url

    async def start(self) -> None:
        """Make the link; brokers that are opened later use it."""
        parts = urlsplit(self.direct_url)
        self._link = await FaultProxy(parts.port or 6379, host=parts.hostname or "127.0.0.1").__aenter__()
        self.url = self._link.url_of(self.direct_url)

    async def put(self, queue: Queue, body: bytes, **fields: Unpack[Foreign]) -> None:
        from leveret.brokers.redis.address import address_of
        from leveret.brokers.redis.keys import Keys
        from leveret.brokers.redis.link import Link
        from leveret.brokers.rows import headers_text

        entry = body
        if fields:
            columns = (
                fields.get("job_id") or new_job_id(),
                fields.get("job", ""),
                fields.get("content_type", JSON),
                fields.get("content_encoding"),
                body,
                *(0, None, None, None),
                headers_text(fields.get("headers") or {}),
            )
            entry = msgspec.msgpack.encode(columns)
        link = Link(address_of(self.direct_url), self.runtime(), name="foreign")
        try:
            wire = await link.wire(queue.name)
            await wire.call("RPUSH", Keys("lv", queue.name)["normal"], entry)
        finally:
            link.close()

    async def break_publishing(self) -> None:
        self._link.freeze()

    async def heal(self) -> None:
        self._link.thaw()

    def cut(self) -> None:
        # in a thread, since a worker must not go on meanwhile
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, self._cut()).result()

    async def _cut(self) -> None:
        """End all leases, as another worker does with the lease of a silent one."""
        from leveret.brokers.redis import scripts
        from leveret.brokers.redis.address import address_of
        from leveret.brokers.redis.keys import Keys
        from leveret.brokers.redis.link import Link
        from leveret.brokers.redis.wire import packed_words

        link = Link(address_of(self.direct_url), self.runtime(), name="cut")
        try:
            for queue in self.queues:
                keys, wire = Keys("lv", queue.name), await link.wire(queue.name)
                for worker in map(int, await wire.call("HKEYS", keys["workers"])):
                    names = (*keys.common, keys.held(worker), keys.read(worker))
                    words = packed_words((len(names), *names, worker, 1))
                    await wire.evaluate(scripts.RELEASE, words, len(names) + 3)
        finally:
            link.close()

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            await self._link.__aexit__(None, None, None)


class ClusterHarness(RedisHarness):
    """A cluster of three, whose processes hang."""

    example = "redis+cluster://localhost"

    @classmethod
    def make(cls, request: pytest.FixtureRequest, folder: Path) -> Harness:
        """Return a harness for one case."""
        return cls.of(request.getfixturevalue("redis_cluster"))

    @classmethod
    def of(cls, cluster: Cluster) -> Harness:
        """Return a harness on `cluster`."""
        made = cls(cluster.url)
        made.cluster = cluster
        return made

    cluster: Cluster

    async def start(self) -> None:
        """Nothing to make."""

    async def break_publishing(self) -> None:
        for node in self.cluster.nodes:
            node.pause()

    async def heal(self) -> None:
        for node in self.cluster.nodes:
            node.resume()

    async def close(self) -> None:
        await Harness.close(self)


HARNESSES: dict[str, type[Harness]] = {"redis": RedisHarness, "redis-cluster": ClusterHarness}
