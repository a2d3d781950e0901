"""Jobs whose store is killed, full, hung or slow. A real Redis, and a real trouble under load."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeAlias

import pytest

from leveret import App
from leveret.consuming.worker import working
from leveret.outcome import Kind
from tests.conftest import StartRedis
from tests.fault.apps.kept import work_of
from tests.fault.bench import PATIENCE_S, eventually
from tests.proxy import FaultProxy
from tests.redis.node import Node

pytestmark = [pytest.mark.fault, pytest.mark.redis, pytest.mark.timeout(180)]

Lever: TypeAlias = Callable[[], Awaitable[object]]

_BATCH = 400


class SickStore:
    """A Redis behind a link, and the levers that make it sick and well."""

    def __init__(self, node: Node, link: FaultProxy, trouble: str) -> None:
        self.url = link.url_of(node.url)
        self.fall_sick, self.recover = {
            "killed": (node.kill9, node.start),
            "full": (lambda: node.configure("maxmemory", 1), lambda: node.configure("maxmemory", 0)),
            "hung": (self._soon(node.pause), self._soon(node.resume)),
            "slow": (self._answers_in(link, 2.0), self._answers_in(link, 0.0)),
        }[trouble]

    @staticmethod
    def _soon(act: Callable[[], None]) -> Lever:
        async def lever() -> None:
            act()

        return lever

    @staticmethod
    def _answers_in(link: FaultProxy, seconds: float) -> Lever:
        async def lever() -> None:
            link.latency_s = seconds / 2  # each way

        return lever


@pytest.fixture(params=["killed", "full", "hung", "slow"])
async def store(request: pytest.FixtureRequest, redis_node: StartRedis) -> AsyncGenerator[SickStore]:
    """A store that is well."""
    # a server that syncs each second may answer before it has written to its file, while the disk is busy
    node = await redis_node(conf={"appendfsync": "always"})
    async with FaultProxy(node.port) as link:
        yield SickStore(node, link, request.param)


async def test_jobs_keep_their_pace_while_the_store_is_sick_and_it_hears_of_all_of_them(store: SickStore) -> None:
    """A store stands in the way of the jobs, or forgets what happened meanwhile."""
    app: App[None] = App("kept", broker=f"memory://{uuid.uuid4().hex}", store=store.url)
    work = work_of(f"kept-{uuid.uuid4().hex[:12]}")

    @app.handler(job=work)
    async def handle(job: Any) -> int:
        n: int = job.n
        return n

    async with app.publisher() as publisher, working(app) as worker:
        ids: list[str] = []

        async def run_batch() -> float:
            """Publish a batch, wait until it is done, and return how long that took."""
            began = time.monotonic()
            jobs = [work(n=n) for n in range(len(ids), len(ids) + _BATCH)]
            ids.extend(receipt.job_id for receipt in await publisher.publish_many(jobs, timeout_s=PATIENCE_S))
            await eventually(lambda: worker.consumer.counts[Kind.DONE] == len(ids))
            return time.monotonic() - began

        await run_batch()
        well_s = await run_batch()
        await store.fall_sick()
        await run_batch()  # the first jobs wait for the store, for 2 s
        sick_s = await run_batch()
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            await publisher.handle(ids[-1], work).result(timeout_s=0.5)
        waited_s = time.monotonic() - began
        await store.recover()
        results = await asyncio.gather(*(publisher.handle(job_id, work).result(timeout_s=PATIENCE_S) for job_id in ids))

    assert sick_s < 3 * well_s + 1.5  # a batch that waits for the store takes 2 s more
    assert waited_s < 0.5 + 1.5
    assert results == list(range(len(ids)))
