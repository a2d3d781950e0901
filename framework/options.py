"""Publish options: the keywords of every call that publishes, and a job together with its options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Final, Generic, TypedDict, Unpack, final

from typing_extensions import TypeVar

from .headers import HeaderValue
from .job import Job, Priority

_J_co = TypeVar("_J_co", bound=Job, covariant=True, default=Job)

TIMEOUT_S: Final = 5.0
"""The default of `timeout_s`, in seconds."""


class OutgoingOptions(TypedDict, total=False):
    """The options of one job. None means the default."""

    priority: Priority | None
    """The job's priority. Default: the priority of its class."""
    delay_s: float | None
    """Seconds before the job may run, at most 48 days. Default: 0. Excludes `at`."""
    at: datetime | None
    """An aware datetime; the job doesn't run before it. Default: now. Excludes `delay_s`."""
    job_id: str | None
    """The job's id, 1 to 200 bytes. Default: a new UUIDv7."""
    correlation_id: str | None
    """The id that related jobs share, 1 to 200 bytes. Default: the one of the job whose handler publishes."""
    headers: Mapping[str, HeaderValue] | None
    """Headers with plain values; names must not begin with `lv-`. Default: no headers."""
    expires_s: float | None
    """Seconds after which the job no longer runs. Default: the `expires_s` of its class."""
    resend: bool | None
    """Publish the job again, under its id, if the connection is lost before the confirm. Default: False."""


class PublishOptions(OutgoingOptions, total=False):
    """The keyword arguments of `Publisher.publish`."""

    timeout_s: float
    """Seconds for the whole publish, including the time to connect. Default: 5."""


OUTGOING_OPTIONS: Final = OutgoingOptions.__optional_keys__
PUBLISH_OPTIONS: Final = PublishOptions.__optional_keys__


def unexpected(call: str, given: Iterable[str], known: frozenset[str]) -> TypeError:
    """Return the TypeError for the first keyword in `given` that `call` doesn't take."""
    import difflib

    name = next(name for name in given if name not in known)
    close = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return TypeError(f"{call}() got an unexpected keyword argument {name!r}{hint}")


def for_outgoing(given: Iterable[str]) -> TypeError:
    """Return the TypeError for a keyword that `publish_many` doesn't take, because each of its jobs has its own options."""
    name = next(iter(given))
    if name not in OUTGOING_OPTIONS:
        return unexpected("publish_many", [name], frozenset({"connection", "timeout_s"}))
    return TypeError(
        f"publish_many() takes no {name}, since each job has its own: publish_many([Outgoing(job, {name}=…)])"
    )


@final
class Outgoing(Generic[_J_co]):
    """A job with its publish options, for `publish_many` and cron functions. The options mean the same as in `Publisher.publish`."""

    __slots__ = ("_job", "_options")

    def __init__(self, job: _J_co, **options: Unpack[OutgoingOptions]) -> None:
        if not OUTGOING_OPTIONS.issuperset(options):
            raise unexpected("Outgoing", options, OUTGOING_OPTIONS)
        headers = options.get("headers")
        if isinstance(headers, Mapping):  # publishing refuses any other type
            options["headers"] = dict(headers)
        self._job = job
        self._options: OutgoingOptions = options

    @property
    def job(self) -> _J_co:
        """The job."""
        return self._job

    @property
    def options(self) -> OutgoingOptions:
        """The options, as given."""
        return self._options

    def __repr__(self) -> str:
        return f"Outgoing({self._job!r})"
