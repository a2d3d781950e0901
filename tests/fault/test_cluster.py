"""A cluster of three nodes that die, restart and hang while a publisher and two workers, with all three addresses, go on."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.fault.bench import Bench, Worker
from tests.fault.load import Counts, Load
from tests.rabbit.cluster import Cluster
from tests.rabbit.node import Node

pytestmark = [pytest.mark.fault, pytest.mark.rabbit, pytest.mark.timeout(240)]

SLOTS = 20
"""Of each of the two workers: as many jobs may be running on a connection that is lost."""


@dataclass
class Site:
    """A queue whose leader is `leader`, on which publisher and workers begin, and its load."""

    cluster: Cluster
    bench: Bench
    leader: Node
    workers: list[Worker]
    record: Callable[[str, object], None]

    @property
    def follower(self) -> Node:
        """A node that nobody is connected to."""
        return self.cluster.others(self.leader)[-1]

    def result(self, load: Load, *, since: float = 0) -> Counts:
        """Return the counts, which hold whatever the fault was, and write them down."""
        counts = load.counts(since=since)
        self.record("counts", str(counts))
        print(counts, dict(load.refused))  # noqa: T201
        assert counts.lost == 0
        assert counts.strange == 0
        assert counts.late_s < 1.5, "a publish is answered by its deadline, give or take what a loaded machine costs"
        return counts


@pytest.fixture
async def site(cluster: Cluster, bench: Callable[..., Bench], record_property: Callable[[str, object], None]) -> Site:
    """Two workers that take jobs, all connected to the leader of their queue."""
    leader = cluster.nodes[0]
    one = bench(",".join(f"{url}?heartbeat_s=5" for url in cluster.url_from(leader).split(",")))
    workers = [await one.working("--concurrency", str(SLOTS)) for _ in range(2)]
    if await cluster.leader(one.queue.name) is not leader:
        await cluster.lead(one.queue.name, leader)
    return Site(cluster, one, leader, workers, record_property)


@pytest.mark.versions
async def test_the_leader_is_killed(site: Site) -> None:
    """R06. A node's death must cost seconds, not the jobs that it led, and nobody may wait for its return."""
    async with Load(site.bench) as load:
        struck = time.monotonic()
        await site.leader.kill9()
        await asyncio.sleep(8)
        await site.leader.start()
        await asyncio.sleep(3)
    counts = site.result(load, since=struck)
    assert counts.silence_s <= 5
    assert counts.repeated <= 2 * SLOTS


@pytest.mark.versions
async def test_a_follower_is_killed(site: Site) -> None:
    """R07. Two of three confirm: whoever isn't connected to the dead one must notice nothing."""
    async with Load(site.bench) as load:
        struck = time.monotonic()
        await site.follower.kill9()
        await asyncio.sleep(5)
        await site.follower.start()
        await asyncio.sleep(3)
    counts = site.result(load, since=struck)
    assert counts.confirmed == counts.published, load.refused
    assert counts.repeated == 0
    assert counts.silence_s <= 2


async def test_all_nodes_are_restarted_one_after_the_other(site: Site) -> None:
    """R08. An upgrade of the broker: each connection is lost about once, and at its end all workers must still be at work."""
    async with Load(site.bench) as load:
        for node in site.cluster.nodes:
            await node.stop()
            await node.start()
            await site.cluster.whole()
            await asyncio.sleep(2)
        upgraded = time.monotonic()
        await asyncio.sleep(3)
    counts = site.result(load)
    at_work = {int(words[3]) for words in site.bench.recorder.lines("end") if float(words[4]) > upgraded}
    assert at_work == {worker.process.pid for worker in site.workers}
    assert counts.repeated <= 3 * 2 * SLOTS


async def test_all_nodes_lose_their_power(site: Site) -> None:
    """R09. What was confirmed is on two disks: all of it runs once the nodes are back, without anybody's help."""
    async with Load(site.bench) as load:
        await asyncio.sleep(2)
        for node in site.cluster.nodes:
            await node.kill9()
        await asyncio.sleep(1)
        await asyncio.gather(*(node.start() for node in site.cluster.nodes))
        back, before = time.monotonic(), len(site.bench.recorder.ids("end"))
        await site.bench.until_lines("end", before + 1)
        took = time.monotonic() - back
        await asyncio.sleep(5)
    counts = site.result(load)
    assert took <= 10
    assert counts.repeated <= 2 * SLOTS


async def test_the_leader_hangs(site: Site) -> None:
    """R10. A hung node keeps its connections and answers nothing: its clients must leave it by themselves."""
    async with Load(site.bench) as load:
        struck = time.monotonic()
        site.leader.pause()
        await asyncio.sleep(25)
        site.leader.resume()
        await asyncio.sleep(5)
        await site.cluster.whole()
    counts = site.result(load, since=struck)
    assert counts.silence_s <= 20
    assert counts.repeated <= 2 * SLOTS


@pytest.mark.versions
async def test_the_leader_is_cut_off_from_its_peers(site: Site) -> None:
    """A minority pauses itself late, on 4.3 never, and is silent until then: what nobody held must go on elsewhere."""
    async with Load(site.bench) as load:
        struck = time.monotonic()
        site.cluster.isolate(site.leader)
        await asyncio.sleep(25)
        site.cluster.heal()
        await site.cluster.whole()
    counts = site.result(load, since=struck)
    assert counts.silence_s <= 15
    assert counts.repeated <= 2 * 2 * SLOTS, "what the two workers held: acks that were written in the cut may be lost"
