"""A job that no handler of the worker knows, what its log line says, and when it is buried."""

import logging
from typing import Any, cast

import pytest

from leveret import App, Job, Queue, Settings
from leveret.broker import Delivery
from leveret.clock import ManualClock, moment_ms
from leveret.consuming.settlement import Settlement
from leveret.envelope import Envelope
from leveret.outcome import Unknown as NoHandler
from leveret.testing import running
from tests.unit import runs

GRACE_S = Settings().unknown_grace_s


class Known(Job, name="known", queue=Queue("notes")):
    """A job with a handler."""


class Unknown(Job, name="unknown", queue=Queue("notes")):
    """A job of the same queue, whose handler's module isn't listed."""


async def test_the_line_of_an_unknown_job_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    """The usual cause is a module that nobody imports; a line that speaks of a deploy alone sends its reader elsewhere."""
    app = App("unit")

    @app.handler
    async def handle(job: Known) -> None: ...

    async with running(app) as lab:
        receipt = await lab.publish(Unknown())
        await lab.run_due()

    [line] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line == (
        f"unknown {receipt.job_id} (queue notes, attempt 1) waits in the broker, because a deploy may be in progress, and is buried in "
        "5 min otherwise: this worker has no handler for the job 'unknown' (if it should run it, list the handler's module in "
        "App(modules=[…]))"
    )


class Stranger:
    """A delivery of a job that no worker knows, out of a queue with `consumers`; it waited for `waited_s`."""

    live = True
    queue = runs.QUEUE
    redelivered = False
    problem = None

    def __init__(self, clock: ManualClock, consumers: int, waited_s: float) -> None:
        since_ms = moment_ms(clock.now() - waited_s)
        self.envelope = Envelope(job_id="id-1", job="greet", queue="emails", unknown_since_ms=since_ms)
        self.consumers = consumers
        self.buried = False

    async def meet(self, worker: Settlement) -> None:
        """Come to a worker."""
        rest = worker.end(cast("Delivery", cast("Any", self)), None, NoHandler("no handler"), None)
        assert rest is not None
        await rest

    async def again(self, envelope: Envelope) -> bool:
        self.envelope = envelope
        return True

    async def bury(self, envelope: Envelope) -> bool:
        self.buried = not envelope.strangers
        return True


@pytest.mark.parametrize(("consumers", "meetings"), [(0, 1), (1, 1), (2, 2), (3, 4)])
async def test_a_job_is_buried_once_it_has_met_every_consumer_of_its_queue(consumers: int, meetings: int) -> None:
    """Where two apps share a queue, strangers would bury a job whose worker is ready; or a typo would bounce for ever."""
    clock = ManualClock()
    job = Stranger(clock, consumers, waited_s=GRACE_S)
    first, second, third = (Settlement([], runs.runtime(clock)) for _ in range(3))
    met = 0

    for worker in (first, second, first, third):  # it meets the first again
        await job.meet(worker)
        met += 1
        if job.buried:
            break

    assert (job.buried, met) == (True, meetings)


async def test_a_job_that_never_meets_every_consumer_is_buried_after_ten_graces_with_small_headers() -> None:
    """A consumer that hangs takes no job, and workers that restart are strangers again: the job would go round, and grow, for ever."""
    clock = ManualClock()
    job = Stranger(clock, consumers=100_000, waited_s=0)
    began, most = clock.now(), ""

    while not job.buried:
        await job.meet(Settlement([], runs.runtime(clock)))  # each time another worker
        most = max(most, job.envelope.strangers, key=len)
        clock.advance(job.envelope.due_in_s(clock.now()))

    assert clock.now() - began == pytest.approx(10 * GRACE_S, rel=0.01)
    assert len(most) < 4096
