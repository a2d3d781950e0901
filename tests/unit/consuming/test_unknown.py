"""A job that no handler of the worker knows: what its log line says."""

import logging

import pytest

from leveret import App, Job, Queue
from leveret.testing import running


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
