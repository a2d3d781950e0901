"""A broker that is restarted again and again under load: all comes back, and nothing is left of what was before."""

import asyncio
import logging

import pytest

from leveret import Publisher
from tests.conftest import StartNode
from tests.fault.bench import eventually
from tests.fault.shop import Shop, census, id_of
from tests.rabbit.node import Node

pytestmark = [pytest.mark.fault, pytest.mark.timeout(180)]


async def killed_and_started(node: Node) -> None:
    await node.kill9()
    await node.start()


async def stopped_and_started(node: Node) -> None:
    await node.ctl("stop_app")
    await node.ctl("start_app")


async def test_all_consumers_are_back_after_each_restart_and_nothing_of_the_old_ones_is_left(
    rabbit_node: StartNode,
) -> None:
    """R03, pain 1: a worker that is connected and takes nothing, or that leaves a consumer, a task or a socket behind each time."""
    node = await rabbit_node()
    shop = Shop(node.url, queues=3)
    published: list[str] = []
    names: set[str] = set()
    enough = asyncio.Event()

    async def publish(publisher: Publisher) -> None:
        while not enough.is_set():
            jobs = [shop.job(number, resend=True) for number in range(3)]
            await publisher.publish_many(jobs, timeout_s=60)
            published.extend(map(id_of, jobs))
            await asyncio.sleep(0.03)

    async def hundred_more() -> None:
        wanted = len(published) + 100
        await eventually(lambda: len(published) >= wanted)

    async with shop.working() as (worker, publisher):
        await publisher.publish_many([shop.job(number) for number in range(3)], timeout_s=20)
        await node.flush()
        before = await census(node)
        publishing = asyncio.create_task(publish(publisher))
        for restarted in (killed_and_started, stopped_and_started, killed_and_started):
            await hundred_more()
            restart = asyncio.create_task(restarted(node))
            while not restart.done():
                names.add(worker.state().name)
                await asyncio.sleep(0.05)
            await restart
            assert "connecting" in names
            names.clear()
            await eventually(lambda: worker.state().name == "ready", timeout_s=10)
        await hundred_more()
        enough.set()
        await publishing
        await eventually(lambda: set(published) <= set(shop.runs))
        await eventually(lambda: len(asyncio.all_tasks()) <= before.tasks)
        after = await census(node)

    assert after == before


async def test_a_clean_stop_of_the_broker_is_one_line_at_its_beginning_and_one_at_its_end(
    rabbit_node: StartNode, caplog: pytest.LogCaptureFixture
) -> None:
    """R04: a maintenance that writes a line for each job that was running hides what doesn't come back."""
    caplog.set_level(logging.INFO, "leveret")
    node = await rabbit_node()
    shop = Shop(node.url)
    async with shop.working() as (worker, publisher):
        await publisher.publish_many([shop.job(seconds=0.5) for _ in range(400)], timeout_s=20)
        await eventually(lambda: len(shop.runs) >= 100)
        caplog.clear()
        await node.stop()
        await eventually(lambda: worker.state().name == "connecting")
        await node.start()
        await eventually(lambda: worker.state().name == "ready", timeout_s=10)
        await eventually(lambda: len(shop.ends) == 400)
        said = [record.getMessage() for record in caplog.records if record.name.startswith("leveret")]

    assert sum(line.startswith("connecting: ") for line in said) == 1, said
    assert sum("consuming again" in line for line in said) == 1, said
    assert len(said) < 10, said
