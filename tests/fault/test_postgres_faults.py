"""What becomes of jobs on PostgreSQL when workers, servers and clocks fail. Real processes, real signals."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Coroutine

import pytest
import pytest_asyncio

from leveret.broker import Delivery
from leveret.brokers.postgresql import open_broker
from leveret.job import Queue
from leveret.runtime import Runtime
from tests.conftest import StartPostgres
from tests.contract.harness import consume, make_envelope, soon, timed
from tests.fault.bench import Bench, eventually
from tests.fault.load import Load
from tests.postgres.node import Node, migrate

pytestmark = [pytest.mark.fault, pytest.mark.timeout(240)]

RUNTIME = Runtime(app="fault")
MakeBench = Callable[..., Bench]


@pytest_asyncio.fixture
async def node(postgres_node: StartPostgres) -> AsyncGenerator[Node]:
    """A server of the test's own, with leveret's tables."""
    started = await postgres_node()
    await migrate(started.url)
    yield started


async def _either(*waiting: Coroutine[None, None, Delivery]) -> Delivery:
    """Return the delivery that comes first."""
    tasks = [asyncio.ensure_future(one) for one in waiting]
    done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in left:
        task.cancel()
    return done.pop().result()


async def test_a_killed_workers_jobs_run_elsewhere_within_two_seconds(postgres_url: str, bench: MakeBench) -> None:
    """Without its backend's end the others would wait for its beats: 15 to 20 s for what has nobody."""
    made = bench(postgres_url)
    first = await made.working()
    ids = await made.publish(*(made.recorder.Note(30.0) for _ in range(5)))
    await made.until_lines("start", 5)
    second = made.start()
    await second.says("takes jobs from")
    await asyncio.sleep(1.0)

    await asyncio.to_thread(first.kill9)
    killed = time.monotonic()
    await made.until_lines("start", 10)
    took_s = time.monotonic() - killed

    assert {words[1] for words in made.recorder.lines("start")} == set(ids)
    assert took_s < 2 + 1, "a slow machine's second"


async def test_kills_of_workers_and_of_the_server_lose_nothing(node: Node, bench: MakeBench) -> None:
    """The whole promise: what was confirmed runs, whoever dies."""
    made, rng = bench(node.url), random.Random(21)
    workers = [await made.working() for _ in range(2)]
    async with Load(made, rate=100) as load:
        for kill in range(4):
            await asyncio.sleep(rng.uniform(0.3, 1.0))
            if kill % 2:
                await node.kill9()
                await node.start()
            else:
                await asyncio.to_thread(workers[0].kill9)
                workers[0] = made.start()
        await asyncio.sleep(2.0)

    counts = load.counts()
    assert (counts.lost, counts.strange) == (0, 0)
    assert counts.late_s < 1
    # what ran or wasn't acknowledged at each of the four kills
    assert counts.repeated <= 4 * 2 * 100


@pytest.mark.parametrize(("hangs", "limit_s"), [(False, 10 + 5), (True, 10 + 10 + 5)], ids=["killed", "hung"])
async def test_a_promoted_synchronous_standby_has_all_that_was_confirmed(
    postgres_node: StartPostgres, bench: MakeBench, hangs: bool, limit_s: float
) -> None:
    """High availability is why teams run two: a confirm that the standby doesn't know is a lost job."""
    primary = await postgres_node()
    await migrate(primary.url)
    standby = await primary.standby(synchronous=True)
    made = bench(primary.url_with(standby))
    await made.working()
    async with Load(made, rate=100) as load:
        await asyncio.sleep(1.0)
        primary.pause() if hangs else await primary.kill9()
        killed = time.monotonic()
        await standby.promote()
        await standby.query("ALTER SYSTEM SET synchronous_standby_names TO ''")
        await standby.query("SELECT pg_reload_conf()")
        before = len(load.confirmed)
        await eventually(lambda: len(load.confirmed) > before + 50, lambda: str(load.counts()), timeout_s=60)
        took_s = time.monotonic() - killed

    counts = load.counts()
    assert (counts.lost, counts.strange) == (0, 0)
    assert took_s < limit_s, "a slow machine's promotion takes some seconds itself"


async def test_a_restarted_server_costs_no_lease(node: Node) -> None:
    """All backends end at once: workers that took that for each other's death would run everything twice."""
    queue = Queue("jobs")
    one, other = open_broker(node.url, RUNTIME), open_broker(node.url, RUNTIME)
    for number in range(5):
        await one.publish(queue, timed(make_envelope(queue, b"%d" % number), soon()))
    _, sink = await consume(one, queue)
    held = await sink.take(5)
    _, others = await consume(other, queue)
    await asyncio.sleep(1.5)  # no turn is under way

    await node.stop()
    await node.start()
    await one.publish(queue, timed(make_envelope(queue, b"after"), soon()))
    await asyncio.sleep(2.5)  # some looks at who is there

    assert all(delivery.live for delivery in held)
    assert sink.waiting + others.waiting == 1, "the job that was published after the restart, and no other"
    for delivery in held:
        delivery.done()
    await one.close()
    await other.close()
    assert len(await node.query("SELECT FROM leveret.jobs")) <= 1


async def test_a_stepped_server_clock_ends_no_lease_and_hastens_no_job(postgres_node: StartPostgres) -> None:
    """Leases by a clock end all at once when somebody sets it, and every job runs twice."""
    node = await postgres_node(clock=True)
    await migrate(node.url)
    queue = Queue("jobs")
    one, other = open_broker(node.url, RUNTIME), open_broker(node.url, RUNTIME)
    await one.publish(queue, timed(make_envelope(queue, b"held"), soon()))
    _, sink = await consume(one, queue)
    held = await sink.next()
    _, others = await consume(other, queue)

    for ahead_s in (3600.0, -3600.0):
        node.step_clock(ahead_s)
        await one.publish(queue, timed(make_envelope(queue, b"later"), soon(), delay_s=1.0))
        published = time.monotonic()
        delivery = await _either(sink.next(), others.next())
        assert delivery.envelope.body == b"later"
        assert time.monotonic() - published >= 0.9
        delivery.done()

    assert held.live
    assert sink.losses == others.losses == 0
    await one.close()
    await other.close()


async def test_a_hung_server_is_left_in_time_and_taken_again(node: Node) -> None:
    """A hang has no error: a publish without a deadline would hang with it, and so would the web service."""
    queue = Queue("jobs")
    broker = open_broker(node.url, RUNTIME)
    _, sink = await consume(broker, queue)
    await broker.publish(queue, timed(make_envelope(queue, b"before"), soon()))
    (await sink.next()).done()
    node.pause()
    began = time.monotonic()
    refused = await asyncio.gather(
        *(broker.publish(queue, timed(make_envelope(queue), began + 1.0)) for _ in range(5)), return_exceptions=True
    )
    took_s = time.monotonic() - began
    node.resume()
    await broker.publish(queue, timed(make_envelope(queue, b"after"), soon(30)))

    assert all(isinstance(error, Exception) for error in refused)
    assert took_s < 3
    async with asyncio.timeout(30):
        while (await sink.next(30)).envelope.body != b"after":
            pass
    await broker.close()
