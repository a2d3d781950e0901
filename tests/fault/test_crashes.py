"""A job that ends the process that runs it is set aside and buried; its neighbours are done."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest

from leveret import App, Attempt, Job
from leveret.consuming.worker import working
from leveret.ids import new_job_id
from leveret.outcome import Kind
from tests.conftest import StartNode
from tests.fault.bench import Bench, eventually
from tests.rabbit.node import Rabbit
from tests.rabbit.raw import connect

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]


async def test_a_job_that_kills_its_worker_is_buried_and_its_neighbours_are_done(any_bench: Bench) -> None:
    """R24. One bad image would take down a worker each second, with whatever runs beside it, until somebody is awake."""
    bench = any_bench
    before = await bench.publish(*(bench.recorder.Note(0.2) for _ in range(50)))
    [fatal] = await bench.publish(bench.recorder.Fatal())
    after = await bench.publish(*(bench.recorder.Note(0.2) for _ in range(50)))
    await bench.working("--processes", "2")
    await bench.until_ended([*before, *after], timeout_s=140)  # on Redis each death is seen 15 to 20 s later
    await bench.until_empty(dead=1)
    async with bench.admin() as admin, admin.dead(bench.queue) as letters:
        [letter] = [letter async for letter in letters]

    starts = Counter(bench.recorder.ids("start"))
    assert letter.envelope.job_id == fatal
    assert letter.envelope.crashes == 5
    assert "worker_lost: 5 workers died while they ran this job" in letter.envelope.errors
    assert starts.pop(fatal) == 5
    assert set(starts) == {*before, *after}
    assert max(starts.values()) <= 3, "no neighbour is in flight at more than two of its deaths"


async def test_five_rolling_restarts_under_load_count_no_crash(any_bench: Bench) -> None:
    """After two deploys in an hour some hundred jobs would run one by one, each with the whole process waiting for it."""
    bench, seen = any_bench, list[int]()
    ids = await bench.publish(*(bench.recorder.Note(0.1) for _ in range(4000)))
    start = partial(bench.working, "--concurrency", "20")
    workers = every = [await start(), await start()]
    for _ in range(5):
        await bench.until_lines("start", len(bench.recorder.ids("start")) + 100)
        following = await asyncio.gather(start(), start(), *(worker.drained() for worker in workers))
        workers = [worker for worker in following if worker is not None]
        every = [*every, *workers]
        seen.append((await bench.depth()).levels.get("suspects", 0))
    await bench.until_ended(ids)
    await bench.until_empty()
    await asyncio.gather(*(worker.drained() for worker in workers))

    assert Counter(bench.recorder.ids("start")) == Counter(ids), "each ran once"
    assert seen == [0] * 5
    assert [worker.log for worker in every if "may have died" in worker.log] == []


async def test_a_restart_of_the_broker_is_no_crash(bench: Callable[..., Bench], rabbit_node: StartNode) -> None:
    """Everything that four workers hold comes back at once: run one by one it would take an hour, and some would be buried."""
    node = await rabbit_node()
    one = bench(node.url)
    ids = await one.publish(*(one.recorder.Note(2.0) for _ in range(800)))
    workers = [await one.working("--concurrency", "100") for _ in range(4)]
    await one.until_lines("start", 400)
    await node.kill9()
    await node.start()
    await one.until_ended(ids, timeout_s=90)
    await one.until_empty()
    for worker in workers:
        await worker.drained()

    starts = Counter(one.recorder.ids("start"))
    assert set(starts) == set(ids)
    assert max(starts.values()) <= 2
    assert not [worker.log for worker in workers if "runs alone" in worker.log or "worker_lost" in worker.log]


@pytest.mark.parametrize("kind", ["quorum", "classic"])
async def test_a_job_that_waits_too_long_in_a_worker_keeps_its_place_and_is_no_suspect(
    kind: str, bench: Callable[..., Bench], rabbit: Rabbit
) -> None:
    """Behind jobs of ten minutes, each of the next in line would go to the end of a backlog of days, or run alone."""
    one = bench(f"{rabbit.url}?consumer_timeout_s=2", kind)
    app, gate, ran = App[None]("waits", broker=one.recorder.plan.url, concurrency=1), asyncio.Event(), list[str]()

    @app.handler(job=one.recorder.Note)
    async def note(_: Job, attempt: Attempt) -> None:
        await gate.wait()
        ran.append(attempt.job_id)

    ids = await one.publish(*(one.recorder.Note() for _ in range(20)))
    async with working(app) as work:
        await eventually(lambda: work.consumer.counts[Kind.NOT_STARTED] >= 3)
        gate.set()
        await eventually(lambda: len(ran) == len(ids))
        assert work.consumer.counts[Kind.SUSPECTED] == 0
    # what is given back in the moment in which another job ends is overtaken by the next one
    assert [job_id for place, job_id in enumerate(ran) if abs(ids.index(job_id) - place) > 2] == []


async def test_a_stop_while_an_alarm_blocks_publishers_gives_back_at_once_and_makes_no_copies(
    bench: Callable[..., Bench], rabbit_node: StartNode
) -> None:
    """Whatever a blocked connection has in it is carried out after the alarm: each job that was held would run twice."""
    node = await rabbit_node()
    one = bench(node.url)
    ids = await one.publish(*(one.recorder.Note(0.5) for _ in range(1500)))
    worker = await one.working("--concurrency", "100", "--grace", "20")
    await one.until_lines("end", 100)
    await node.alarm(on=True)
    worker.term()
    assert await worker.ended(15) == 0, worker.log  # the grace is 20 s
    assert "100 given back" in worker.log
    await node.alarm(on=False)
    other = await one.working("--concurrency", "500")
    await one.until_ended(ids)
    await one.until_empty()
    await other.drained()

    starts = Counter(one.recorder.ids("start"))
    assert set(starts) == set(ids)
    assert sum(starts.values()) - len(ids) <= 2, "those that showed that nothing is confirmed"


@pytest.mark.rabbit
async def test_a_queue_of_the_version_before_gets_its_suspects_queue_from_the_worker(
    bench: Callable[..., Bench], rabbit: Rabbit
) -> None:
    """A program of the version before declares none: without it the worker would find nothing to set a job aside in."""
    one = bench(rabbit.url)
    lane = f"{one.queue.name}.suspects"
    ids = await one.publish(one.recorder.Note())
    async with connect(rabbit.url) as raw:
        await raw.delete(lane)
        worker = await one.working()
        await one.until_ended(ids)
        assert await raw.count(lane) == 0
        await worker.drained()


@pytest.mark.rabbit
async def test_a_worker_that_may_not_declare_the_suspects_queue_says_so_and_ends(
    bench: Callable[..., Bench], rabbit: Rabbit
) -> None:
    """Rights that name each queue are from before the upgrade: a worker that went on without would keep what it can't set aside."""
    name = f"narrow-{new_job_id()}"
    await rabbit.ctl("add_user", name, name)
    try:
        one = bench(rabbit.url.replace("guest:guest@", f"{name}:{name}@"))
        rights = rf"^(lv\..*|{one.queue.name}(\.(low|high|urgent|dead))?)$"
        await rabbit.ctl("set_permissions", name, rights, rights, rights)
        worker = one.start()

        assert await worker.ended() == 2, worker.log
        assert f"doesn't let user '{name}' declare queue '{one.queue.name}'" in worker.log
        assert f"{one.queue.name}.suspects" in worker.log
    finally:
        await rabbit.ctl("delete_user", name)
