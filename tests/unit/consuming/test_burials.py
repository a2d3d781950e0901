"""Burials that the broker refuses: few stay in the worker, the others wait in the broker, and none of them runs again."""

import asyncio
import uuid
from typing import Any, cast

import msgspec
import pytest

from leveret import App, Attempt, Bury, Job, Queue
from leveret.broker import Delivery, Subscription
from leveret.brokers.memory.store import memory_store
from leveret.clock import ManualClock
from leveret.consuming.settlement import Settlement
from leveret.consuming.worker import working
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable
from leveret.failure import Failure, failures_of
from leveret.outcome import Kind
from tests.unit import runs


class Refused:
    """A live delivery whose dead letters take nothing until `full` is set to False."""

    live = True
    queue = runs.QUEUE
    redelivered = False
    problem = None

    def __init__(self, number: int) -> None:
        self.full = True
        self.envelope = Envelope(job_id=f"id-{number}", job="greet", queue="emails", body=b"{}")
        self.postponed: Envelope | None = None
        self.buried = False

    async def again(self, envelope: Envelope) -> bool:
        self.postponed = envelope
        return True

    async def bury(self, envelope: Envelope) -> bool:
        del envelope
        await asyncio.sleep(0)  # as for a broker's answer
        if self.full:
            raise BrokerUnavailable("basic.nack")
        self.buried = True
        return True


def settlement(clock: ManualClock, prefetch: int) -> Settlement:
    """Make the settlement of a worker with this prefetch."""
    return Settlement([], runs.runtime(clock), None, [Subscription(runs.QUEUE, prefetch)])


def ending(made: Settlement, delivery: Refused) -> asyncio.Task[None]:
    """Begin to bury `delivery`."""
    rest = made.end(cast("Delivery", cast("Any", delivery)), runs.attempt(), Bury("no such order"), None)
    assert rest is not None
    return asyncio.ensure_future(cast("Any", rest))


async def test_the_first_refusal_frees_those_that_wait_for_a_place() -> None:
    """They would hold the window for as long as the dead letters may be silent: a second in which no job of the queue runs."""
    clock, deliveries = ManualClock(), [Refused(n) for n in range(5)]
    made = settlement(clock, 8)

    tasks = [ending(made, delivery) for delivery in deliveries]
    for _ in range(100):  # turns of the loop, no time
        await asyncio.sleep(0)

    assert [delivery.postponed is not None for delivery in deliveries] == [False, False, True, True, True]
    made.replacing.stop()
    await asyncio.gather(*tasks)


async def test_only_a_quarter_of_the_prefetch_waits_for_dead_letters_that_are_full(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Burials that fill the prefetch stop every job of their queue."""
    clock, deliveries = ManualClock(), [Refused(n) for n in range(5)]
    made = settlement(clock, 8)

    tasks = [ending(made, delivery) for delivery in deliveries[:2]]
    while clock.sleepers < 2:
        await asyncio.sleep(0)
    await asyncio.gather(*(ending(made, delivery) for delivery in deliveries[2:]))

    assert [delivery.postponed is not None for delivery in deliveries] == [False, False, True, True, True]
    assert made.replacing.refusals == {"emails": "basic.nack"}
    for delivery in deliveries:
        delivery.full = False
    while not all(task.done() for task in tasks):
        clock.advance(1)
        await asyncio.sleep(0)
    assert [delivery.buried for delivery in deliveries] == [True, True, False, False, False]
    assert not made.replacing.refusals
    said = [record.getMessage() for record in caplog.records if "queue emails: burials" in record.getMessage()]
    assert said == [
        "queue emails: burials can't be published: a few wait in this worker, the others in the broker: basic.nack"
    ]


async def test_a_stop_lets_no_burial_wait_in_its_worker() -> None:
    """A stop would take the whole grace, and every such job would run again in the next worker."""
    clock, delivery = ManualClock(), Refused(1)
    made = settlement(clock, 8)
    task = ending(made, delivery)
    while not clock.sleepers:
        await asyncio.sleep(0)

    made.replacing.stop()
    await task

    assert delivery.postponed is not None
    assert delivery.postponed.bury_since_ms == int(clock.now() * 1000)
    assert [failure.reason for failure in failures_of(delivery.postponed)] == ["no such order"]


async def test_a_job_that_was_set_aside_does_not_wait_in_its_worker_to_be_buried() -> None:
    """A worker holds one such job at a time: every suspect behind it would stand still until the dead letters have room."""
    clock, delivery = ManualClock(), Refused(1)
    delivery.envelope = msgspec.structs.replace(delivery.envelope, crashes=5)
    made = settlement(clock, 8)

    await asyncio.wait_for(ending(made, delivery), 10)

    assert delivery.postponed is not None
    assert delivery.postponed.bury_since_ms == int(clock.now() * 1000)


@pytest.mark.parametrize(("waited_s", "waits_s"), [(0, 10), (60, 60), (4000, 300)])
async def test_the_waits_of_a_job_that_is_to_be_buried_grow(waited_s: int, waits_s: int) -> None:
    """A hundred thousand of them that come back every few seconds take all of the worker's time."""
    clock, delivery = ManualClock(), Refused(1)
    now_ms = int(clock.now() * 1000)
    delivery.envelope = msgspec.structs.replace(delivery.envelope, bury_since_ms=now_ms - waited_s * 1000)
    made = settlement(clock, 1)

    await ending(made, delivery)

    assert delivery.postponed is not None
    assert delivery.postponed.due_ms == now_ms + waits_s * 1000
    assert delivery.postponed.bury_since_ms == now_ms - waited_s * 1000


class Fetch(Job, name="fetch", queue=Queue("fetching")):
    """A job with a handler."""


async def test_a_job_that_is_to_be_buried_is_buried_without_a_run() -> None:
    """A card would be charged twice, because a queue of dead letters was full."""
    url, started = f"memory://{uuid.uuid4().hex}", list[str]()
    app, store = App("unit", broker=url), memory_store(url)

    @app.handler
    async def handle(job: Fetch, attempt: Attempt) -> None:
        started.append(attempt.job_id)

    failure = Failure(attempt=1, at_ms=1, host="h", error="", message="no such order", reason="no such order")
    errors = msgspec.json.encode([failure]).decode()
    store.inject("fetching", b"{}", headers={"lv-bury-since": 1, "lv-errors": errors, "lv-pass": 1})
    async with working(app) as work:
        while not store.contents.dead:
            await asyncio.sleep(0)

    [letter] = [kept.envelope for kept in store.contents.dead["fetching"].values()]
    assert not started
    assert (letter.bury_since_ms, [each.reason for each in failures_of(letter)]) == (None, ["no such order"])
    assert work.consumer.counts[Kind.BURY] == 0, "counted by the worker in which the job ended"
