"""Dead letters that take nothing: an operator's `max-length` with `reject-publish`, or a queue that confirms nothing. Good jobs go on."""

import asyncio
import logging
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from leveret import App, Attempt, BrokerUnavailable, Bury, Job, Queue
from leveret.consuming.worker import working
from tests.fault.bench import eventually
from tests.rabbit.node import Rabbit
from tests.rabbit.raw import Raw

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

FULL: dict[str, int | str] = {"max-length": 1, "overflow": "reject-publish"}


class Shop:
    """An app whose bad jobs are buried and whose good ones take 20 ms."""

    def __init__(self, url: str) -> None:
        self.queue = queue = Queue(f"full-{uuid.uuid4().hex[:12]}")
        self.dead = f"{queue.name}.dead"
        self.app: App[None] = App("shop", broker=url, concurrency=20)
        self.done = 0
        self.bad_runs = Counter[str]()

        class Good(Job, name="good", queue=queue):
            n: int = 0

        class Bad(Job, name="bad", queue=queue):
            n: int = 0

        self.Good, self.Bad = Good, Bad

        @self.app.handler
        async def good(job: Good) -> None:
            await asyncio.sleep(0.02)
            self.done += 1

        @self.app.handler
        async def bad(job: Bad, attempt: Attempt[None]) -> Bury:
            self.bad_runs[attempt.job_id] += 1
            return Bury(f"bad {job.n}")

    @asynccontextmanager
    async def full(self, rabbit: Rabbit) -> AsyncGenerator[None]:
        """Let the dead letters refuse, as an operator's policy does."""
        async with self.app.publisher() as publisher:
            await publisher.publish(self.Good())  # declares them
        await rabbit.set_policy(self.dead, f"^{self.dead}$", FULL)
        try:
            yield
        finally:
            await rabbit.clear_policy(self.dead)

    async def publish(self, *jobs: Job) -> list[str]:
        """Publish `jobs`, and return their ids."""
        async with self.app.publisher() as publisher:
            return [receipt.job_id for receipt in await publisher.publish_many(jobs)]

    async def rate(self, count: int) -> float:
        """Publish `count` good jobs, and return how many a second ended."""
        before, began = self.done, time.monotonic()
        await self.publish(*(self.Good(n) for n in range(count)))
        await eventually(
            lambda: self.done >= before + count, lambda: f"{self.done - before} of {count} good jobs ran", timeout_s=30
        )
        return count / (time.monotonic() - began)

    async def buried(self, raw: Raw, count: int, timeout_s: float) -> float:
        """Wait until `count` letters are there, and return how long that took."""
        began = time.monotonic()
        while (found := await raw.count(self.dead) or 0) < count:
            assert time.monotonic() < began + timeout_s, f"{found} of {count} letters"
            await asyncio.sleep(0.1)  # AMQP has no event for a depth
        return time.monotonic() - began


async def test_good_jobs_go_on_beside_burials_that_are_refused(
    rabbit: Rabbit, raw: Raw, caplog: pytest.LogCaptureFixture
) -> None:
    """R-dead: 200 bad jobs filled the prefetch, and none of 100 good ones ran in 15 s; on 3.10 for as long as the worker lived."""
    caplog.set_level(logging.INFO, "leveret")
    shop = Shop(rabbit.url)
    async with working(shop.app) as work:
        healthy = await shop.rate(1500)
        async with shop.full(rabbit):
            bad = await shop.publish(*(shop.Bad(n) for n in range(200)))
            onset = await shop.rate(1000)
            refused = max([await shop.rate(1000) for _ in range(2)])  # something else may have the machine for a second
            assert work.worker.state().name == "degraded"
            assert f"queue {shop.queue.name}: its burials can't be published: " in work.worker.state().why
            there = await raw.count(shop.dead) or 0
        assert there < 200, "too few were refused: it proves nothing"
        first_s = await shop.buried(raw, there + 1, 10)
        all_s = await shop.buried(raw, 200, 60)
        await eventually(lambda: work.worker.state().name == "ready")
    letters = Counter(str(found.properties.message_id) for found in await raw.look(shop.dead))
    rates = f"healthy {healthy:.0f}/s, with 200 bad jobs {onset:.0f}/s, afterwards {refused:.0f}/s"
    sys.stdout.write(f"{rates}; after the policy the first letter came in {first_s:.1f} s, the last in {all_s:.1f} s\n")
    assert refused > healthy / 2, rates
    assert letters == Counter(bad), "lost or there twice"
    assert shop.bad_runs == Counter(bad), "a job that is to be buried ran again"
    lines = [record for record in caplog.records if "burials" in record.getMessage()]
    levels = [record.levelno for record in lines]
    # a broker that is slow before it refuses confirms no letter for a while, and that is a fault with a beginning and an end, too
    assert levels in ([logging.ERROR, logging.INFO], [logging.ERROR, logging.INFO] * 2)


async def test_a_stop_is_not_held_by_burials_that_are_refused(rabbit: Rabbit, raw: Raw) -> None:
    """Each deploy would take the whole grace, and each of these jobs would run again in the next worker."""
    shop = Shop(rabbit.url)
    async with shop.full(rabbit):
        async with working(shop.app):
            bad = await shop.publish(*(shop.Bad(n) for n in range(60)))
            await eventually(lambda: len(shop.bad_runs) == 60)
            began = time.monotonic()
        took_s = time.monotonic() - began
    assert took_s < 5
    async with working(shop.app):
        await shop.buried(raw, 60, 60)
    assert shop.bad_runs == Counter(bad)


async def test_good_jobs_go_on_beside_burials_that_nobody_confirms(rabbit: Rabbit, raw: Raw) -> None:
    """A dead-letter queue without its majority answers nothing: burials that wait for it would stop all other jobs."""
    shop = Shop(rabbit.url)
    async with working(shop.app) as work:
        healthy = await shop.rate(1000)
        process = f"whereis('%2F_{shop.dead}')"
        await rabbit.eval(f"ok = sys:suspend({process}).")
        try:
            bad = await shop.publish(*(shop.Bad(n) for n in range(100)))
            silent = await shop.rate(1000)
            assert work.worker.state().name == "degraded"
        finally:
            await rabbit.eval(f"ok = sys:resume({process}).")
        await shop.buried(raw, 100, 60)
        await eventually(lambda: work.worker.state().name == "ready")
    letters = Counter(str(found.properties.message_id) for found in await raw.look(shop.dead))
    sys.stdout.write(f"healthy {healthy:.0f}/s, with 100 bad jobs {silent:.0f}/s\n")
    assert silent > 100
    assert letters == Counter(bad), "lost or there twice"
    assert shop.bad_runs == Counter(bad)


@pytest.mark.versions
async def test_a_publisher_goes_on_once_a_full_queue_has_room(rabbit: Rabbit) -> None:
    """RabbitMQ 3.10 goes on refusing in the channel that it refused in: a service would have to be started again."""
    shop = Shop(rabbit.url)

    async def refused() -> bool:
        try:
            await publisher.publish(shop.Good())
        except BrokerUnavailable:
            return True
        return False

    async with shop.app.publisher() as publisher:
        await publisher.publish(shop.Good())
        await rabbit.set_policy(shop.queue.name, f"^{shop.queue.name}$", FULL)
        try:
            async with asyncio.timeout(10):
                while not await refused():
                    pass
        finally:
            await rabbit.clear_policy(shop.queue.name)
        async with asyncio.timeout(10):
            while await refused():
                await asyncio.sleep(0.1)  # a service that tries again
