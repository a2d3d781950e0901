"""A worker that lacks what the machine shares out: a turn of its loop, or a file descriptor."""

import asyncio
import logging
import resource
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from leveret import App, Attempt, Job, Queue
from leveret.consuming.worker import working
from leveret.outcome import Kind
from tests.fault.bench import Bench, eventually
from tests.rabbit.node import Rabbit

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]


async def test_a_def_handler_of_several_heartbeats_costs_no_connection(
    bench: Callable[..., Bench], rabbit: Rabbit
) -> None:
    """Pain 16: an image that is scaled for nine seconds, a connection that is lost for it, and the image scaled again."""
    one = bench(f"{rabbit.url}?heartbeat=1")
    worker = await one.working()
    ids = await one.publish(one.recorder.Chore(4.0))
    await one.until_ended(ids)
    await one.until_empty()
    await worker.drained()

    assert one.recorder.ids("start") == ids
    assert "connecting:" not in worker.log


async def test_an_async_handler_that_blocks_its_loop_for_several_heartbeats_runs_once(
    rabbit: Rabbit, caplog: pytest.LogCaptureFixture
) -> None:
    """Pain 16: RabbitMQ gives up the connection meanwhile; without a memory of what ran, the job would do the same again, for ever."""
    caplog.set_level(logging.INFO, "leveret")
    app = App("shop", broker=f"{rabbit.url}?heartbeat=1")
    queue = Queue(f"blocks-{uuid.uuid4().hex[:12]}", priorities=False)
    runs: list[str] = []

    class Order(Job, name="order", queue=queue):
        seconds: float

    async def run(job: Any, attempt: Attempt[Any]) -> None:
        runs.append(attempt.job_id)
        time.sleep(job.seconds)  # noqa: ASYNC251 - the fault

    app.handler(job=Order)(run)
    async with working(app) as work, app.publisher() as publisher:
        first = await publisher.publish(Order(5.0), timeout_s=20)
        await eventually(lambda: work.consumer.counts[Kind.REMEMBERED] == 1)
        second = await publisher.publish(Order(0.0), timeout_s=20)
        await eventually(lambda: len(runs) == 2)

    assert runs == [first.job_id, second.job_id]


async def test_a_worker_without_a_free_file_descriptor_says_so_and_goes_on_once_it_has_one(
    bench: Callable[..., Bench], rabbit: Rabbit
) -> None:
    """R44: a leak in a handler takes all descriptors; a worker that spins then takes the machine, and one that ends takes its jobs."""
    one = bench(rabbit.url, reconnect_cap_s=0.5)
    worker = await one.working()
    pid = worker.process.pid
    usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, usual[1]))
    await rabbit.close_connections()
    await worker.says("waiting to consume: .*Too many open files; trying again\n")
    before, log = worker.cpu_s, len(worker.log)
    await asyncio.sleep(2)
    assert worker.cpu_s - before < 0.5
    assert len(worker.log) == log, "said once"
    resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)
    await worker.says("consuming again")
    ids = await one.publish(one.recorder.Note())
    await one.until_ended(ids)
    await worker.drained()
