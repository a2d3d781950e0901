"""What a program that waits for results sees while its store is frozen, killed and back again. Real servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from leveret import App, Handle, Job, Keep, Queue, StoreUnavailable
from leveret.runtime import Runtime
from leveret.schemes import open_store
from leveret.store import Change, Store
from tests.conftest import StartPostgres, StartRedis
from tests.fault.bench import PATIENCE_S
from tests.postgres import node as postgresql
from tests.proxy import FaultProxy
from tests.redis import node as redises

pytestmark = [pytest.mark.fault, pytest.mark.timeout(240)]


StartNode: TypeAlias = Callable[[], Awaitable[postgresql.Node | redises.Node]]


@pytest.fixture(
    params=[pytest.param("postgresql", marks=pytest.mark.postgres), pytest.param("redis", marks=pytest.mark.redis)]
)
def start_node(request: pytest.FixtureRequest) -> StartNode:
    """Start a server of the test's own, which can keep records and loses none by a kill."""
    if request.param == "redis":
        start_redis: StartRedis = request.getfixturevalue("redis_node")
        # a server that syncs each second may answer before it has written to its file, while the disk is busy
        return partial(start_redis, conf={"appendfsync": "always"})
    start_postgres: StartPostgres = request.getfixturevalue("postgres_node")

    async def started() -> postgresql.Node:
        node = await start_postgres()
        await postgresql.migrate(node.url)
        return node

    return started


class Count(Job[int], name="count", queue=Queue("counts"), keep=Keep()):
    """A job with a result."""

    n: int = 0


@asynccontextmanager
async def stored(url: str) -> AsyncGenerator[Store]:
    """Open a store as another process does."""
    store = open_store(url, Runtime(app="fault"))
    yield store
    await store.close()


async def finish(store: Store, handles: Sequence[Handle[Any]]) -> None:
    """Enter that jobs are done, as their workers do: each with its place as result."""
    publishes = {record.job_id: record.publish for record in await store.list(limit=20_000)}
    changes = [
        Change(
            job_id=handle.job_id,
            publish=publishes[handle.job_id],
            queue="counts",
            job="count",
            state="done",
            passes=0,
            attempt=1,
            keep_s=3600,
            at_ms=0,
            result=str(place).encode(),
            content_type="application/json",
        )
        for place, handle in enumerate(handles)
    ]
    for begin in range(0, len(changes), 500):
        await store.write(changes[begin : begin + 500])


async def late(handle: Handle[Any], timeout_s: float) -> float:
    """Return by how many seconds a result that doesn't come outlives its time limit."""
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await handle.result(timeout_s=timeout_s)
    return time.monotonic() - began - timeout_s


async def test_a_frozen_store_costs_each_call_its_own_time_limit_and_nothing_else(
    start_node: StartNode, tmp_path: Path
) -> None:
    """A store whose link says nothing would hold up publishes, and waits beyond what their callers said."""
    node = await start_node()
    async with FaultProxy(node.port) as link, stored(node.url) as direct:
        app = App("fault", broker=f"sqlite:///{tmp_path / 'jobs.db'}", store=link.url_of(node.url))
        async with app.publisher() as publisher:
            handle = await publisher.publish(Count())
            assert (await handle.status()).state == "queued"
            waiting = asyncio.create_task(handle.result(timeout_s=PATIENCE_S))

            link.freeze("up", "down")
            began = time.monotonic()
            for n in range(50):
                await publisher.publish(Count(n))
            published_s = time.monotonic() - began
            overdue_s = await asyncio.gather(*(late(handle, 0.3) for _ in range(20)))
            with pytest.raises(StoreUnavailable):
                await handle.abort(timeout_s=0.3)
            await finish(direct, [handle])
            link.thaw()

            assert await waiting == 0
            assert (await handle.status()).state == "done"

    assert published_s < 5, "publishes waited for the store"
    assert max(overdue_s) < 0.5 * 3, "on a machine that is three times slower"


async def test_a_killed_store_ends_no_wait(start_node: StartNode, tmp_path: Path) -> None:
    """Each restart of the store would fail every request that waits."""
    node = await start_node()
    app = App("fault", broker=f"sqlite:///{tmp_path / 'jobs.db'}", store=node.url)
    async with app.publisher() as publisher:
        handle, by_id = await publisher.publish(Count(), job_id="id"), publisher.handle("id", Count)
        await handle.status()
        waits = [asyncio.create_task(one.result(timeout_s=60)) for one in (handle, by_id)]

        await node.kill9()
        meanwhile = await publisher.publish(Count(1))
        with pytest.raises(TimeoutError, match="the store doesn't answer"):
            await meanwhile.result(timeout_s=2)
        await node.start()
        async with stored(node.url) as direct:
            await finish(direct, [handle])
            results = await asyncio.gather(*waits)
            async with asyncio.timeout(PATIENCE_S):  # the recorder brings what it kept
                while (await meanwhile.status()).state != "queued":
                    await asyncio.sleep(0.05)

    assert results == [0, 0]


async def test_ten_thousand_handles_are_awaited_in_one_process(start_node: StartNode, tmp_path: Path) -> None:
    """A service with as many requests at once would need a query for each of them, 50 times a second."""
    node = await start_node()
    app = App("fault", broker=f"sqlite:///{tmp_path / 'jobs.db'}", store=node.url)
    async with app.publisher() as publisher, stored(node.url) as direct:
        handles: list[Handle[int]] = []
        for begin in range(0, 10_000, 500):
            handles += await asyncio.gather(*(publisher.publish(Count(begin + n), timeout_s=60) for n in range(500)))
        async with asyncio.timeout(60):
            while len(await direct.list(state="queued", limit=20_000)) < len(handles):
                await asyncio.sleep(0.2)
        waits = [asyncio.create_task(handle.result(timeout_s=180)) for handle in handles]
        await late(await publisher.publish(Count(-1)), 1.0)

        await finish(direct, handles)
        results = await asyncio.gather(*waits)

    assert results == list(range(10_000))
