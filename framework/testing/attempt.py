"""An attempt for a test that calls a handler directly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast, final, overload

from typing_extensions import TypeVar as DefaultTypeVar

from ..attempt import Attempt
from ..clock import ManualClock
from ..envelope import Envelope
from ..errors import ConfigurationError
from ..job import Job, Queue
from ..publishing.publisher import Publisher
from ..publishing.sender import Sender
from ..runtime import Runtime
from .memory import memory
from .records import Published, jobs_of

_J = TypeVar("_J", bound=Job)
_R = TypeVar("_R")
_R_co = DefaultTypeVar("_R_co", covariant=True, default=object)


@final
class MadeAttempt(Attempt[_R_co]):
    """The attempt that `attempt` makes. It records what the handler publishes."""

    __slots__ = ("_published",)

    _published: list[Published]

    @property
    def published(self) -> Sequence[Published]:
        """The jobs that the handler has published, in order."""
        return tuple(self._published)

    def published_of(self, job_class: type[_J], /) -> Sequence[_J]:
        """Return the jobs of a class that the handler has published, in order."""
        return jobs_of(self._published, job_class)


@overload
def attempt(*, number: int = 1) -> MadeAttempt[None]: ...
@overload
def attempt(*, resources: _R, number: int = 1) -> MadeAttempt[_R]: ...
def attempt(*, resources: Any = None, number: int = 1) -> MadeAttempt[Any]:
    """Make an attempt to call a handler with. What the handler publishes is in `published`, and runs nowhere."""
    if number < 1:
        msg = f"attempt: number must be at least 1, the first run, not {number}"
        raise ConfigurationError(msg)
    published: list[Published] = []
    runtime = Runtime(app="test", clock=ManualClock())
    broker = memory()
    sender = Sender(
        broker.MemoryBroker(broker.MemoryStore(), runtime),
        (),
        runtime,
        lambda job, envelope: published.append(Published(job, envelope)),
    )
    envelope = Envelope(job_id="00000000-0000-7000-8000-000000000000", job="test.attempt", queue="test", attempt=number)
    made = cast(
        "MadeAttempt[Any]",
        MadeAttempt._make(  # pyright: ignore[reportPrivateUsage]
            _TestedJob(), envelope, number > 1, runtime.clock.now(), resources, Publisher(sender), runtime.clock
        ),
    )
    made._published = published  # pyright: ignore[reportPrivateUsage]
    return made


class _TestedJob(Job, name="test.attempt", queue=Queue("test")):
    """The job of an attempt that a test made."""
