"""One long job among thousands of short ones."""

import asyncio
import tracemalloc
from collections import Counter
from collections.abc import Callable

import pytest
from pamqp.commands import Basic

from leveret.brokers.rabbitmq import open_broker
from leveret.runtime import Runtime
from tests.contract.harness import consume
from tests.fault.bench import Bench
from tests.rabbit.node import Rabbit
from tests.rabbit.raw import Raw

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

SHORT, LONG_S = 5_000, 7.0
CONCURRENCY = 4
ONE_TURN = 2 * CONCURRENCY
"""Most that can have ended in the turns whose acks a kill catches: no more are held at once."""


async def test_short_jobs_and_their_acks_do_not_wait_for_a_long_one(any_bench: Bench) -> None:
    """If the acks waited for the oldest job, a killed worker would repeat everything since it began, and the window would close."""
    bench = any_bench
    [long] = await bench.publish(bench.recorder.Note(LONG_S))
    shorts = set(await bench.publish(*(bench.recorder.Note() for _ in range(SHORT))))

    first = await bench.working("--concurrency", str(CONCURRENCY))
    await bench.until_lines("end", SHORT // 2)
    await asyncio.to_thread(first.kill9)
    at_kill = Counter(bench.recorder.ids("start"))
    second = await bench.working("--concurrency", str(CONCURRENCY))
    await bench.until_ended(shorts)
    ended = bench.recorder.ids("end")
    await asyncio.sleep(0.1)  # several turns of its loop: the last acks are written
    await asyncio.to_thread(second.kill9)
    third = await bench.working("--concurrency", str(CONCURRENCY))
    await bench.until_ended([long])
    await bench.until_empty()
    await third.drained()

    assert at_kill[long] == 1
    assert long not in ended, "the short ones ended while it ran"
    runs = Counter(bench.recorder.ids("start"))
    assert runs.pop(long) >= 2  # 3 where the second worker sees the first one's death before its own
    repeated = sum(runs.values()) - SHORT
    assert repeated <= CONCURRENCY + ONE_TURN, f"{repeated} short jobs were repeated"


async def test_short_jobs_leave_no_memory_behind_while_a_long_one_runs(
    bench: Callable[..., Bench], rabbit: Rabbit
) -> None:
    """What is kept of each until the long one ends grows to hundreds of MB in a night."""
    one = bench(rabbit.url, "classic")
    await one.publish(*[one.recorder.Note()] * 25_000)
    broker, kept = open_broker(rabbit.url, Runtime(app="fault")), list[int]()
    try:
        _, sink = await consume(broker, one.queue, prefetch=500)
        long = await sink.next()
        tracemalloc.start()
        for count in (5_000, 19_500):
            for _ in range(count):
                (await sink.next()).done()
            kept.append(tracemalloc.get_traced_memory()[0])
        assert long.live
    finally:
        tracemalloc.stop()
        await broker.close()

    assert kept[1] - kept[0] < 250_000


@pytest.mark.parametrize("type", ["quorum", "classic"])
async def test_large_bodies_are_held_a_few_at_a_time_and_each_runs_once(
    bench: Callable[..., Bench], rabbit: Rabbit, raw: Raw, type: str
) -> None:
    """A window counted in jobs is no limit of memory: a hundred images of 3 MB each end the process that takes all its window allows."""
    one = bench(rabbit.url, type)
    small = await one.publish(*(one.recorder.Note() for _ in range(200)))  # this declares it
    body = b'{"seconds": 1.0, "unread": "%s"}' % (
        b"x" * (3 << 20)
    )  # long enough for more than 64 MiB to arrive meanwhile
    ids = [f"large-{number}" for number in range(100)]
    await asyncio.gather(
        *(
            raw.publish(
                one.queue.name, body, properties=Basic.Properties(message_type="note", message_id=name, delivery_mode=2)
            )
            for name in ids
        )
    )
    worker = await one.working("--concurrency", "20", "--queue", f"{one.queue.name}=20")
    await one.until_ended([*ids, *small], timeout_s=60)
    await one.until_empty()
    depth = await one.depth()
    peak_kib = worker.peak_kib
    await worker.drained()

    assert "MiB of unsettled bodies are held; consuming pauses" in worker.log, worker.log
    assert " ERROR " not in worker.log
    assert depth.consumers == 1, "consumers of one queue, of one worker"
    assert Counter(one.recorder.ids("start")) == Counter([*ids, *small]), "each ran once"
    assert peak_kib < 330 << 10


async def test_after_large_bodies_a_queue_takes_as_much_as_before(
    bench: Callable[..., Bench], rabbit: Rabbit, raw: Raw
) -> None:
    """A window that a burst of large bodies narrowed, and that stays narrow, makes a queue slow until somebody restarts its workers."""
    one = bench(rabbit.url)
    first = await one.publish(one.recorder.Note())  # this declares it
    body = b'{"seconds": 1.0, "unread": "%s"}' % (b"x" * (3 << 20))
    ids = [f"large-{number}" for number in range(40)]
    await asyncio.gather(
        *(
            raw.publish(
                one.queue.name, body, properties=Basic.Properties(message_type="note", message_id=name, delivery_mode=2)
            )
            for name in ids
        )
    )
    worker = await one.working("--concurrency", "20", "--queue", f"{one.queue.name}=20")
    await one.until_ended([*ids, *first], timeout_s=60)
    assert "are held; consuming pauses, then continues with a prefetch of 2\n" in worker.log, worker.log

    small = await one.publish(*(one.recorder.Note() for _ in range(2500)))  # the first thousand follow large ones
    await one.until_ended([*ids, *first, *small], timeout_s=60)
    await one.until_empty()
    depth = await one.depth()
    await worker.drained()

    assert "bodies are smaller again; raising the prefetch to 40" in worker.log, worker.log
    assert depth.consumers == 1
    assert Counter(one.recorder.ids("start")) == Counter([*ids, *first, *small]), "each ran once"
