"""Every error that leveret raises, named by what the caller can do.

    LeveretError
    ├── ConfigurationError          the program or its settings are wrong: correct them and start again
    │   └── UnsupportedTopology     the broker has, or supports, something else than the program asks for
    ├── PublishError                a publish wasn't confirmed
    │   ├── BrokerUnavailable       the job wasn't published: try later
    │   ├── PublishTimeout          no confirm in time: publish again under the same id
    │   ├── Unroutable              no queue took the job: somebody deleted the queue; publish again, which declares it
    │   ├── MessageTooLarge         refused before a byte was sent
    │   └── InvalidJob              the job can't be decoded as its own class, or its options are wrong
    ├── PublishManyError            at least one job of `publish_many` failed; `results` says which
    ├── StoreUnavailable            the job store didn't answer: ask later; the jobs go on
    └── ResultError                 there is no result, and waiting won't bring one
        ├── JobFailed               the job is in the dead letters
        ├── JobAborted              somebody aborted the job
        ├── JobExpired              the job expired before it could start
        └── ResultUnavailable       the job is done; its result was too large, or the store never heard of it

A broker maps the errors of its client library into this tree; they never reach the caller unmapped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from .envelope import Receipt


class LeveretError(Exception):
    """Base class of every error that leveret raises."""


class ConfigurationError(LeveretError):
    """The program or its settings are wrong; correct them and start again."""


class UnsupportedTopology(ConfigurationError):
    """The broker has, or supports, something else than the program asks for; `queue` is the queue concerned."""

    def __init__(self, message: str, *, queue: str) -> None:
        super().__init__(message)
        self._queue = queue

    @property
    def queue(self) -> str:
        """The queue's name in the program."""
        return self._queue


class PublishError(LeveretError):
    """A publish wasn't confirmed; publish the job again under `job_id`."""

    def __init__(self, message: str, *, job_id: str | None = None) -> None:
        super().__init__(message)
        self._job_id = job_id

    @property
    def job_id(self) -> str | None:
        """The job's id; None if the job was refused before it had an id."""
        return self._job_id


@final
class BrokerUnavailable(PublishError):
    """No broker answered within the deadline, or the broker refused the job. The job wasn't published: try later."""


@final
class PublishTimeout(PublishError):
    """No confirm arrived within `timeout_s`; if `maybe_published`, publish again under the same id."""

    def __init__(self, message: str, *, job_id: str | None = None, maybe_published: bool) -> None:
        super().__init__(message, job_id=job_id)
        self._maybe_published = maybe_published

    @property
    def maybe_published(self) -> bool:
        """Whether a byte of the job may have been sent."""
        return self._maybe_published


@final
class Unroutable(PublishError):
    """No queue took the job, because the queue or its binding was deleted. The next publish declares the queue again."""

    def __init__(self, message: str, *, job_id: str | None = None, queue: str) -> None:
        super().__init__(message, job_id=job_id)
        self._queue = queue

    @property
    def queue(self) -> str:
        """The name of the job's queue."""
        return self._queue


@final
class MessageTooLarge(PublishError):
    """The body or the headers are too large; the job was refused before a byte was sent."""

    def __init__(self, message: str, *, job_id: str | None = None, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(message, job_id=job_id)
        self._size_bytes = size_bytes
        self._limit_bytes = limit_bytes

    @property
    def size_bytes(self) -> int:
        """Size of the body, or of all headers, in bytes."""
        return self._size_bytes

    @property
    def limit_bytes(self) -> int:
        """The limit that the size exceeds, in bytes."""
        return self._limit_bytes


@final
class InvalidJob(PublishError):
    """The encoded job can't be decoded as its own class, the class is abstract, or an option is wrong."""


@final
class PublishManyError(LeveretError):
    """At least one job of `publish_many` failed; `results` has one entry per job."""

    def __init__(self, results: list[Receipt | PublishError]) -> None:
        failed = [result for result in results if isinstance(result, PublishError)]
        maybe = sum(isinstance(result, PublishTimeout) and result.maybe_published for result in failed)
        unknown = f", {maybe} of them may have been published" if maybe else ""
        super().__init__(
            f"{len(failed)} of {len(results)} jobs weren't confirmed{unknown} (see results); the first: {failed[0]}"
        )
        self._results = results

    @property
    def results(self) -> list[Receipt | PublishError]:
        """One entry per job, in the order given."""
        return self._results


@final
class StoreUnavailable(LeveretError):
    """The job store didn't answer in time. The jobs themselves go on: ask later."""


class ResultError(LeveretError):
    """A job has no result, and waiting won't bring one; `job_id` is the job's."""

    def __init__(self, message: str, *, job_id: str) -> None:
        super().__init__(message)
        self._job_id = job_id

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self._job_id


@final
class JobFailed(ResultError):
    """The job failed for good, and is in the dead letters of its queue."""

    def __init__(self, message: str, *, job_id: str, error: str, reason: str, attempt: int) -> None:
        super().__init__(message, job_id=job_id)
        self._error = error
        self._reason = reason
        self._attempt = attempt

    @property
    def error(self) -> str:
        """The class and the message of the last error; empty if the job was buried without one."""
        return self._error

    @property
    def reason(self) -> str:
        """Why the job was buried."""
        return self._reason

    @property
    def attempt(self) -> int:
        """The number of the last attempt."""
        return self._attempt


@final
class JobAborted(ResultError):
    """Somebody aborted the job before its end."""


@final
class JobExpired(ResultError):
    """The job expired before it could start."""


@final
class ResultUnavailable(ResultError):
    """The job is done, but the store has no result of it; the text says why. The effect of the job is there."""
