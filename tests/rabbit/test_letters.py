"""Dead letters of RabbitMQ in numbers: their order, the memory that reading takes, and connections that are lost meanwhile."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Collection
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
import pytest_asyncio
from pamqp.commands import Basic

from leveret.admin import Admin, DeadLetter
from leveret.brokers.rabbitmq import letters as under_test
from leveret.brokers.rabbitmq import open_admin
from leveret.errors import BrokerUnavailable, LeveretError
from leveret.job import Queue
from leveret.runtime import Runtime
from tests.rabbit.node import Rabbit
from tests.rabbit.proxy import FaultProxy
from tests.rabbit.raw import Raw

pytestmark = pytest.mark.rabbit

COUNT = 300
ALL = [str(number) for number in range(COUNT)]


class Grave:
    """A queue with dead letters, whose ids are numbers in the order of their burial."""

    def __init__(self, rabbit: Rabbit, raw: Raw) -> None:
        self.queue = Queue(f"letters-{uuid.uuid4().hex[:8]}")
        self.dead = f"{self.queue.name}.dead"
        self.raw = raw
        self.port = urlsplit(rabbit.url).port or 5672
        self._url = rabbit.url
        self._admins: list[Admin] = []

    def admin(self, url: str | None = None) -> Admin:
        """Return an admin that is closed with the test."""
        self._admins.append(open_admin(url or self._url, Runtime(app="letters")))
        return self._admins[-1]

    async def declare(self) -> None:
        """Declare the queue, as its worker would, with one level."""
        arguments: dict[str, Any] = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}
        async with self.raw.channel() as channel:
            await channel.exchange_declare(
                "lv.jobs", exchange_type="direct", durable=True, arguments={"alternate-exchange": "lv.jobs.alt"}
            )
            for name in (self.queue.name, self.dead):
                await channel.queue_declare(name, durable=True, arguments=arguments)
            await channel.queue_bind(self.queue.name, "lv.jobs", f"{self.queue.name}.normal")

    async def bury(self, ids: Collection[str], body: bytes = b"{}") -> None:
        """Bury one job an id, in order."""
        async with self.raw.channel() as channel:
            await asyncio.gather(
                *(
                    channel.basic_publish(
                        body,
                        routing_key=self.dead,
                        properties=Basic.Properties(
                            message_id=one, message_type="job", headers={"lv-origin": self.queue.name}
                        ),
                    )
                    for one in ids
                )
            )

    async def read(self, limit: int = 1 << 30, act: Callable[[str], bool] = lambda _: False) -> list[str]:
        """Read at most `limit` letters, and drop those for which `act` returns True."""
        ids: list[str] = []
        async with self.admin().dead(self.queue) as letters:
            async for letter in letters:
                ids.append(letter.job_id)
                if act(letter.job_id):
                    await letters.drop(letter)
                if len(ids) == limit:
                    break
        return ids

    async def close(self) -> None:
        """Close the admins, and delete the queues."""
        for admin in self._admins:
            await admin.close()
        async with self.raw.channel() as channel:
            for name in (self.queue.name, self.dead):
                await channel.queue_delete(name)


@pytest_asyncio.fixture
async def grave(rabbit: Rabbit, raw: Raw) -> AsyncGenerator[Grave]:
    """An empty grave."""
    made = Grave(rabbit, raw)
    await made.declare()
    yield made
    await made.close()


@pytest.mark.parametrize("page", [1000, 6])
async def test_letters_that_were_only_read_keep_their_order(
    grave: Grave, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    """`--limit` promises the oldest: a list that reorders makes the next replay take others, on one channel (1000) or on two (6)."""
    monkeypatch.setattr(under_test, "_MOST_PAGE", page)
    monkeypatch.setattr(under_test, "_FIRST_PAGE", min(8, page))
    await grave.bury(ALL)

    assert await grave.read() == ALL
    assert await grave.read() == ALL
    assert await grave.read(limit=10) == ALL[:10]
    assert await grave.read(limit=100) == ALL[:100]
    assert await grave.read(limit=50, act=lambda one: int(one) % 3 == 0) == ALL[:50]
    left = [one for one in ALL if int(one) >= 50 or int(one) % 3]
    assert await grave.read() == left


async def test_a_drop_among_letters_that_were_never_read_keeps_their_order(grave: Grave) -> None:
    """The check that the drops have arrived takes a letter for a moment: it must go back to its place."""
    await grave.bury(ALL)

    assert await grave.read(limit=50, act=lambda one: int(one) % 3 == 0) == ALL[:50]
    assert await grave.read() == [one for one in ALL if int(one) >= 50 or int(one) % 3]


async def test_a_reader_takes_about_as_many_letters_as_it_is_asked_for(grave: Grave) -> None:
    """A `list --limit 5` that takes 100 000 letters hides them from everybody else, and takes their time."""
    await grave.bury(ALL)

    async with grave.admin().dead(grave.queue) as letters:
        async for _ in letters:
            break
        assert (await grave.raw.count(grave.dead) or 0) >= COUNT - 10


async def test_a_second_reader_gets_what_the_first_does_not_hold_and_ends(grave: Grave) -> None:
    """Two operators at once must neither wait for each other nor see a letter twice."""
    await grave.bury(ALL)

    async with grave.admin().dead(grave.queue) as mine, grave.admin().dead(grave.queue) as theirs:
        first: list[str] = []
        async for letter in mine:
            first.append(letter.job_id)
            break
        async with asyncio.timeout(20):
            second = [letter.job_id async for letter in theirs]
            first += [letter.job_id async for letter in mine]

    assert len(second) > COUNT - 20
    assert sorted(first + second, key=int) == ALL
    assert sorted(await grave.read(), key=int) == ALL


async def test_large_letters_wait_at_the_broker_and_not_in_memory(
    grave: Grave, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand letters of 15 MiB each would end the command, and whatever else runs on its machine.

    A drop in the middle of a page takes no further letter: nothing asks for it, and it would be out of its order.
    """
    monkeypatch.setattr(under_test, "HELD_BYTES", 1 << 20)
    monkeypatch.setattr(under_test, "_FIRST_PAGE", 40)  # all in one page, as large letters among small ones may come
    await grave.bury(ALL[:44], bytes(1 << 20))

    async with FaultProxy(grave.port) as link, grave.admin(link.url).dead(grave.queue) as letters:
        reading = aiter(letters)
        await letters.drop(await anext(reading))
        passed = -1
        while passed != link.passed["down"]:
            passed = link.passed["down"]
            await asyncio.sleep(0.5)
        assert passed < 24 << 20  # of which the kernel holds most
        await grave.raw.until_count(grave.dead, 4)
        assert [len(letter.envelope.body) async for letter in reading] == [1 << 20] * 43
    async with grave.admin().dead(grave.queue) as letters:
        await letters.drop(await anext(aiter(letters)))  # and leave in the middle of the page
    assert await grave.read() == ALL[2:44]


async def test_a_lost_connection_loses_no_letter_and_no_order(grave: Grave) -> None:
    """A reader that is killed, or a network that fails, must leave everything as it was."""
    await grave.bury(ALL)

    async def read(link: FaultProxy) -> None:
        async with grave.admin(link.url).dead(grave.queue) as letters:
            async for letter in letters:
                if letter.job_id == "200":
                    link.reset()

    async with FaultProxy(grave.port) as link:
        with pytest.raises(BrokerUnavailable):
            await read(link)
    async with asyncio.timeout(20):
        while await grave.raw.count(grave.dead) != COUNT:  # the broker takes a moment to see that the reader is gone
            await asyncio.sleep(0.02)
    assert await grave.read() == ALL


async def test_a_replay_whose_connections_are_lost_leaves_each_job_in_at_least_one_place(grave: Grave) -> None:
    """Acked before its replay is confirmed, a letter would be gone with its job; never tried again, it would stay unseen."""
    await grave.bury(ALL)

    async def replay_all(admin: Admin, cut: Callable[[], None]) -> None:
        async with admin.dead(grave.queue) as letters:

            async def one(letter: DeadLetter) -> None:
                await letters.replay(letter, msgspec.structs.replace(letter.envelope, attempt=1, passes=1))
                if letter.job_id == "60":
                    cut()

            tasks: list[asyncio.Task[None]] = []
            try:
                async for letter in letters:
                    tasks.append(asyncio.create_task(one(letter)))
                    await asyncio.sleep(0)
            finally:
                results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(result is None or isinstance(result, LeveretError) for result in results), results

    async with FaultProxy(grave.port) as link:
        with pytest.raises(BrokerUnavailable):
            await replay_all(grave.admin(link.url), link.reset)
    there = {str(job.properties.message_id) for job in await grave.raw.look(grave.queue.name)}
    async with asyncio.timeout(20):
        while {*await grave.read()} | there != {*ALL}:  # the broker takes a moment to see that the reader is gone
            await asyncio.sleep(0.1)

    assert "60" in there
    await replay_all(grave.admin(), lambda: None)
    assert await grave.raw.count(grave.dead) == 0
    assert {str(job.properties.message_id) for job in await grave.raw.take_all(grave.queue.name)} == {*ALL}
