"""One run of one job, as its handler and the layers see it."""

from __future__ import annotations

import logging
import time
from datetime import datetime, timezone
from typing import Any, Generic, Protocol, Unpack, final

from typing_extensions import TypeVar

from .envelope import Envelope, Receipt
from .job import Job
from .options import PublishOptions

_R_co = TypeVar("_R_co", covariant=True, default=object)

logger = logging.getLogger("leveret.job")


class Publishes(Protocol):
    """What an attempt publishes with: a `Publisher`."""

    async def publish(self, job: Job, **options: Unpack[PublishOptions]) -> Receipt:
        """As `Publisher.publish`."""
        ...


@final
class Attempt(Generic[_R_co]):
    """One run of one job. `number` 1 is the first; bare `Attempt` fits any app, its `resources` is then an object."""

    __slots__ = ("_arrived", "_deadline", "_envelope", "_job", "_log", "_publisher", "_redelivered", "_resources")

    _arrived: float
    _deadline: float
    _envelope: Envelope
    _job: Job
    _log: logging.LoggerAdapter[logging.Logger] | None
    _publisher: Publishes
    _redelivered: bool
    _resources: _R_co

    def __init__(self) -> None:
        msg = "an Attempt is made by the worker; in a test use leveret.testing.attempt()"
        raise TypeError(msg)

    @staticmethod
    def _make(
        job: Job, envelope: Envelope, redelivered: bool, arrived: float, resources: object, publisher: Publishes
    ) -> Attempt[Any]:
        """Make an attempt of what arrived at `arrived`, Unix seconds; for the consumer and for `leveret.testing`."""
        attempt: Attempt[Any] = Attempt.__new__(Attempt)
        attempt._job = job
        attempt._envelope = envelope
        attempt._redelivered = redelivered
        attempt._arrived = arrived
        attempt._resources = resources
        attempt._publisher = publisher
        attempt._deadline = float("inf")
        attempt._log = None
        return attempt

    @property
    def job(self) -> Job:
        """The decoded job."""
        return self._job

    @property
    def job_id(self) -> str:
        """Chosen once at the publish, kept by every retry and replay."""
        return self._envelope.job_id

    @property
    def number(self) -> int:
        """Runs that counted, this one included; 1 is the first."""
        return self._envelope.attempt

    @property
    def first_seen(self) -> datetime:
        """When the job was first delivered; aware, UTC."""
        seen_ms = self._envelope.first_seen_ms or int(self._arrived * 1000)
        return datetime.fromtimestamp(seen_ms / 1000, tz=timezone.utc)

    @property
    def redelivered(self) -> bool:
        """Whether the broker says that it delivered this before."""
        return self._redelivered

    @property
    def envelope(self) -> Envelope:
        """Name, queue, priority and headers as they came."""
        return self._envelope

    @property
    def resources(self) -> _R_co:
        """What the app's lifespan yielded in this process."""
        return self._resources

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger that knows job, id and number."""
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
        """Seconds until the innermost `Timeout` ends this run; inf without one."""
        if self._deadline == float("inf"):
            return self._deadline
        return max(0.0, self._deadline - time.monotonic())

    def end_by(self, deadline: float, /) -> float:
        """Set when this run will be ended (`time.monotonic`, which loops count in too); returns what it was. For layers such as `Timeout`."""
        before, self._deadline = self._deadline, deadline
        return before

    async def publish(self, job: Job, **options: Unpack[PublishOptions]) -> Receipt:
        """As `Publisher.publish`, on the worker's own connection; correlation and trace are inherited."""
        return await self._publisher.publish(job, **options)


make_attempt = Attempt._make  # pyright: ignore[reportPrivateUsage] - hidden, so that nobody makes one by hand
