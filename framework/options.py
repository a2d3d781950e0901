"""How a job is to be published, and a job together with that."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Generic, final

import msgspec
from typing_extensions import TypeVar

from .headers import HeaderValue
from .job import Job, Priority

_J_co = TypeVar("_J_co", bound=Job, covariant=True, default=Job)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How a job is to be published; the keywords of `Publisher.publish`."""

    priority: Priority | None = None
    delay_s: float | None = None
    at: datetime | None = None
    job_id: str | None = None
    correlation_id: str | None = None
    headers: Mapping[str, HeaderValue] | None = None
    expires_s: float | None = None


PLAIN = Options()


@final
class Outgoing(Generic[_J_co]):
    """A job with its publish options, where a job is handed over: `publish_many`, a cron function. Same meaning as `Publisher.publish`."""

    __slots__ = ("_job", "_options")

    def __init__(
        self,
        job: _J_co,
        *,
        priority: Priority | None = None,
        delay_s: float | None = None,
        at: datetime | None = None,
        job_id: str | None = None,
        correlation_id: str | None = None,
        headers: Mapping[str, HeaderValue] | None = None,
        expires_s: float | None = None,
    ) -> None:
        self._job = job
        self._options = Options(
            priority=priority,
            delay_s=delay_s,
            at=at,
            job_id=job_id,
            correlation_id=correlation_id,
            headers=dict(headers)
            if isinstance(headers, Mapping)
            else headers,  # what isn't one is refused when it is published
            expires_s=expires_s,
        )

    @property
    def job(self) -> _J_co:
        """The job."""
        return self._job

    @property
    def options(self) -> Options:
        """Everything else that it was made with."""
        return self._options

    def __repr__(self) -> str:
        return f"Outgoing({self._job!r})"
