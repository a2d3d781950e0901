"""The end of a consumer: nothing that hasn't begun holds it up."""

import asyncio
import time

from leveret import App, Job, Queue
from leveret.consuming.worker import working
from leveret.outcome import Kind

things = Queue("things")


class Thing(Job, name="thing.do", queue=things):
    """A job."""


async def test_a_run_that_is_cancelled_before_its_first_step_holds_up_no_stop() -> None:
    """A job that arrives in the last turn of `asyncio.run` would cost a full CPU for the whole grace, and count as cut off."""
    app, ran = App("ends", broker="memory://"), list[Thing]()

    @app.handler
    async def handler(job: Thing) -> None:
        ran.append(job)

    async with app.publisher() as publisher, working(app, grace_s=3) as work:
        before = asyncio.all_tasks()
        await publisher.publish(Thing())
        while not work.consumer.busy:
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - before:
            task.cancel()
        begun = time.monotonic()

    assert not ran
    assert work.drained
    assert time.monotonic() - begun < 2.5, "it waited for its grace"
    assert work.consumer.counts == {Kind.NOT_STARTED: 1}
    assert work.consumer.running == 0
    async with working(app, grace_s=3):  # the broker has the job again
        async with asyncio.timeout(5):
            while not ran:
                await asyncio.sleep(0.01)
