"""What `App.publisher` gives: publishing from an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import final

from ..envelope import Receipt
from ..errors import BrokerUnavailable, InvalidJob
from ..headers import HeaderValue
from ..job import Job, Priority
from ..options import Options, Outgoing
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

    async def publish(
        self,
        job: Job,
        *,
        priority: Priority | None = None,
        delay_s: float | None = None,
        at: datetime | None = None,
        job_id: str | None = None,
        correlation_id: str | None = None,
        headers: Mapping[str, HeaderValue] | None = None,
        expires_s: float | None = None,
        timeout_s: float = 5.0,
    ) -> Receipt:
        """Return once the broker has confirmed it: from then on it runs at least once.

        Args:
            job: An instance of a `Job` class that names its job and queue.
            priority: None: the class's own, NORMAL unless it says otherwise.
            delay_s: Not before so many seconds, kept in the broker; at most 48 days. Excludes `at`.
            at: Not before this aware datetime; one in the past means at once.
            job_id: Up to 200 bytes; None: a new UUIDv7. It identifies, it doesn't deduplicate.
            correlation_id: None: inherited from the job whose handler runs here, if any.
            headers: Plain values, kept by every retry and replay; names must not begin with `lv-`.
            expires_s: Not run later than so many seconds from now; must be above the delay. None: the class's own.
            timeout_s: Seconds for all of it, connecting included.

        Raises:
            InvalidJob, MessageTooLarge: Refused before anything was sent.
            BrokerUnavailable, Unroutable: Nothing was kept.
            PublishTimeout: See its `maybe_published`; publish again under the same `job_id`.
        """
        options = Options(
            priority=priority,
            delay_s=delay_s,
            at=at,
            job_id=job_id,
            correlation_id=correlation_id,
            headers=headers,
            expires_s=expires_s,
        )
        return await self._open(job_id).publish(job, options, timeout_s)

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
