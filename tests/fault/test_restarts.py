"""A broker that is restarted again and again under load: all comes back, and nothing is left of what was before."""

import asyncio
import logging
from collections.abc import Generator

import pytest

from leveret import Publisher, Worker, WorkerState
from tests.fault.bench import eventually
from tests.fault.shop import Shop, census, id_of, until_census
from tests.nodes import ours
from tests.rabbit.node import Installation, Node, Rabbit

pytestmark = [pytest.mark.fault, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def node(rabbit_found: Rabbit | Installation) -> Generator[Node]:
    """The node of these tests, which they restart."""
    node = Node(ours(rabbit_found))
    try:
        asyncio.run(node.start())
        yield node
    finally:
        asyncio.run(node.close())


async def killed_and_started(node: Node) -> None:
    await node.kill9()
    await node.start()


async def stopped_and_started(node: Node) -> None:
    await node.eval("rabbit:stop(), rabbit:start().")


async def ready_again(worker: Worker, before: WorkerState) -> None:
    """Wait until the worker is ready after it was something else."""
    await eventually(lambda: worker.state().name == "ready" and worker.state().since > before.since, timeout_s=10)


async def test_all_consumers_are_back_after_each_restart_and_nothing_of_the_old_ones_is_left(node: Node) -> None:
    """R03, pain 1: a worker that is connected and takes nothing, or that leaves a consumer, a task or a socket behind each time."""
    shop = Shop(node.url, queues=3)
    published: list[str] = []
    enough = asyncio.Event()

    async def publish(publisher: Publisher) -> None:
        while not enough.is_set():
            jobs = [shop.job(number, resend=True) for number in range(3)]
            await publisher.publish_many(jobs, timeout_s=60)
            published.extend(map(id_of, jobs))
            await asyncio.sleep(0.03)

    async def some_more() -> None:
        wanted = len(published) + 30
        await eventually(lambda: len(published) >= wanted)

    async with shop.working() as (worker, publisher):
        await publisher.publish_many([shop.job(number) for number in range(3)], timeout_s=20)
        open_before = await census(node)
        publishing = asyncio.create_task(publish(publisher))
        for restarted in (stopped_and_started, killed_and_started, killed_and_started):
            await some_more()
            before = worker.state()
            await restarted(node)
            await ready_again(worker, before)
        await some_more()
        enough.set()
        await publishing
        await eventually(lambda: set(published) <= set(shop.runs))
        await until_census(node, open_before)


async def test_a_clean_stop_of_the_broker_is_one_line_at_its_beginning_and_one_at_its_end(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """R04: a maintenance that writes a line for each job that was running hides what doesn't come back."""
    caplog.set_level(logging.INFO, "leveret")
    shop = Shop(node.url)
    async with shop.working() as (worker, publisher):
        await publisher.publish_many([shop.job(seconds=0.5) for _ in range(200)], timeout_s=20)
        await eventually(lambda: len(shop.runs) >= 100)
        caplog.clear()
        before = worker.state()
        await stopped_and_started(node)
        await ready_again(worker, before)
        await eventually(lambda: len(shop.ends) == 200)
        said = [record.getMessage() for record in caplog.records if record.name.startswith("leveret")]

    assert sum(line.startswith("connecting: ") for line in said) == 1, said
    assert sum("consuming again" in line for line in said) == 1, said
    assert len(said) < 10, said
