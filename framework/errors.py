"""Every error of leveret's own, named for what the caller can do.

    LeveretError
    ├── ConfigurationError          the program or its settings are wrong: mend it and start again
    │   └── UnsupportedTopology     what the broker has, or can do, differs from what was asked for
    ├── PublishError                one publish that isn't confirmed
    │   ├── BrokerUnavailable       nothing was kept: try later
    │   ├── PublishTimeout          no confirm in time; publish again under the same id
    │   ├── Unroutable              no queue took it: declare the queue, or start its worker first
    │   ├── MessageTooLarge         refused before a byte was sent
    │   └── InvalidJob              the job can't be decoded as its own class, or its options are wrong
    └── PublishManyError            at least one of `publish_many` failed; `results` says which

What a client library raises is mapped into this tree at the broker's edge; it never comes out as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from .envelope import Receipt


class LeveretError(Exception):
    """Every error of leveret's own."""


class ConfigurationError(LeveretError):
    """Something in the program or its settings is wrong; mend it and start again."""


class UnsupportedTopology(ConfigurationError):
    """What the broker has, or can do, differs from what was asked for; `queue` says where."""

    def __init__(self, message: str, *, queue: str) -> None:
        super().__init__(message)
        self._queue = queue

    @property
    def queue(self) -> str:
        """The queue, by its name in the program."""
        return self._queue


class PublishError(LeveretError):
    """A publish that isn't confirmed; `job_id` is the id to publish it again under."""

    def __init__(self, message: str, *, job_id: str | None = None) -> None:
        super().__init__(message)
        self._job_id = job_id

    @property
    def job_id(self) -> str | None:
        """The job's id; None where it was refused before it had one."""
        return self._job_id


@final
class BrokerUnavailable(PublishError):
    """No broker within the deadline, or it refused the job; nothing was kept: try later."""


@final
class PublishTimeout(PublishError):
    """No confirm within `timeout_s`; where `maybe_published`, publish again under the same id."""

    def __init__(self, message: str, *, job_id: str | None = None, maybe_published: bool) -> None:
        super().__init__(message, job_id=job_id)
        self._maybe_published = maybe_published

    @property
    def maybe_published(self) -> bool:
        """True once a byte of it may have been sent."""
        return self._maybe_published


@final
class Unroutable(PublishError):
    """No queue took it: somebody deleted the queue or its binding. Nothing was kept; the next publish declares it anew."""

    def __init__(self, message: str, *, job_id: str | None = None, queue: str) -> None:
        super().__init__(message, job_id=job_id)
        self._queue = queue

    @property
    def queue(self) -> str:
        """The queue that the job was meant for."""
        return self._queue


@final
class MessageTooLarge(PublishError):
    """Refused before a byte was sent; sizes in bytes."""

    def __init__(self, message: str, *, job_id: str | None = None, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(message, job_id=job_id)
        self._size_bytes = size_bytes
        self._limit_bytes = limit_bytes

    @property
    def size_bytes(self) -> int:
        """Size of the body, or of all headers."""
        return self._size_bytes

    @property
    def limit_bytes(self) -> int:
        """The limit that it passes."""
        return self._limit_bytes


@final
class InvalidJob(PublishError):
    """What was encoded can't be decoded as its own class; or the class is abstract, or an option is wrong."""


@final
class PublishManyError(LeveretError):
    """At least one of `publish_many` failed; `results` in the order given."""

    def __init__(self, results: list[Receipt | PublishError]) -> None:
        failed = [result for result in results if isinstance(result, PublishError)]
        maybe = sum(isinstance(result, PublishTimeout) and result.maybe_published for result in failed)
        there = f", {maybe} of them may be there" if maybe else ""
        super().__init__(
            f"{len(failed)} of {len(results)} jobs weren't confirmed{there} (results tells of each); the first: {failed[0]}"
        )
        self._results = results

    @property
    def results(self) -> list[Receipt | PublishError]:
        """One entry a job given, in its order."""
        return self._results
