"""What `App.publisher` gives: publishing from an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Unpack, final

from ..envelope import Receipt
from ..errors import BrokerUnavailable, InvalidJob
from ..job import Job
from ..options import PUBLISH_OPTIONS, TIMEOUT_S, Outgoing, PublishOptions, unexpected
from .batch import Batch
from .sender import Sender, seconds_of


@final
class Publisher:
    """Publishes from an event loop; made by `App.publisher`.

    Safe to use from many tasks at once: what they publish is pipelined.
    """

    def __init__(self, sender: Sender) -> None:
        self._sender: Sender | None = sender
        self._loop = asyncio._get_running_loop()
        """The loop that it was made on, and its connection belongs to; None for a test's attempt that was made outside of one."""

    def close(self) -> None:
        """Refuse what comes from now on; called when the block that made it is left."""
        self._sender = None

    def _open(self, job_id: str | None = None) -> Sender:
        if self._sender is None:
            msg = "this publisher is closed: its `async with app.publisher()` was left"
            raise BrokerUnavailable(msg, job_id=job_id)
        if self._loop is not None and asyncio._get_running_loop() is not self._loop:
            # a connection made on a loop that ends would take all publishes, retries and burials of a worker with it
            msg = (
                "nothing was sent: this publisher belongs to another event loop (asyncio.run makes a new one); in a `def` handler "
                "or a thread use app.blocking_publisher(), kept as a module's variable"
            )
            raise BrokerUnavailable(msg, job_id=job_id)
        return self._sender

    async def publish(self, job: Job, **options: Unpack[PublishOptions]) -> Receipt:
        """Publish `job`; return once the broker has confirmed the publish: from then on the job runs at least once.

        Every option is a keyword; `PublishOptions` has their types. None means the default, except for `timeout_s`.

        Args:
            job: An instance of a `Job` class that names its job and queue.
            priority: The job's priority. Default: the priority of its class, which is NORMAL unless the class has another.
            delay_s: Seconds before the job may run, at most 48 days. The broker holds the job. Default: 0. Excludes `at`.
            at: The aware datetime before which the job doesn't run; a past one means at once. Default: now. Excludes `delay_s`.
            job_id: The job's id, 1 to 200 bytes. It identifies the job and doesn't deduplicate. Default: a new UUIDv7.
            correlation_id: The id that related jobs share, 1 to 200 bytes. Default: inherited from the job whose handler runs.
            headers: Plain values that every retry and replay keeps; names must not begin with `lv-`. Default: no headers.
            expires_s: Seconds after which the job doesn't run any more; must be above the delay. Default: the `expires_s` of its class.
            timeout_s: Seconds for the whole publish, connecting included. Default: 5.

        Raises:
            TypeError: A keyword isn't an option.
            InvalidJob, MessageTooLarge: Refused before anything was sent.
            BrokerUnavailable, Unroutable: Nothing was kept.
            PublishTimeout: See its `maybe_published`; publish again under the same `job_id`.
        """
        if options and not PUBLISH_OPTIONS.issuperset(options):
            raise unexpected("publish", options, PUBLISH_OPTIONS)
        timeout_s = options.pop("timeout_s", TIMEOUT_S)
        return await self._open(options.get("job_id")).publish(job, options, timeout_s)

    async def publish_many(self, jobs: Iterable[Job | Outgoing], *, timeout_s: float = 5.0) -> list[Receipt]:
        """Publish `jobs` pipelined; receipts in order, or `PublishManyError` if any failed; `timeout_s` is for all of them.

        Each is confirmed on its own: those with a receipt in the error's `results` are published whatever became of
        the others.
        """
        sender = self._open()
        if isinstance(jobs, (Job, Outgoing)):
            msg = "publish_many takes several jobs, not one"
            raise InvalidJob(msg)
        return await Batch(sender, time.monotonic() + seconds_of("timeout_s", timeout_s)).publish(jobs)
