"""SIGTERM in the middle of work: drained within the grace, cut off past it, nothing lost either way."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest

from leveret import App, Job, Queue
from leveret.brokers.rabbitmq.consuming import RabbitConsumption
from leveret.consuming.worker import working
from leveret.ids import new_job_id
from tests.fault.bench import PATIENCE_S, Bench, Worker, eventually, link_to, stray_tracebacks
from tests.fault.load import Load
from tests.rabbit.node import Rabbit
from tests.rabbit.raw import connect

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]


@pytest.mark.versions
async def test_a_stop_within_the_grace_loses_nothing_and_starts_nothing_twice(any_bench: Bench) -> None:
    """Every deploy does this several times an hour; a payment that runs twice at each would be found by customers."""
    bench = any_bench
    ids = await bench.publish(
        *(bench.recorder.Note(0.5) for _ in range(150)), *(bench.recorder.Chore(0.5) for _ in range(50))
    )
    first = await bench.working("--concurrency", "10", "--grace", "20")
    await bench.until_lines("end", 20)
    first.term()
    second = await bench.working("--concurrency", "20", "--grace", "20")
    assert await first.ended() == 0, first.log
    second.term()
    assert await second.ended() == 0, second.log
    third = await bench.working("--concurrency", "20", "--grace", "20")
    await bench.until_ended(ids)
    await bench.until_empty()
    await third.drained()

    assert Counter(bench.recorder.ids("start")) == Counter(ids), "each ran once"
    assert Counter(bench.recorder.ids("end")) == Counter(ids), "and to its end"
    for worker in (first, second, third):
        assert not stray_tracebacks(worker.log)
        assert " ERROR " not in worker.log


@pytest.mark.versions
async def test_workers_that_are_restarted_one_after_another_under_load_lose_and_repeat_nothing(
    any_bench: Bench, record_property: Callable[[str, object], None]
) -> None:
    """R40. A deploy that repeats a few jobs of each worker repeats hundreds a week, and nobody can say which."""
    bench, workers = any_bench, [await any_bench.working("--concurrency", "20") for _ in range(3)]
    async with Load(bench, rate=100, seconds=0.3) as load:
        for place in (0, 1, 2, 0, 1, 2):
            await workers[place].drained()
            workers[place] = await bench.working("--concurrency", "20")
    await bench.until_empty()
    counts = load.counts()
    record_property("counts", str(counts))
    for worker in workers:
        await worker.drained()

    assert counts.confirmed == counts.published, load.refused
    assert (counts.lost, counts.repeated, counts.strange) == (0, 0, 0), counts


@pytest.mark.parametrize("kind", ["Note", "Chore"])
async def test_past_its_grace_a_worker_exits_with_1_and_the_next_runs_what_was_cut_off(
    any_bench: Bench, kind: str
) -> None:
    """An orchestrator kills what doesn't end; a handler that hangs must cost its own job a second run, and no other job anything."""
    bench = any_bench
    long = await bench.publish(*(getattr(bench.recorder, kind)(3.5) for _ in range(5)))
    short = await bench.publish(*(getattr(bench.recorder, kind)(0.01) for _ in range(50)))
    worker = await bench.working("--concurrency", "20", "--grace", "0.2")
    await eventually(
        lambda: set(bench.recorder.ids("start")) >= set(long) and set(bench.recorder.ids("end")) >= set(short),
        lambda: bench.logs,
    )
    worker.term()

    assert await worker.ended(3.3) == 1, worker.log
    assert "stopped, cut off: 5 cut off, 50 done" in worker.log
    assert not stray_tracebacks(worker.log)
    second = await bench.working("--concurrency", "20")
    await bench.until_ended(long)
    await bench.until_empty()
    await second.drained()
    runs = Counter(bench.recorder.ids("start"))
    assert runs == Counter({**dict.fromkeys(short, 1), **dict.fromkeys(long, 2)})
    assert all(words[2] == "1" for words in bench.recorder.lines()), "a cut costs no attempt"


async def test_a_second_sigterm_cuts_off_at_once(any_bench: Bench) -> None:
    """Who says it twice means it: nobody waits for half a minute at a console."""
    bench = any_bench
    ids = await bench.publish(bench.recorder.Note(3.5), bench.recorder.Chore(3.5), bench.recorder.Chore(3.5))
    worker = await bench.working("--grace", "30")
    await eventually(lambda: set(bench.recorder.ids("start")) >= set(ids), lambda: bench.logs)
    worker.term()
    await worker.says("stopping: 3 running")
    worker.term()

    assert await worker.ended(3.3) == 1, worker.log
    second = await bench.working()
    await bench.until_ended(ids)
    await bench.until_empty()
    await second.drained()


async def test_a_worker_that_is_told_to_stop_while_it_is_being_filled_gives_the_rest_back(any_bench: Bench) -> None:
    """What it holds and hasn't started must be another's at once, not after a lease or a time-out."""
    bench = any_bench
    ids = list[str]()
    done = asyncio.Event()

    async def publish() -> None:
        while not done.is_set():
            ids.extend(await bench.publish(*(bench.recorder.Note(0.05) for _ in range(50))))
            await asyncio.sleep(0.3)

    publishing = asyncio.create_task(publish())
    for _ in range(4):
        seen = len(bench.recorder.ids("end"))
        worker = await bench.working("--concurrency", "5", "--grace", "10")
        await bench.until_lines("end", seen + 20)
        await worker.drained()
    done.set()
    await publishing
    last = await bench.working()
    await bench.until_ended(ids)
    await bench.until_empty()
    await last.drained()

    assert Counter(bench.recorder.ids("start")) == Counter(ids), "each ran once"


async def test_a_stop_while_the_broker_hangs_ends_all_the_same_and_loses_nothing(
    bench: Callable[..., Bench], rabbit: Rabbit
) -> None:
    """Both at once is the usual case: somebody restarts everything because nothing works."""
    async with link_to(rabbit) as link:
        one = bench(rabbit.url)
        ids = await one.publish(*(one.recorder.Note(0.3) for _ in range(100)))
        worker = one.start("--concurrency", "10", "--grace", "5", url=link.url)
        await one.until_lines("end", 20)
        link.freeze()
        worker.term()

        await worker.ended(20)
        assert not stray_tracebacks(worker.log)
        assert "lost" in worker.log, worker.log
    second = await one.working("--concurrency", "50")
    await one.until_ended(ids)
    await one.until_empty()
    await second.drained()


async def test_stops_at_full_speed_repeat_nothing(any_bench: Bench) -> None:
    """The acks of a worker's last moment are still on their way when it closes its channel: those lost are jobs that run twice at each deploy."""
    bench, jobs, stops = any_bench, 6000, 5
    ids = await bench.publish(*(bench.recorder.Note() for _ in range(jobs)))
    workers: list[Worker] = []
    for stop in range(1, stops + 1):
        workers.append(await bench.working())
        await bench.until_lines("end", stop * jobs // (stops + 1))
        await workers[-1].drained()
    workers.append(await bench.working())
    await bench.until_ended(ids)
    await bench.until_empty()
    await workers[-1].drained()

    runs = Counter(bench.recorder.ids("start"))
    assert set(runs) == set(ids)
    assert [count for count in runs.values() if count > 1] == [], "a job that had ended ran again"
    assert [worker.log for worker in workers if "may have died" in worker.log] == [], "a stop looked like a death"


@pytest.mark.rabbit
async def test_a_worker_that_is_left_while_it_closes_a_lost_session_leaves_no_consumer(
    rabbit: Rabbit, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection would live on with the program, and keep jobs that no other worker gets, while nobody here runs them."""
    queue, other = Queue(f"kept-{new_job_id()}", priorities=False), Queue(f"gone-{new_job_id()}", priorities=False)

    class Kept(Job, name="kept", queue=queue):
        n: int

    class Gone(Job, name="gone", queue=other): ...

    async with link_to(rabbit) as link, connect(rabbit.url) as raw:
        app: App[None] = App("left", broker=link.url)
        running = asyncio.Event()

        @app.handler
        async def keep(job: Kept) -> None:
            running.set()
            await asyncio.sleep(0.2)

        @app.handler
        async def go(job: Gone) -> None: ...

        async with app.publisher() as publisher:
            await publisher.publish_many([Kept(n) for n in range(150)])
        async with working(app, queues=[queue.name, other.name]) as work:
            await asyncio.wait_for(running.wait(), PATIENCE_S)
            link.latency_s = 0.2  # the close takes its round trips
            main = cast("RabbitConsumption", work.consumption)._main
            assert main is not None
            main.lose("a queue couldn't be made again on it")
            await eventually(lambda: "the consuming connection to RabbitMQ" in caplog.text)
        link.latency_s = 0.0
        async with asyncio.timeout(PATIENCE_S):
            while not await raw.count(queue.name):  # what it held comes back
                await asyncio.sleep(0.05)
        await raw.delete(queue.name)
        await raw.delete(other.name)


@pytest.mark.rabbit
async def test_a_worker_whose_start_is_cancelled_leaves_no_handler_running(rabbit: Rabbit) -> None:
    """Its first queue had delivered already: the handler would go on with a lifespan that is over, and beside the second run of its job."""
    first, second = (Queue(f"start-{new_job_id()}", priorities=False) for _ in range(2))
    entered, began, ended = list[bool](), asyncio.Event(), list[bool]()

    class First(Job, name="first", queue=first): ...

    class Second(Job, name="second", queue=second): ...

    @asynccontextmanager
    async def lifespan() -> AsyncGenerator[None, None]:
        entered.append(True)
        yield
        entered.clear()

    async with link_to(rabbit) as link, connect(rabbit.url) as raw:
        app: App[None] = App("start", broker=link.url, lifespan=lifespan)

        @app.handler
        async def run(job: First) -> None:
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(bool(entered))

        @app.handler
        async def other(job: Second) -> None: ...

        async def service() -> None:
            async with app.worker(queues=[first.name, second.name]):
                pytest.fail("it was to be cancelled before")

        async with app.publisher() as publisher:
            await publisher.publish_many([First(), Second()])
        link.latency_s = 0.15  # between the first queue's delivery and the second's registration
        serving = asyncio.create_task(service())
        await asyncio.wait_for(began.wait(), PATIENCE_S)
        serving.cancel()
        await asyncio.wait({serving}, timeout=PATIENCE_S)
        assert serving.cancelled()
        assert ended == [True]
        for name in (first.name, second.name):
            await raw.delete(name)
