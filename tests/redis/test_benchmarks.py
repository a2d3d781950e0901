"""benchmarks/peers on Redis: what it counts, and what it never deletes."""

import asyncio

import pytest

from benchmarks.peers import on_redis
from benchmarks.peers.contestants import LEVERET_ON_REDIS, queue
from leveret import App, Job, Queue
from tests.nodes import Unavailable
from tests.redis.node import Server

NAME = queue(LEVERET_ON_REDIS, "redis")
MINE = "benchmarks-test"


class Counted(Job, name="bench.counted", queue=Queue(NAME)):
    """A job that waits, runs or is delayed."""


async def test_a_job_counts_until_it_is_settled(redis: Server) -> None:
    """A count without the jobs that a worker holds calls a queue empty whose jobs weren't settled, and the figure valid."""
    keys = on_redis.Keys(redis, LEVERET_ON_REDIS, "redis")
    app = App("bench", broker=redis.url)
    begun, release = asyncio.Event(), asyncio.Event()

    @app.handler
    async def hold(job: Counted) -> None:
        begun.set()
        await release.wait()

    try:
        async with app.publisher() as publisher:
            await publisher.publish_many([Counted(), Counted()])
            await publisher.publish(Counted(), delay_s=3600)
        assert await asyncio.to_thread(keys.count) == 3
        async with app.worker():
            await begun.wait()
            assert await asyncio.to_thread(keys.count) == 3
            release.set()
        assert await asyncio.to_thread(keys.count) == 1
    finally:
        await redis.command("DEL", *await redis.command("KEYS", f"lv:{{{NAME}}}:*"))


def test_a_server_that_holds_keys_is_not_measured_on(redis: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each measurement begins by FLUSHALL: a mistaken LEVERET_TEST_REDIS would cost somebody's data."""
    monkeypatch.setenv("LEVERET_TEST_REDIS", redis.url)
    asyncio.run(redis.command("SET", MINE, "1"))
    try:
        with pytest.raises(Unavailable, match=r"holds [0-9]+ keys"):
            on_redis.start()
        assert asyncio.run(redis.command("GET", MINE)) == "1"
    finally:
        asyncio.run(redis.command("DEL", MINE))
