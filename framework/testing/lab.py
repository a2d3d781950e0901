"""The lab: publishes jobs, moves the time, shows the runs. `memory` makes it in this process, `real` on a RabbitMQ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime, timedelta, timezone
from typing import Any, Protocol, Unpack

from typing_extensions import TypeVar

from ..app import App, Capture
from ..broker import Broker
from ..consuming.worker import Working, working
from ..context import current_attempt
from ..errors import ConfigurationError
from ..handle import Handle
from ..job import Job
from ..options import PublishOptions
from ..publishing.publisher import Publisher
from ..runtime import Runtime
from ..status import Status, status_of
from ..store import Abort, Store
from .callers import CallersThread
from .records import Delayed, Records

_R = TypeVar("_R")
_T = TypeVar("_T")

IN_HANDLER = "a handler can't wait for the lab to run jobs, because the lab waits for the handler; call drain and run_due in the test"
RESULT_S = 5.0
"""Real seconds that a result may take after the last run: the job has ended by then, or never will."""
UNSET: Any = object()
"""Stands for resources that weren't given, because None is a value."""


class Lab(Records, ABC):
    """The lab of `running`: publishes jobs, moves the time, shows the runs."""

    @property
    @abstractmethod
    def now(self) -> datetime:
        """The lab's time, an aware datetime in UTC."""

    @property
    @abstractmethod
    def delayed(self) -> Sequence[Delayed]:
        """The jobs that wait in the broker, the next one first: with a delay, or between two of their runs."""

    @abstractmethod
    async def publish(self, job: Job[_T], **options: Unpack[PublishOptions]) -> Handle[_T]:
        """Publish `job` to the lab's broker; otherwise as `Publisher.publish`."""

    @abstractmethod
    async def status(self, job_id: str, /) -> Status:
        """Return how a job of a class with `keep` is that was published in this lab, by its id; as `Handle.status`."""

    @abstractmethod
    async def result(self, handle: Handle[_T], /) -> _T:
        """Run until no job is left, as `drain`, and return the job's result; raises as `Handle.result`."""

    @abstractmethod
    async def abort(self, job_id: str, /) -> Abort:
        """Abort a job of a class with `keep` that was published in this lab, by its id; as `Handle.abort`."""

    @abstractmethod
    def advance(self, by: float | timedelta, /) -> None:
        """Move the clock by seconds, or by a timedelta, to a whole millisecond. Jobs that fall due run at the next `run_due` or `drain`.

        Unless `running` got `cron=False`, the app's cron schedules fire on the way: each slot's job is published when the
        clock is at the slot. A `Timeout` that is over ends its run. Raises what a cron function raises, and ValueError, before
        anything moves, if more than 20 000 slots lie on the way.
        """

    @abstractmethod
    def advance_to(self, moment: datetime, /) -> None:
        """Move the clock to `moment`, an aware datetime; otherwise as `advance`. ValueError for a moment in the past."""

    @abstractmethod
    async def run_due(self) -> None:
        """Run the jobs that are due now, and those that they publish for now. The clock stands still.

        Raises RuntimeError for a handler that doesn't end within 30 real seconds, and for a job that retries for ever.
        """

    @abstractmethod
    async def drain(self) -> None:
        """Run until no job is left, including retries and snoozes: the clock moves to the next due time again and again.

        The clock never moves to the end of a `Timeout`: a handler that waits for something real isn't timed out. Cron
        schedules don't fire; `advance` fires them.

        Raises RuntimeError for a handler that doesn't end within 30 real seconds, and for a job that snoozes or retries for
        ever. Jobs of queues without a handler in this app stay in their queues.
        """


class AppLab(Lab):
    """A lab that runs an app; `opened` sets the attributes."""

    publisher: Publisher
    work: Working | None = None
    """None if the app has no handler."""

    async def publish(self, job: Job[_T], **options: Unpack[PublishOptions]) -> Handle[_T]:
        """As `Lab.publish`."""
        return await self.publisher.publish(job, **options)

    async def status(self, job_id: str, /) -> Status:
        """As `Lab.status`."""
        handle = self._handle(job_id)
        return status_of(job_id, None) if handle is None else await handle.status()

    async def result(self, handle: Handle[_T], /) -> _T:
        """As `Lab.result`."""
        await self.drain()
        return await handle.result(timeout_s=RESULT_S)

    async def abort(self, job_id: str, /) -> Abort:
        """As `Lab.abort`."""
        handle = self._handle(job_id)
        return "unknown" if handle is None else await handle.abort()

    def _handle(self, job_id: str) -> Handle | None:
        classes = (type(one.job) for one in self._published if one.envelope.job_id == job_id)
        job_class = next(classes, None)
        return None if job_class is None else self.publisher.handle(job_id, job_class)


@asynccontextmanager
async def opened(
    lab: AppLab,
    app: App[Any],
    resources: Any,
    *,
    open_broker: Callable[[], Broker],
    open_store: Callable[[], Store],
    runtime: Runtime,
    callers: CallersThread | None = None,
) -> AsyncGenerator[None, None]:
    """Let `app` publish and consume in `lab`; with `callers`, its `def` handlers run in the thread that drives the loop."""

    @asynccontextmanager
    async def given() -> AsyncGenerator[Any, None]:
        yield resources

    with app.captured(Capture(open_broker, open_store, runtime, lab.add_published)):
        app.import_modules()
        async with app.publisher() as lab.publisher:
            if not app.handlers():
                yield
                return
            async with working(
                app,
                runtime=runtime,
                lifespan=None if resources is UNSET else given,
                observe=lab.add_ended,
                grace_s=1.0,
                threads=callers,
                wait=None if callers is None else callers.run,
            ) as lab.work:
                yield


class LeveretRunning(Protocol):
    """The type of the fixtures `leveret_running` and `leveret_rabbitmq`: `leveret.testing.running`, or the same on a RabbitMQ."""

    def __call__(
        self, app: App[_R], /, *, resources: _R = ..., now: datetime | None = None, cron: bool = True
    ) -> AbstractAsyncContextManager[Lab, None]:
        """Run `app` in a lab."""
        ...


def check_outside() -> None:
    """Raise RuntimeError inside a handler, which would wait for itself."""
    if current_attempt.get() is not None:
        raise RuntimeError(IN_HANDLER)


def utc(seconds: float, what: str, error: type[Exception] = ValueError) -> datetime:
    """Return Unix seconds as a datetime in UTC; raise `error` beyond the year 9999."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc)
    except (OverflowError, OSError, ValueError):
        msg = f"{what} is beyond the year 9999, where datetimes end"
        raise error(msg) from None


def check_aware(what: str, moment: object) -> datetime:
    """Return `moment`, or raise ConfigurationError unless it is an aware datetime."""
    if not isinstance(moment, datetime) or moment.utcoffset() is None:
        msg = f"{what} must be an aware datetime (with a time zone), not {moment!r}"
        raise ConfigurationError(msg)
    return moment
