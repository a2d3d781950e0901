"""Records of a lab: the jobs that were published, the runs, and the jobs that wait."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Generic, TypeGuard

import msgspec
from typing_extensions import TypeVar

from ..consuming.settlement import Ended
from ..envelope import Envelope
from ..job import Job
from ..outcome import OUTCOMES, Bury, Done, Outcome

_J = TypeVar("_J", bound=Job)
_O = TypeVar("_O", bound=Outcome)
_O_co = TypeVar("_O_co", bound=Outcome, covariant=True, default=Outcome)


class Published(msgspec.Struct, frozen=True):
    """A job that was published while the lab ran."""

    job: Job
    envelope: Envelope


class Run(msgspec.Struct, Generic[_O_co], frozen=True):
    """An attempt that ended; `error` is the exception of the handler, or None."""

    job: Job
    envelope: Envelope
    number: int
    outcome: _O_co
    error: BaseException | None


class Delayed(msgspec.Struct, frozen=True):
    """A job that waits in the broker: published with a delay, or between two of its runs."""

    job: Job
    envelope: Envelope
    until: datetime
    """When the job is due, an aware datetime in UTC."""


def jobs_of(published: Iterable[Published], job_class: type[_J]) -> Sequence[_J]:
    """Return the jobs of `job_class` among `published`, in order."""
    return tuple(one.job for one in published if isinstance(one.job, job_class))


def _ended_as(run: Run, kind: type[_O]) -> TypeGuard[Run[_O]]:
    return isinstance(run.outcome, kind)


class Records:
    """The records of one lab, in order."""

    def __init__(self) -> None:
        self._published: list[Published] = []
        self._runs: list[Run] = []

    @property
    def published(self) -> Sequence[Published]:
        """The jobs published so far, in order, without retries and snoozes."""
        return tuple(self._published)

    def published_of(self, job_class: type[_J], /) -> Sequence[_J]:
        """Return the jobs of a class that were published so far, in order."""
        return jobs_of(self._published, job_class)

    @property
    def done(self) -> Sequence[Run[Done]]:
        """The runs that were done, in order."""
        return tuple(run for run in self._runs if _ended_as(run, Done))

    @property
    def buried(self) -> Sequence[Run[Bury]]:
        """The runs after which the job was buried, in order; `outcome.reason` says why."""
        return tuple(run for run in self._runs if _ended_as(run, Bury))

    def attempts(self, job_id: str, /) -> Sequence[Run]:
        """Return the runs of a job, in order; empty for an unknown id."""
        return tuple(run for run in self._runs if run.envelope.job_id == job_id)

    def _summary(self) -> str:
        """Return the numbers of the records, such as `3 published, 4 runs: 2 done, 1 buried`."""
        numbers = f"{len(self._published)} published, {len(self._runs)} runs"
        return f"{numbers}: {len(self.done)} done, {len(self.buried)} buried"

    def add_published(self, job: Job, envelope: Envelope) -> None:
        """Record a publish."""
        self._published.append(Published(job, envelope))

    def add_ended(self, ended: Ended) -> None:
        """Record how a delivery ended, if it was a run."""
        if ended.job is not None and isinstance(ended.ending, OUTCOMES):
            self._runs.append(Run(ended.job, ended.envelope, ended.envelope.attempt, ended.ending, ended.error))
