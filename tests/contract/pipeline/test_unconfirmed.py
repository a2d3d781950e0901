"""Unconfirmed: an ending whose publish fails or is cancelled is settled all the same."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from leveret import Attempt, Bury, Outcome, Retry
from leveret.consuming import following
from leveret.consuming.worker import working
from tests.contract.harness import PATIENCE_S, Harness, ready
from tests.contract.pipeline.apps import Runs, assert_empty, job_class, letters_of, make_app, publish, until


class Told(logging.Handler):
    """Sets an event when the consumer says that it can't publish a settlement."""

    def __init__(self) -> None:
        super().__init__()
        self.event = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "can't be published" in record.getMessage():
            self.event.set()


@pytest.mark.parametrize("says", ["retry", "bury"])
async def test_a_settlement_that_cannot_be_confirmed_is_tried_again_until_it_is(
    harness: Harness, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropped or acked in the meantime, the job would be lost with a broker that was only away for a moment."""
    monkeypatch.setattr(following, "SETTLE_TIMEOUT_S", 1.0)
    published = asyncio.Event()

    async def fail(job: Any, attempt: Attempt[Any]) -> Outcome | None:
        if attempt.number == 1:
            await published.wait()  # a job may be delivered before its publisher has the confirm
            await harness.break_publishing()
            return Retry(0) if says == "retry" else Bury("no")
        return None

    queue, runs, told = harness.queue(), Runs(fail), Told()
    work = job_class(queue)
    app = make_app(harness, work, runs)
    logger = logging.getLogger("leveret.consumer")
    logger.addHandler(told)

    try:
        async with working(app, queues=[queue.name]) as worker:
            await until(lambda: ready(worker.consumption))
            [job_id] = await publish(app, work(n=1))
            published.set()
            await runs.next()
            await asyncio.wait_for(told.event.wait(), PATIENCE_S)
            assert worker.consumer.unsettled == 1
            await harness.heal()
            if says == "retry":
                again = await runs.next()
                assert (again.job_id, again.number) == (job_id, 2)
            else:
                letters = await letters_of(harness, queue, 1)
                assert {letter.job_id for letter in letters} == {job_id}
            await until(lambda: worker.consumer.unsettled == 0)
    finally:
        logger.removeHandler(told)
    await assert_empty(harness, queue)


@pytest.mark.parametrize("ends", ["returns", "waits"])
async def test_a_handler_that_cancels_its_own_task_is_settled_all_the_same(harness: Harness, ends: str) -> None:
    """A cancel that is still pending would hit the publish of its retry, and the job would hang until its connection is closed."""

    async def cancels(job: Any, attempt: Attempt[Any]) -> Outcome | None:
        if attempt.number == 2:
            return None
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        if ends == "waits":
            await asyncio.sleep(0)
        return Retry(0)

    queue, runs = harness.queue(), Runs(cancels)
    work = job_class(queue)
    app = make_app(harness, work, runs)

    async with working(app, queues=[queue.name]):
        [job_id] = await publish(app, work(n=1))
        await runs.next()
        if ends == "returns":
            assert (await runs.next()).job_id == job_id
        else:
            [letter] = await letters_of(harness, queue, 1)
            assert "CancelledError" in letter.errors
    await assert_empty(harness, queue)
