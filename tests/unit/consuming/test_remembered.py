"""What a worker remembers of its jobs: for how long, how many, and what a cron slot's second copy finds."""

import asyncio
from collections import Counter
from datetime import datetime, timezone

from msgspec import structs

from leveret import App, Attempt, Job, Queue
from leveret.clock import ManualClock
from leveret.consuming import remembered
from leveret.consuming.remembered import ACKED, Past, Remembered, key_of
from leveret.consuming.worker import working
from leveret.envelope import Envelope
from leveret.ids import slot_job_id
from leveret.outcome import Kind, Repeated, Retry

digests = Queue("digests")


class Digest(Job, name="digest", queue=digests):
    """A job."""

    seconds: float = 0.0


def key(number: int) -> remembered.Key:
    return "digests", f"id-{number}", 0, 1_700_000_000, 7


def test_a_lost_run_is_remembered_until_its_redelivery_and_for_an_hour_at_most() -> None:
    """A redelivery after days is rather the replay of an operator, who wants it to run."""
    clock = ManualClock()
    memory = Remembered(clock, 10)
    memory.add(key(1), past := Past(Retry(2)))
    memory.add(key(2), past)

    assert memory.take(key(1)) is past
    assert memory.take(key(1)) is None
    clock.advance(remembered.FOR_S + 1)
    assert memory.take(key(2)) is None


def test_another_job_under_the_same_id_is_not_taken_for_the_first() -> None:
    """A publisher may use an id again, since ids don't deduplicate; after a loss the second job was acked and never ran."""
    first = Envelope(job_id="customer-7", job="sync", queue="digests", body=b"1", created_s=1_700_000_000)
    memory = Remembered(ManualClock(), 10)
    memory.add(key_of(first), ACKED)

    assert memory.take(key_of(structs.replace(first, body=b"2"))) is None
    assert memory.take(key_of(structs.replace(first, created_s=1_700_000_001))) is None
    assert memory.take(key_of(structs.replace(first, attempt=1))) is ACKED


def test_the_oldest_is_forgotten_first() -> None:
    """Ten thousand losses that other workers took over must not stay in memory."""
    memory = Remembered(ManualClock(), 10)
    for number in range(remembered.MOST + 1):
        memory.add(key(number), ACKED)

    assert memory.take(key(0)) is None
    assert memory.take(key(1)) is ACKED


def test_the_last_settlements_are_remembered_at_a_loss_only() -> None:
    """Without a loss a redelivery comes from elsewhere: it is another worker's, or a publisher's copy."""
    memory = Remembered(ManualClock(), 2)
    for number in range(3):
        memory.settled.append(key(number))
    assert memory.take(key(2)) is None

    memory.lose([])

    assert [memory.take(key(number)) for number in range(3)] == [None, ACKED, ACKED]
    assert isinstance(ACKED.ending, Repeated)


async def runs_of(job_id: str, *, seconds: float, copies_at_once: bool) -> tuple[int, Counter[Kind]]:
    """Publish two copies under one id; return how often the job ran, and the endings."""
    app, runs = App("shop", broker="memory://"), Counter[str]()

    @app.handler
    async def handle(job: Digest, attempt: Attempt) -> None:
        runs[attempt.job_id] += 1
        await asyncio.sleep(job.seconds)

    async with app.publisher() as publisher, working(app) as work:
        for copies in (1, 2):
            await publisher.publish(Digest(seconds=seconds), job_id=job_id)
            while sum(work.consumer.counts.values()) < copies and not (copies_at_once and copies == 1):
                await asyncio.sleep(0)
    return runs[job_id], work.consumer.counts


SLOT = slot_job_id("shop", "digest", datetime(2026, 7, 1, 7, tzinfo=timezone.utc))


async def test_a_cron_slot_that_was_published_twice_runs_once() -> None:
    """Two schedulers for a minute, or a confirm that was lost: nobody wants the nightly invoices twice."""
    assert await runs_of(SLOT, seconds=0, copies_at_once=False) == (1, {Kind.DONE: 1, Kind.REMEMBERED: 1})


async def test_the_second_copy_of_a_slot_that_still_runs_does_not_run() -> None:
    """Both copies are in the queue together, so they would start together."""
    assert await runs_of(SLOT, seconds=0.05, copies_at_once=True) == (1, {Kind.DONE: 1, Kind.REMEMBERED: 1})


async def test_a_publishers_own_repeat_of_an_id_runs() -> None:
    """The id says what the job is about; whether it must be unique, only the program knows."""
    assert await runs_of("order-7", seconds=0, copies_at_once=False) == (2, {Kind.DONE: 2})
