"""A job that always fails: as many runs as it was given, however many workers there are, and then a dead letter."""

from collections.abc import Callable

import pytest

from tests.fault.bench import Bench
from tests.rabbit.node import Rabbit
from tests.rabbit.raw import Raw

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]


@pytest.mark.versions
@pytest.mark.parametrize("type", ["quorum", "classic"])
async def test_a_job_that_always_fails_has_its_five_attempts_in_two_workers_and_is_buried(
    bench: Callable[..., Bench], rabbit: Rabbit, type: str
) -> None:
    """Pains 9, 11, 27: a count in one process starts again in the next, one that RabbitMQ keeps changes with its version, and a
    copied `x-death` has the broker drop the job in its second round.
    """
    one = bench(rabbit.url, type)
    workers = [await one.working(), await one.working()]
    ids = await one.publish(*(one.recorder.Flaky(99) for _ in range(10)))
    await one.until_empty(dead=10)
    for worker in workers:
        await worker.drained()

    lines = one.recorder.lines("start")
    for job_id in ids:
        assert [words[2] for words in lines if words[1] == job_id] == ["1", "2", "3", "4", "5"]
    assert len({words[3] for words in lines}) == 2, "RabbitMQ gives each of the two its turn"


@pytest.mark.versions
@pytest.mark.parametrize("type", ["quorum", "classic"])
async def test_a_job_is_buried_although_somebody_deleted_the_dead_letters(
    bench: Callable[..., Bench], rabbit: Rabbit, raw: Raw, type: str
) -> None:
    """Pain 8: RabbitMQ drops what it dead-letters to an exchange that isn't there, without a word."""
    one = bench(rabbit.url, type)
    worker = await one.working()
    await raw.publish(one.queue.name, b"no job")
    await one.until_empty(dead=1)  # the worker has declared the way to the dead letters
    await raw.delete_exchange("lv.dead")
    await raw.delete(f"{one.queue.name}.dead")
    ids = await one.publish(*(one.recorder.Flaky(99) for _ in range(3)))
    await one.until_empty(dead=3)
    await worker.drained()
    letters = await raw.look(f"{one.queue.name}.dead")

    assert {letter.properties.message_id for letter in letters} == set(ids)


@pytest.mark.versions
async def test_a_retry_whose_delay_queue_was_deleted_runs(
    bench: Callable[..., Bench], rabbit: Rabbit, raw: Raw
) -> None:
    """R38: acknowledged before its copy waits somewhere, the job is gone; given up, it holds its slot for ever."""
    one = bench(rabbit.url)
    worker = await one.working()
    ids = await one.publish(one.recorder.Flaky(1))
    await one.until_ended(ids)  # the worker has declared the way of a retry
    for wait in ("250ms", "500ms"):
        await raw.delete(f"lv.delay.{wait}")
    ids = await one.publish(*(one.recorder.Flaky(1) for _ in range(10)))
    await one.until_ended(ids)
    await one.until_empty()
    await worker.drained()
