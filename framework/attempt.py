"""An attempt: one run of one job, as its handler and the middleware see it."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Coroutine
from datetime import datetime, timezone
from types import CodeType
from typing import Any, Generic, Protocol, Unpack

import msgspec
from typing_extensions import TypeVar

from .clock import Clock
from .envelope import Envelope, Receipt
from .handle import BlockingHandle, Handle
from .job import Job
from .options import PublishOptions
from .texts import one_line
from .transactions import AsyncTransaction, Transaction

_R_co = TypeVar("_R_co", covariant=True, default=object)
_T = TypeVar("_T")

logger = logging.getLogger("leveret.job")


class Publishes(Protocol):
    """The part of `Publisher` that an attempt publishes with."""

    async def publish(
        self, job: Job[_T], *, connection: AsyncTransaction | None = None, **options: Unpack[PublishOptions]
    ) -> Handle[_T]:
        """Publish `job`, as `Publisher.publish` does."""
        ...

    def publish_blocking(
        self, job: Job[_T], *, connection: Transaction | None = None, **options: Unpack[PublishOptions]
    ) -> BlockingHandle[_T]:
        """Publish `job` from a thread, as `Publisher.publish_blocking` does."""
        ...

    async def once(self, connection: AsyncTransaction, queue: str, job_id: str) -> bool:
        """Note that the transaction has the effect of a job; False if a committed one has it."""
        ...

    def once_blocking(self, connection: Transaction, queue: str, job_id: str) -> bool:
        """As `once`, in the thread of the transaction."""
        ...


class Begun(msgspec.Struct, eq=False):
    """A publish of a handler that hasn't finished."""

    code: CodeType
    line: int
    unfinished: dict[Begun, None]
    """The publishes of the attempt; this one leaves them when it finishes."""
    publish: Coroutine[Any, Any, Receipt] | None = None
    """The publish to await; None for a blocking publish."""

    @property
    def where(self) -> str:
        """The file and line of the call."""
        return f"{self.code.co_filename}:{self.line}"

    def finish(self) -> None:
        """Leave the unfinished publishes."""
        self.unfinished.pop(self, None)


_MOST_NOTE = 500
"""The longest note of a progress, characters."""


class Tracked(msgspec.Struct, eq=False):
    """What a run and the job store tell each other; for a job whose class has `keep`."""

    asked: bool = False
    """Whether somebody asked to abort the job."""
    over: bool = False
    """Whether the handler has ended, and so can't be cancelled any more."""
    progress: tuple[float, str] | None = None
    """The latest progress, and its note."""


class Attempt(Generic[_R_co]):
    """One run of one job. Plain `Attempt` fits any app; the type of its `resources` is then `object`."""

    __slots__ = (
        "_arrived",
        "_began",
        "_clock",
        "_deadline",
        "_envelope",
        "_job",
        "_log",
        "_publisher",
        "_redelivered",
        "_resources",
        "begun",
        "tracked",
        "unfinished",
    )

    _arrived: float
    _began: float
    _clock: Clock
    _deadline: float
    _envelope: Envelope
    _job: Job
    _log: logging.LoggerAdapter[logging.Logger] | None
    _publisher: Publishes
    _redelivered: bool
    _resources: _R_co
    begun: bool
    """For the worker: whether the handler has begun; False while the middleware decides."""
    tracked: Tracked | None
    """For the worker: what the run and the job store tell each other; None for a job of which nothing is kept."""
    unfinished: dict[Begun, None] | None
    """For the worker: the publishes that the running handler began and that haven't finished; None if it began none."""

    def __init__(self) -> None:
        msg = "only a worker makes an Attempt; in a test, use leveret.testing.attempt()"
        raise TypeError(msg)

    @classmethod
    def _make(
        cls: type[Attempt[Any]],
        job: Job,
        envelope: Envelope,
        redelivered: bool,
        arrived: float,
        resources: object,
        publisher: Publishes,
        clock: Clock,
    ) -> Attempt[Any]:
        """Make the attempt of a job that arrived at `arrived`, in Unix seconds; for the consumer and `leveret.testing`."""
        attempt = cls.__new__(cls)
        attempt._job = job
        attempt._envelope = envelope
        attempt._redelivered = redelivered
        attempt._arrived = arrived
        attempt._resources = resources
        attempt._publisher = publisher
        attempt._clock = clock
        attempt._began = clock.monotonic()
        attempt._deadline = float("inf")
        attempt._log = None
        attempt.begun = False
        attempt.tracked = None
        attempt.unfinished = None
        return attempt

    def _elapsed_s(self) -> float:
        """Return the seconds since the run began; for log records."""
        return self._clock.monotonic() - self._began

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
        """Whether the job was delivered before, and that delivery was neither settled nor given back."""
        return self._redelivered or self._envelope.crashes > 0

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

    @property
    def aborting(self) -> bool:
        """Whether somebody asked to abort the job; for a `def` handler, which can't be cancelled. False for a class without `keep`."""
        return self.tracked is not None and self.tracked.asked

    def progress(self, fraction: float, note: str = "") -> None:
        """Say how far the run is, from 0 to 1, for `Handle.status`; in any thread. It never waits, and a store that is down is no error.

        The latest progress is written twice a second. Without effect for a class without `keep`. Raises TypeError or ValueError for
        a fraction that isn't a number.
        """
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"progress: fraction must be a number from 0 to 1, not {fraction!r:.80}"
            raise TypeError(msg)
        if math.isnan(fraction):
            msg = "progress: fraction must be a number from 0 to 1, not nan"
            raise ValueError(msg)
        if self.tracked is not None:
            self.tracked.progress = min(1.0, max(0.0, fraction)), one_line(str(note))[:_MOST_NOTE]

    def remaining_s(self) -> float:
        """Return the seconds until the earliest `Timeout` ends this run; inf without a `Timeout`."""
        if self._deadline == float("inf"):
            return self._deadline
        return max(0.0, self._deadline - self._clock.monotonic())

    def end_by(self, deadline: float, /) -> float:
        """Set the time at which this run will be ended, in seconds of `Runtime.clock.monotonic`, and return the old one. For middleware such as `Timeout`."""
        before, self._deadline = self._deadline, deadline
        return before

    def publish(
        self, job: Job[_T], *, connection: AsyncTransaction | None = None, **options: Unpack[PublishOptions]
    ) -> Coroutine[Any, Any, Handle[_T]]:
        """Publish `job`, as `Publisher.publish` does, over the worker's connection; the job inherits correlation id and trace.

        Await the result. A handler that returns before this publish has finished has failed. In a `def` handler, call
        `publish_blocking`.
        """
        begun = self._begin()
        begun.publish = publish = self._finished(begun, job, connection, options)
        return publish

    def publish_blocking(
        self, job: Job[_T], *, connection: Transaction | None = None, **options: Unpack[PublishOptions]
    ) -> BlockingHandle[_T]:
        """Publish `job` from a `def` handler, and return once the broker has confirmed the publish; otherwise as `publish`.

        `connection` is as in `BlockingPublisher.publish`. Raises RuntimeError in an `async def` handler, where it would wait for itself.
        """
        begun = self._begin()
        try:
            return self._publisher.publish_blocking(job, connection=connection, **options)
        finally:
            begun.finish()

    async def once(self, *, connection: AsyncTransaction) -> bool:
        """Note in the handler's own transaction that it has the effect of this job; False if the effect is already committed.

        A handler that makes its effect in the same transaction, and only after True, has it exactly once, however often the job is
        delivered. Another run of the same job that is at it is waited for. `connection` is as in `publish`, to the database of the
        app's outbox or of its PostgreSQL broker. The note is kept for `Settings.inbox_s`. In a test (`running`, `attempt()`) it is True.
        """
        return await self._publisher.once(connection, self._envelope.queue, self._envelope.job_id)

    def once_blocking(self, *, connection: Transaction) -> bool:
        """As `once`, in a `def` handler; `connection` is as in `BlockingPublisher.publish`.

        Raises RuntimeError in an `async def` handler, whose event loop it would block.
        """
        return self._publisher.once_blocking(connection, self._envelope.queue, self._envelope.job_id)

    def _begin(self) -> Begun:
        if self.unfinished is None:
            self.unfinished = {}
        frame = inspect.currentframe()
        frame = frame and frame.f_back and frame.f_back.f_back
        assert frame is not None
        begun = Begun(frame.f_code, frame.f_lineno, self.unfinished)
        self.unfinished[begun] = None
        return begun

    async def _finished(
        self, begun: Begun, job: Job[_T], connection: AsyncTransaction | None, options: PublishOptions
    ) -> Handle[_T]:
        try:
            return await self._publisher.publish(job, connection=connection, **options)
        finally:
            begun.finish()


make_attempt = Attempt._make  # pyright: ignore[reportPrivateUsage] - private, so that users don't make attempts by hand
elapsed_s = Attempt._elapsed_s  # pyright: ignore[reportPrivateUsage] - private, since `remaining_s` is what a handler plans with
