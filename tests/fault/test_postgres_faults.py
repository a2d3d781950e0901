"""What becomes of jobs on PostgreSQL when workers, servers and clocks fail. Real processes, real signals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from leveret.broker import Delivery
from leveret.brokers.leases import BEAT_S, LEASE_S
from leveret.brokers.postgresql import open_broker
from leveret.job import Queue
from leveret.runtime import Runtime
from tests.conftest import StartPostgres
from tests.contract.harness import consume, make_envelope, soon, timed
from tests.fault.bench import Bench, eventually
from tests.fault.clock import OffClock
from tests.fault.load import Load
from tests.fault.strikes import JOBS, RATE, SLOW_S, kill_all_in_turn
from tests.postgres.node import Node, Postgres, migrate
from tests.proxy import FaultProxy

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


@pytest.mark.parametrize(("through", "within_s"), [("", 2.0), ("a pooler", 20.0)], ids=["direct", "pooler"])
async def test_a_killed_workers_jobs_run_elsewhere_in_time(
    postgres: Postgres, postgres_url: str, bench: MakeBench, through: str, within_s: float
) -> None:
    """A dead worker is seen by its backend's end, behind a pooler by its beats: otherwise its jobs would be held for ever."""
    url = f"{(await postgres.pooler()).url_of(postgres_url)}?prepared=off" if through else postgres_url
    made = bench(url)
    first = await made.working()
    ids = await made.publish(*(made.recorder.Note(60.0) for _ in range(5)))
    await made.until_lines("start", 5)
    await made.working()
    await asyncio.sleep(1.0)

    killed = time.monotonic()
    await asyncio.to_thread(first.kill9)
    await made.until_lines("start", 10)

    again = made.recorder.lines("start")[5:]
    assert {words[1] for words in again} == set(ids)
    assert max(float(words[4]) for words in again) - killed < within_s + SLOW_S


_OF_THE_DEAD = "SELECT count(*) FROM leveret.workers UNION ALL SELECT count(*) FROM leveret.claims WHERE crashes > 0"


@pytest.mark.timeout(240 + JOBS / 50)
async def test_kills_of_four_workers_and_of_the_server_lose_nothing(node: Node, bench: MakeBench) -> None:
    """The whole promise: what was confirmed runs, whoever dies, and only what ran at a kill runs again."""

    async def taken_back() -> bool:
        return [row[0] for row in await node.query(_OF_THE_DEAD)] == [3, 0]

    await kill_all_in_turn(bench(node.url), node, taken_back, 2 + SLOW_S)


async def test_each_job_starts_in_time_although_the_listening_connection_is_cut(postgres_url: str) -> None:
    """A notice that was sent meanwhile is gone: a job that waited for the next one would wait for the next publish."""
    queue = Queue("jobs")
    async with FaultProxy(urlsplit(postgres_url).port or 0) as link:
        worker, publisher = open_broker(link.url_of(postgres_url), RUNTIME), open_broker(postgres_url, RUNTIME)
        _, sink = await consume(worker, queue)
        for number in range(5):
            await publisher.publish(queue, timed(make_envelope(queue, b"before"), soon()))
            (await sink.next()).done()
            link.reset()
            cut = time.monotonic()
            await publisher.publish(queue, timed(make_envelope(queue, b"%d" % number), soon()))
            while (delivery := await sink.next()).envelope.body != b"%d" % number:
                assert delivery.redelivered  # the reset took its settlement along
                delivery.done()
            took_s = time.monotonic() - cut

            assert took_s < 1.1 + SLOW_S
            delivery.done()
        await worker.close()
        await publisher.close()


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
    async with Load(made, rate=RATE) as load:
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


async def test_a_promoted_asynchronous_standby_lacks_what_it_had_not_received_and_no_more(
    postgres_node: StartPostgres, bench: MakeBench
) -> None:
    """Who has no synchronous standby accepts a loss, and must know which: confirmed jobs may be missing, finished ones run again."""
    primary = await postgres_node()
    await migrate(primary.url)
    standby = await primary.standby(synchronous=False)
    made = bench(primary.url_with(standby))
    received = await made.publish(*(made.recorder.Note() for _ in range(20)))
    async with asyncio.timeout(40):
        while await standby.query("SELECT count(*) FROM leveret.jobs") != [(20,)]:
            await asyncio.sleep(0.02)
    await standby.query("ALTER SYSTEM SET primary_conninfo TO ''")
    await standby.query("SELECT pg_reload_conf()")
    async with asyncio.timeout(40):
        while await primary.query("SELECT FROM pg_stat_replication"):
            await asyncio.sleep(0.02)
    worker = await made.working()
    await made.until_ended(received)
    await worker.drained()
    missing = await made.publish(*(made.recorder.Note() for _ in range(20)))

    await primary.kill9()
    await standby.promote()
    later = await made.publish(*(made.recorder.Note() for _ in range(20)))
    worker = await made.working()
    await made.until_ended(later)
    await made.until_empty()
    await worker.drained()

    runs = made.recorder.ids("end")
    assert {*received, *missing, *later} - set(runs) == set(missing)
    assert sorted(runs) == sorted([*received, *received, *later])


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
    await one.publish(queue, timed(make_envelope(queue, b"after"), soon(30)))
    async with asyncio.timeout(40):
        while not sink.waiting + others.waiting:
            await asyncio.sleep(0.01)
    await asyncio.sleep(2.5)  # some looks at who is there

    assert all(delivery.live for delivery in held)
    assert sink.waiting + others.waiting == 1, "the job that was published after the restart, and no other"
    for delivery in held:
        delivery.done()
    await one.close()
    await other.close()
    assert len(await node.query("SELECT FROM leveret.jobs")) <= 1


async def test_no_clock_ends_a_lease_or_hastens_a_job(postgres_node: StartPostgres) -> None:
    """Leases by a clock end all at once when somebody sets it, and every job runs twice."""
    node = await postgres_node(clock=True)
    await migrate(node.url)
    queue = Queue("jobs")
    one, other = (open_broker(node.url, Runtime(app="fault", clock=OffClock(off_s))) for off_s in (-3600.0, 3600.0))
    await one.publish(queue, timed(make_envelope(queue, b"held"), soon()))
    _, sink = await consume(one, queue)
    held, since = await sink.next(), time.monotonic()
    _, others = await consume(other, queue)

    for ahead_s in (3600.0, -3600.0):
        node.step_clock(ahead_s)
        began = time.monotonic()
        await one.publish(queue, timed(make_envelope(queue, b"later"), soon(), delay_s=1.0, clock=OffClock(-3600.0)))
        delivery = await _either(sink.next(), others.next())
        assert delivery.envelope.body == b"later"
        assert time.monotonic() - began >= 0.9
        delivery.done()
    await asyncio.sleep(
        since + LEASE_S + BEAT_S + 1.0 - time.monotonic()
    )  # as long as the other needs to see that beats stand still

    assert held.live
    assert (sink.losses, others.losses, sink.waiting, others.waiting) == (0, 0, 0, 0)
    held.done()
    await one.close()
    assert await node.query("SELECT FROM leveret.jobs") == []
    await other.close()


async def test_a_stepped_server_clock_delays_a_job_by_the_step_at_most(postgres_node: StartPostgres) -> None:
    """The server's clock says what is due: where it was set back for a while, jobs must not wait once it is right again."""
    node = await postgres_node(clock=True)
    await migrate(node.url)
    queue = Queue("jobs")
    broker = open_broker(node.url, RUNTIME)
    _, sink = await consume(broker, queue)

    async def publish(body: bytes, delay_s: float) -> None:
        await broker.publish(queue, timed(make_envelope(queue, body), soon(), delay_s=delay_s))

    async def comes(body: bytes) -> float:
        """Return when the job came."""
        delivery = await sink.next()
        assert delivery.envelope.body == body
        delivery.done()
        return time.monotonic()

    published = time.monotonic()
    await publish(b"a second", 1.0)
    node.step_clock(-2.0)
    assert await comes(b"a second") - published < 1 + 2 + 1.1 + SLOW_S

    await publish(b"a while", 0.5)
    node.step_clock(-3602.0)
    await asyncio.sleep(1.5)
    assert sink.waiting == 0, "by the server's clock it is due in an hour"
    node.step_clock(-2.0)
    right = time.monotonic()
    assert await comes(b"a while") - right < 1.1 + SLOW_S

    await publish(b"half an hour", 1800.0)
    node.step_clock(3598.0)
    due = time.monotonic()
    assert await comes(b"half an hour") - due < 1.1 + SLOW_S
    await broker.close()


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
