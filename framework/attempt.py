"""An attempt: one run of one job, as its handler and the middleware see it."""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from typing import Any, Generic, Protocol, Unpack, final

from typing_extensions import TypeVar

from .clock import Clock
from .envelope import Envelope, Receipt
from .job import Job
from .options import PublishOptions

_R_co = TypeVar("_R_co", covariant=True, default=object)

logger = logging.getLogger("leveret.job")


class Publishes(Protocol):
    """The part of `Publisher` that an attempt publishes with."""

    async def publish(self, job: Job, **options: Unpack[PublishOptions]) -> Receipt:
        """Publish `job`, as `Publisher.publish` does."""
        ...


@final
class Attempt(Generic[_R_co]):
    """One run of one job. Plain `Attempt` fits any app; the type of its `resources` is then `object`."""

    __slots__ = (
        "_arrived",
        "_clock",
        "_deadline",
        "_envelope",
        "_job",
        "_log",
        "_publisher",
        "_redelivered",
        "_resources",
    )

    _arrived: float
    _clock: Clock
    _deadline: float
    _envelope: Envelope
    _job: Job
    _log: logging.LoggerAdapter[logging.Logger] | None
    _publisher: Publishes
    _redelivered: bool
    _resources: _R_co

    def __init__(self) -> None:
        msg = "only a worker makes an Attempt; in a test, use leveret.testing.attempt()"
        raise TypeError(msg)

    @staticmethod
    def _make(
        job: Job,
        envelope: Envelope,
        redelivered: bool,
        arrived: float,
        resources: object,
        publisher: Publishes,
        clock: Clock,
    ) -> Attempt[Any]:
        """Make the attempt of a job that arrived at `arrived`, in Unix seconds; for the consumer and `leveret.testing`."""
        attempt: Attempt[Any] = Attempt.__new__(Attempt)
        attempt._job = job
        attempt._envelope = envelope
        attempt._redelivered = redelivered
        attempt._arrived = arrived
        attempt._resources = resources
        attempt._publisher = publisher
        attempt._clock = clock
        attempt._deadline = float("inf")
        attempt._log = None
        return attempt

    @property
    def job(self) -> Job:
        """The decoded job."""
        return self._job

    @property
    def job_id(self) -> str:
        """The job's id, chosen at the publish; every retry and replay keeps it."""
        return self._envelope.job_id

    @property
    def number(self) -> int:
        """The number of this attempt; 1 is the first. Snoozes don't count."""
        return self._envelope.attempt

    @property
    def first_seen(self) -> datetime:
        """The time of the job's first delivery, an aware datetime in UTC."""
        seen_ms = self._envelope.first_seen_ms or int(self._arrived * 1000)
        return datetime.fromtimestamp(seen_ms / 1000, tz=timezone.utc)

    @property
    def redelivered(self) -> bool:
        """Whether the broker marked this delivery as redelivered."""
        return self._redelivered

    @property
    def envelope(self) -> Envelope:
        """The job as delivered: its name, queue, priority and headers."""
        return self._envelope

    @property
    def resources(self) -> _R_co:
        """The object that the app's lifespan yielded in this process."""
        return self._resources

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger that adds `job`, `job_id`, `queue` and `attempt` to each record."""
        if self._log is None:
            self._log = logging.LoggerAdapter(
                logger,
                {
                    "job": self._envelope.job,
                    "job_id": self._envelope.job_id,
                    "queue": self._envelope.queue,
                    "attempt": self._envelope.attempt,
                },
            )
        return self._log

    def remaining_s(self) -> float:
        """Return the seconds until the earliest `Timeout` ends this run; inf without a `Timeout`."""
        if self._deadline == float("inf"):
            return self._deadline
        return max(0.0, self._deadline - self._clock.monotonic())

    def end_by(self, deadline: float, /) -> float:
        """Set the time at which this run will be ended, in seconds of `Runtime.clock.monotonic`, and return the old one. For middleware such as `Timeout`."""
        before, self._deadline = self._deadline, deadline
        return before

    async def publish(self, job: Job, **options: Unpack[PublishOptions]) -> Receipt:
        """Publish `job`, as `Publisher.publish` does, over the worker's connection; the job inherits correlation id and trace."""
        return await self._publisher.publish(job, **options)


make_attempt = Attempt._make  # pyright: ignore[reportPrivateUsage] - private, so that users don't make attempts by hand
