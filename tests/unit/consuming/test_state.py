"""How a worker says how it is."""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timezone
from typing import Any, ClassVar, cast

import pytest

from leveret import App, Job, Queue, QueueState, WorkerState
from leveret.brokers.memory.store import memory_store
from leveret.clock import ManualClock
from leveret.consuming.consumer import Consumer
from leveret.consuming.state import Watch, Worker
from leveret.errors import ConfigurationError

STORE = "memory://worker-state"


class Feed(Job, name="feed", queue=Queue("hares")):
    """A job to run."""


class Queues:
    """A consumption whose states a test sets."""

    def __init__(self, *queues: QueueState) -> None:
        self.queues = queues
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def failed(self) -> None:
        await self.failure


class Told:
    """The part of a consumer that a watch uses."""

    running, held = 2, 3
    on_queues_changed: Any = None
    lost = ""
    refusals: ClassVar[dict[str, str]] = {}

    def losses(self) -> str:
        lost, self.lost = self.lost, ""
        return lost


async def watched(*queues: QueueState) -> tuple[Told, Queues, Worker, ManualClock]:
    """Watch a consumption with these states."""
    clock, told, consumption = ManualClock(), Told(), Queues(*queues)
    watch = Watch(cast("Consumer", told), clock)
    watch.follow(cast("Any", consumption))
    return told, consumption, Worker(watch), clock


A, B = QueueState("a", "consumed"), QueueState("b", "consumed")


@pytest.mark.parametrize(
    ("queues", "name", "why"),
    [
        ((A, B), "ready", ""),
        ((A, QueueState("b", "sick", "no leader")), "degraded", "queue b: no leader"),
        ((A, QueueState("b", "connecting", "gone")), "degraded", "queue b: gone"),
        ((QueueState("a", "sick", "x"), QueueState("b", "sick", "x")), "degraded", "x"),
        ((QueueState("a", "connecting", "refused"), QueueState("b", "connecting", "refused")), "connecting", "refused"),
        ((QueueState("a", "connecting"),), "connecting", "queue a: not consumed yet"),
    ],
)
async def test_a_worker_is_as_its_queues_are(queues: tuple[QueueState, ...], name: str, why: str) -> None:
    """A probe that calls a worker ready while a queue of it stands still finds out from its users."""
    _, _, worker, clock = await watched(*queues)

    assert worker.state() == WorkerState(
        cast("Any", name), datetime.fromtimestamp(clock.now(), timezone.utc), why, queues
    )


async def test_each_change_is_one_line_and_has_its_time(caplog: pytest.LogCaptureFixture) -> None:
    """A line per job, or per try, hides what happened in what followed from it."""
    caplog.set_level(logging.INFO, "leveret.worker")
    told, consumption, worker, clock = await watched(A, B)
    began = worker.state().since

    for queues in (
        (A, QueueState("b", "sick", "no leader")),
        (A, QueueState("b", "sick", "still no leader")),
        (QueueState("a", "connecting", "cut"), QueueState("b", "connecting", "cut")),
        (A, B),
        (A, B),
    ):
        clock.advance(5)
        consumption.queues = queues
        told.lost = "; 2 running jobs" if queues[1] != B else ""
        told.on_queues_changed()

    assert [record.getMessage() for record in caplog.records] == [
        "degraded: queue b: no leader; 2 running jobs",
        "degraded: a channel or lease was lost; 2 running jobs",
        "connecting: cut; 2 running jobs",
        "ready: consuming again a, b",
    ]
    assert (worker.state().since - began).total_seconds() == 20


async def test_a_failure_lasts_until_a_queue_is_consumed(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that has given up looks like one that waits for its broker."""
    told, consumption, worker, _ = await watched(QueueState("a", "sick", "x"))
    consumption.failure.set_exception(ConfigurationError("amqp://shop:secret@host/: refused"))
    for _ in range(3):
        await asyncio.sleep(0)

    assert (worker.state().name, worker.state().why) == ("failed", "amqp://shop:***@host/: refused")
    assert caplog.records[-1].levelname == "CRITICAL"
    consumption.queues = (A,)
    told.on_queues_changed()
    assert worker.state().name == "ready"


async def test_an_embedded_worker_says_that_it_lost_its_broker_with_what_was_running(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A hundred running jobs are a hundred lines, and none of them says how many."""
    caplog.set_level(logging.INFO, "leveret.worker")
    app, gate, began = App("burrow", broker=STORE), asyncio.Event(), asyncio.Event()

    @app.handler
    async def feed(job: Feed) -> None:
        began.set()
        await gate.wait()

    async with app.worker(queues=["hares"]) as worker, app.publisher() as publisher:
        assert (worker.state().name, worker.state().queues) == ("ready", (QueueState("hares", "consumed"),))
        await publisher.publish(Feed())
        await began.wait()
        memory_store(STORE).disconnect()
        while "consuming again" not in caplog.text:
            await asyncio.sleep(0.001)
        gate.set()

    assert worker.state().name == "stopping"
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:2] == [
        "connecting: queue hares: the store was disconnected; running jobs that can't be acknowledged any more: 1, waiting jobs that went back: 0",
        "ready: consuming again hares",
    ]
