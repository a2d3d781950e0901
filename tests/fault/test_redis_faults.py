"""What becomes of jobs on Redis when workers, servers, links and clocks fail. Real processes, real signals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio

from leveret import App, Attempt, Job, Keep, Retry
from leveret.broker import Broker
from leveret.brokers.leases import BEAT_S, LEASE_S
from leveret.brokers.redis import open_admin, open_broker
from leveret.errors import BrokerUnavailable, PublishTimeout
from leveret.job import Queue
from leveret.runtime import Runtime
from tests.conftest import StartRedis
from tests.contract.harness import Recorder, consume, depth, make_envelope, soon, timed
from tests.fault.bench import Bench, eventually
from tests.fault.clock import OffClock
from tests.fault.load import Load
from tests.fault.strikes import JOBS, SLOW_S, kill_all_in_turn
from tests.nodes import ours
from tests.proxy import FaultProxy
from tests.redis.node import Cluster, Found, Node, Sentinels

pytestmark = [pytest.mark.fault, pytest.mark.timeout(240)]

RUNTIME = Runtime(app="fault")
MakeBench = Callable[..., Bench]
TAKEN_S = 20.0
"""Within this a killed worker's jobs begin elsewhere, seconds."""


@pytest_asyncio.fixture
async def node(redis_node: StartRedis) -> Node:
    """A server of the test's own, which has each write on its disk before it answers."""
    return await redis_node(conf={"appendfsync": "always"})


@pytest_asyncio.fixture
async def sentinels(redis_found: Found) -> AsyncGenerator[Sentinels]:
    """A primary, a replica and three sentinels of the test's own."""
    started = Sentinels(ours(redis_found))
    try:
        await started.start()
        yield started
    finally:
        await started.close()


@pytest_asyncio.fixture
async def cluster(redis_found: Found) -> AsyncGenerator[Cluster]:
    """Three primaries, each with a replica, of the test's own."""
    started = Cluster(ours(redis_found), replicas=True)
    try:
        await started.start()
        yield started
    finally:
        await started.close()


@asynccontextmanager
async def brokers(*made: Broker) -> AsyncGenerator[tuple[Broker, ...]]:
    """Close brokers in the end."""
    try:
        yield made
    finally:
        await asyncio.gather(*(broker.close() for broker in made))


async def until_settled(server: Node, queue: Queue, left: int = 0) -> None:
    """Wait until the server holds so many jobs for workers."""
    admin = open_admin(server.url, RUNTIME)
    async with asyncio.timeout(40):
        while (await depth(admin, queue)).unsettled != left:
            await asyncio.sleep(0.05)
    await admin.close()


async def publish(broker: Broker, queue: Queue, *bodies: bytes) -> None:
    """Publish jobs one after another; each is confirmed."""
    for body in bodies:
        await broker.publish(queue, timed(make_envelope(queue, body), soon(30)))


async def take(sink: Recorder, body: bytes) -> None:
    """Take deliveries, and settle them, until this one has come."""
    async with asyncio.timeout(40):
        while True:
            delivery = await sink.next(40)
            delivery.done()
            if delivery.envelope.body == body:
                return


@pytest.mark.timeout(600 + JOBS / 50)
async def test_kills_of_four_workers_and_of_the_server_lose_nothing(node: Node, bench: MakeBench) -> None:
    """The whole promise: what was confirmed runs, whoever dies, and only what ran at a kill runs again."""
    made = bench(node.url)

    async def taken_back() -> bool:
        return await node.command("HLEN", f"lv:{{{made.queue.name}}}:workers") == 3

    await kill_all_in_turn(made, node, taken_back, TAKEN_S + SLOW_S)


async def test_a_killed_server_with_a_file_of_each_second_lacks_no_more_than_that(
    redis_node: StartRedis, bench: MakeBench, record_property: Callable[[str, object], None]
) -> None:
    """Most servers sync each second: what a crash costs must be known, and be no more than the docs say."""
    node = await redis_node()
    made = bench(node.url)
    await made.working()
    async with Load(made, rate=500, losing=True) as load:
        await asyncio.sleep(1.0)
        before = set(load.confirmed)
        await asyncio.sleep(2.0)
        await node.kill9()
        await node.start()
        confirmed = len(load.confirmed)
        await eventually(lambda: len(load.confirmed) > confirmed + 200, lambda: str(load.counts()), timeout_s=60)
    await made.until_empty()

    counts = load.counts()
    record_property("counts", str(counts))
    assert counts.strange == 0
    assert not (load.confirmed - set(made.recorder.ids("start"))) & before, "what was synced is there"


async def test_each_job_starts_in_time_although_its_notice_is_lost(node: Node) -> None:
    """A notice is heard or gone: a job that waited for the next one would wait for the next publish."""
    queue = Queue("jobs")
    async with (
        FaultProxy(node.port) as link,
        brokers(open_broker(link.url_of(node.url), RUNTIME), open_broker(node.url, RUNTIME)) as (worker, publisher),
    ):
        _, sink = await consume(worker, queue)
        for number in range(5):
            await publish(publisher, queue, b"before")
            (await sink.next()).done()
            link.reset()
            cut = time.monotonic()
            await publish(publisher, queue, b"%d" % number)
            while (delivery := await sink.next()).envelope.body != b"%d" % number:
                assert delivery.redelivered  # the reset took its settlement along
                delivery.done()
            took_s = time.monotonic() - cut

            assert took_s < 1.1 + SLOW_S
            delivery.done()


async def test_each_job_starts_in_time_where_no_notice_may_be_sent(redis_node: StartRedis) -> None:
    """Hosted servers forbid channels by default: jobs must start within a second by looking alone."""
    node, queue = await redis_node(), Queue("jobs")
    async with (
        node.user("~*", "resetchannels", "+@all", "-config") as url,
        brokers(open_broker(url, RUNTIME), open_broker(url, RUNTIME)) as (worker, publisher),
    ):
        _, sink = await consume(worker, queue)
        await publish(publisher, queue, b"first")
        (await sink.next()).done()
        for number in range(3):
            await asyncio.sleep(1.5)  # by now the worker looks only each second
            published = time.monotonic()
            await publish(publisher, queue, b"%d" % number)
            delivery = await sink.next()

            assert time.monotonic() - published < 1.1 + SLOW_S
            delivery.done()


async def test_no_clock_ends_a_lease_or_hastens_a_job(node: Node) -> None:
    """Leases by a clock end all at once when somebody sets it, and every job runs twice."""
    queue = Queue("jobs")
    one, other = (open_broker(node.url, Runtime(app="fault", clock=OffClock(off_s))) for off_s in (-3600.0, 3600.0))
    async with brokers(one, other):
        await publish(one, queue, b"held")
        _, sink = await consume(one, queue)
        held, since = await sink.next(), time.monotonic()
        _, others = await consume(other, queue)

        for publisher, off_s in ((one, -3600.0), (other, 3600.0)):
            began = time.monotonic()
            later = timed(make_envelope(queue, b"later"), soon(), delay_s=1.0, clock=OffClock(off_s))
            await publisher.publish(queue, later)
            published = time.monotonic()
            async with asyncio.timeout(40):
                while not sink.waiting + others.waiting:
                    await asyncio.sleep(0.01)
            delivery = await (sink if sink.waiting else others).next()
            came = time.monotonic()
            assert came - began >= 0.9, "the delay counts from the call: a slow disk confirms it later"
            assert came - published < 1 + 1.1 + SLOW_S
            delivery.done()
        # as long as the other needs to see that beats stand still
        await asyncio.sleep(since + LEASE_S + BEAT_S + 1.0 - time.monotonic())

        assert held.live
        assert (sink.losses, others.losses, sink.waiting, others.waiting) == (0, 0, 0, 0)
        held.done()


async def test_a_restarted_server_costs_no_lease(node: Node) -> None:
    """All connections end at once: workers that took that for each other's death would run everything twice."""
    queue = Queue("jobs")
    one, other = open_broker(node.url, RUNTIME), open_broker(node.url, RUNTIME)
    async with brokers(one, other):
        await publish(one, queue, *(b"%d" % number for number in range(5)))
        _, sink = await consume(one, queue)
        held = await sink.take(5)
        _, others = await consume(other, queue)
        await asyncio.sleep(1.5)  # no turn is under way

        await node.kill9()
        await node.start()
        await publish(one, queue, b"after")
        async with asyncio.timeout(40):
            while not sink.waiting + others.waiting:
                await asyncio.sleep(0.01)
        await asyncio.sleep(2.5)  # some looks at who is there

        assert all(delivery.live for delivery in held)
        assert sink.waiting + others.waiting == 1, "the job that was published after the restart, and no other"
        for delivery in held:
            delivery.done()


async def test_a_hung_server_is_left_in_time_and_taken_again(node: Node) -> None:
    """A hang has no error: a publish without a deadline would hang with it, and so would the web service."""
    queue = Queue("jobs")
    async with brokers(open_broker(node.url, RUNTIME)) as (broker,):
        _, sink = await consume(broker, queue)
        await publish(broker, queue, b"before")
        await take(sink, b"before")
        node.pause()
        began = time.monotonic()
        refused = await asyncio.gather(
            *(broker.publish(queue, timed(make_envelope(queue), began + 1.0)) for _ in range(5)), return_exceptions=True
        )
        took_s = time.monotonic() - began
        node.resume()
        await publish(broker, queue, b"after")

        assert all(isinstance(error, (PublishTimeout, BrokerUnavailable)) for error in refused), refused
        assert took_s < 1 + SLOW_S
        await take(sink, b"after")


async def test_scripts_that_the_server_forgot_are_loaded_again(node: Node) -> None:
    """A restart, a fail-over and an administrator empty the server's scripts: each turn would fail from then on."""
    queue = Queue("jobs")
    async with brokers(open_broker(node.url, RUNTIME)) as (broker,):
        _, sink = await consume(broker, queue)
        for number in range(3):
            await publish(broker, queue, b"%d" % number)
            await node.command("SCRIPT", "FLUSH")
            await take(sink, b"%d" % number)
        await node.command("SCRIPT", "FLUSH")

        await publish(broker, queue, b"last")
        await take(sink, b"last")


async def test_a_full_server_refuses_jobs_and_settles_those_that_it_has(node: Node) -> None:
    """A server that is full of jobs gets room only by finishing them: workers that couldn't settle would never end that."""
    queue = Queue("jobs")
    async with brokers(open_broker(node.url, RUNTIME)) as (broker,):
        await publish(broker, queue, *(b"%d" % number for number in range(20)))
        _, sink = await consume(broker, queue)
        held = await sink.take(20)
        await node.configure("maxmemory", 1)

        with pytest.raises(BrokerUnavailable):
            await broker.publish(queue, timed(make_envelope(queue), soon(5)))
        for delivery in held:
            delivery.done()
        await until_settled(node, queue)

        await node.configure("maxmemory", 0)
        await publish(broker, queue, b"after")
        await take(sink, b"after")
        assert sink.losses == 0


@pytest.mark.timeout(240 + JOBS / 1000)
async def test_nothing_is_kept_of_finished_jobs(node: Node, record_property: Callable[[str, object], None]) -> None:
    """Servers full of finished work are what operators complain of: the memory after many jobs is that before them."""
    queue, count = Queue("jobs"), max(5_000, JOBS)
    async with brokers(open_broker(node.url, RUNTIME)) as (broker,):
        _, sink = await consume(broker, queue, prefetch=500)

        async def work() -> None:
            """Publish and finish `count` jobs."""
            for _ in range(count // 500):
                jobs = [timed(make_envelope(queue, b"x" * 300), soon(60)) for _ in range(500)]
                await asyncio.gather(*(broker.publish(queue, job) for job in jobs))
                for delivery in await sink.take(len(jobs)):
                    delivery.done()
            await until_settled(node, queue)

        async def kept() -> tuple[int, int]:
            """Return how many octets, without those of clients, and how many keys the server has."""
            used = await node.info("memory")
            return int(used["used_memory"]) - int(used["mem_clients_normal"]), await node.command("DBSIZE")

        await work()
        octets, keys = await kept()
        await work()
        ends, most = time.monotonic() + 40, 50_000 + count / 2  # what a server needs by itself varies by some pages
        while (more := (await kept())[0] - octets) >= most:  # it counts clients that came or went a while later
            assert time.monotonic() < ends, f"{more} octets more after {count} jobs"
            await asyncio.sleep(0.1)

        record_property("counts", f"{more} octets more after {count} jobs")
        assert (await kept())[1] == keys


async def test_what_a_dead_worker_holds_comes_back_although_somebody_deleted_the_leases(node: Node) -> None:
    """Who tidies dead workers up by hand would leave their jobs where nobody looks."""
    queue = Queue("jobs")
    async with (
        FaultProxy(node.port) as link,
        brokers(open_broker(link.url_of(node.url), RUNTIME), open_broker(node.url, RUNTIME)) as (dying, other),
    ):
        _, sink = await consume(dying, queue, prefetch=1)
        await publish(other, queue, b"held")
        await sink.next()
        _, others = await consume(other, queue)
        await publish(other, queue, b"next")
        await take(others, b"next")  # by now it knows the lease of the other one
        link.freeze()

        await node.command("DEL", f"lv:{{{queue.name}}}:workers")

        delivery = await others.next(LEASE_S)
        assert (delivery.envelope.body, delivery.redelivered) == (b"held", True)
        delivery.done()
        link.thaw()


@pytest.mark.parametrize("confirm", ["memory", "replica"])
async def test_a_promoted_replica_lacks_what_it_had_not_received_and_no_more(
    redis_node: StartRedis, confirm: str
) -> None:
    """Replicas follow later: a confirm that waits for one is worth its time, and one that doesn't must not be sold as more."""
    primary, queue = await redis_node(), Queue("jobs")
    replica = await primary.replica()
    async with brokers(open_broker(f"{primary.url}?confirm={confirm}", RUNTIME)) as (broker,):
        await publish(broker, queue, b"received")
        assert await primary.command("WAIT", 1, 30_000) == 1
        await replica.detach()
        refused = False
        try:
            await broker.publish(queue, timed(make_envelope(queue, b"missing"), soon(2.0)))
        except PublishTimeout as error:
            refused = error.maybe_published

        await primary.kill9()
        await replica.promote()

    assert refused is (confirm == "replica"), "what no replica has isn't confirmed"
    async with brokers(open_broker(replica.url, RUNTIME)) as (broker,):
        _, sink = await consume(broker, queue)
        await publish(broker, queue, b"later")
        found = {(await sink.next()).envelope.body}
        while b"later" not in found:
            found.add((await sink.next()).envelope.body)
    assert found == {b"received", b"later"}


async def test_what_a_promoted_replica_holds_for_a_worker_that_has_finished_it_is_freed(redis_node: StartRedis) -> None:
    """The replica knows nothing of the last settlements, and the worker lives: nobody else would ever free those jobs."""
    primary, queue = await redis_node(), Queue("jobs")
    replica = await primary.replica()
    async with (
        FaultProxy(primary.port) as link,
        brokers(open_broker(link.url_of(primary.url), RUNTIME)) as (broker,),
    ):
        await publish(broker, queue, b"finished", b"running")
        _, sink = await consume(broker, queue)
        finished, running = await sink.take(2)
        assert await primary.command("WAIT", 1, 30_000) == 1
        await replica.detach()
        finished.done()
        await until_settled(primary, queue, left=1)

        await primary.kill9()
        await replica.promote()
        link.turn_to(replica.port)
        link.reset()

        again = await sink.next(40)
        assert (again.envelope.body, again.redelivered) == (b"finished", True)
        assert running.live
        again.done()
        running.done()
        await until_settled(replica, queue)
        assert (sink.waiting, sink.losses) == (0, 0)


@pytest.mark.parametrize("confirm", ["memory", "replica"])
async def test_a_replica_is_promoted_under_500_jobs_a_second(
    sentinels: Sentinels, bench: MakeBench, confirm: str, record_property: Callable[[str, object], None]
) -> None:
    """High availability is why teams run sentinels: work must go on without a hand, and the loss must be known."""
    made = bench(f"{sentinels.url}&confirm={confirm}")
    await made.working()
    primary = await sentinels.primary()
    async with Load(made, rate=500, losing=True) as load:
        await asyncio.sleep(1.0)
        before = set(load.confirmed)
        await asyncio.sleep(1.0)
        killed = time.monotonic()
        await primary.kill9()
        await sentinels.promoted(primary)
        confirmed = len(load.confirmed)
        await eventually(lambda: len(load.confirmed) > confirmed + 200, lambda: str(load.counts()), timeout_s=60)
        took_s = time.monotonic() - killed
    await made.until_empty()

    counts = load.counts()
    record_property("counts", str(counts))
    lost = load.confirmed - set(made.recorder.ids("start"))
    assert counts.strange == 0
    assert not lost & before, "only what was confirmed in the second before the kill can be missing"
    if confirm == "replica":
        assert counts.lost == 0
    assert took_s < 30
    assert counts.late_s < SLOW_S, "each publish has its answer in time"


async def test_workers_follow_when_an_administrator_makes_the_primary_a_replica(
    sentinels: Sentinels, bench: MakeBench
) -> None:
    """The old server answers as before, and refuses each write: who stayed with it would stand still for ever."""
    made = bench(sentinels.url)
    worker = await made.working()
    async with Load(made, losing=True) as load:
        await sentinels.fail_over()
        confirmed = len(load.confirmed)
        await eventually(lambda: len(load.confirmed) > confirmed + 50, lambda: f"{load.counts()} {load.refused}")
    await made.until_empty()

    assert load.counts().strange == 0
    await worker.drained()


async def test_a_cluster_goes_on_when_a_node_dies(cluster: Cluster, bench: MakeBench) -> None:
    """A third of all queues stand on the node: they go on with its replica, and the other queues don't even notice."""
    made = bench(cluster.url)
    worker = await made.working()
    primary = await cluster.owner(f"{{{made.queue.name}}}")
    async with Load(made, losing=True) as load:
        await primary.kill9()
        await cluster.taken_over(primary)
        confirmed = len(load.confirmed)
        await eventually(lambda: len(load.confirmed) > confirmed + 50, lambda: f"{load.counts()} {load.refused}")
    await made.until_empty()

    assert load.counts().strange == 0
    assert load.counts().late_s < SLOW_S
    await worker.drained()


async def test_slots_that_move_lose_and_repeat_nothing(cluster: Cluster, bench: MakeBench) -> None:
    """A cluster that grows moves slots under load: MOVED and ASK aren't errors, and say that nothing was done."""
    made = bench(cluster.url)
    worker = await made.working()
    tag = f"{{{made.queue.name}}}"
    async with Load(made) as load:
        for _ in range(2):
            owner = await cluster.owner(tag)
            await cluster.move(tag, next(node for node in cluster.primaries if node is not owner))
            confirmed = len(load.confirmed)
            await eventually(lambda: len(load.confirmed) > confirmed + 50, lambda: f"{load.counts()} {load.refused}")  # noqa: B023 - awaited at once
    await made.until_empty()

    counts = load.counts()
    assert (counts.lost, counts.strange, counts.repeated) == (0, 0, 0)
    await worker.drained()


class Sum(Job[int], name="sum", queue=Queue("sums"), keep=Keep()):
    """A job with a result."""

    n: int
    fails: bool = False


async def test_results_of_a_full_server_come_once_it_has_room(node: Node) -> None:
    """One Redis with jobs and results that is full refuses the results: a worker that waited for it would finish nothing and free nothing."""
    full, app = asyncio.Event(), App("sums", broker=node.url, store=node.url)

    @app.handler(job=Sum)
    async def add(job: Sum, attempt: Attempt) -> int:
        await full.wait()
        if job.fails and attempt.number == 1:
            raise Retry(0.1)
        return job.n

    async with app.worker(), app.publisher() as publisher:
        handles = [await publisher.publish(Sum(n, fails=n % 2 == 1), timeout_s=30) for n in range(20)]
        await node.configure("maxmemory", 1)
        full.set()
        await until_settled(node, Queue("sums"))
        with pytest.raises(TimeoutError):
            await handles[0].result(timeout_s=0.2)
        await node.configure("maxmemory", 0)
        results = await asyncio.gather(*(handle.result(timeout_s=40) for handle in handles))

    assert results == list(range(20))
