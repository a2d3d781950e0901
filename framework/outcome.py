"""The outcomes of a run. A chain returns an `Outcome`, and only `settlement.py` acts on it.

    Done     acked                       Retry    published again, attempt + 1, then acked
    Expired  acked, or buried            Snooze   published again, same attempt, then acked
                                         Bury     published to the dead-letter queue, then acked

`Retry`, `Snooze` and `Bury` are exceptions, so that a handler can return them or raise them from any depth. The error that
led to such an outcome is its `__cause__`.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar, Literal, TypeAlias, final

import msgspec

MAX_DELAY_S = 48 * 86_400.0
"""The longest delay that a broker holds a job back, seconds; for a longer wait use a schedule or a table."""


class Kind(Enum):
    """The ways in which a delivery ends; `value` is the word in logs, spans and counts."""

    DONE = "done"
    ABORTED = "aborted"
    """Somebody aborted the job by its handle: it doesn't run, or not to its end."""
    EXPIRED = "expired"
    EXPIRED_ON_ARRIVAL = "expired on arrival"
    """The job had expired before its first delivery: it waited in the queue, or the clocks of publisher and worker differ."""
    RETRY = "retry"
    SNOOZE = "snooze"
    BURY = "bury"
    UNDECODABLE = "undecodable"
    UNKNOWN = "unknown"
    NOT_STARTED = "not started"
    SUSPECTED = "suspected"
    """A worker may have died of the job: published again, with one more crash."""
    WORKER_LOST = "worker lost"
    """So many workers died while they ran the job that it is buried."""
    CUT_OFF = "cut off"
    LOST = "lost"
    """The delivery's channel or lease was lost: the broker delivers the job again, however the run ended."""
    REMEMBERED = "remembered"
    """The job was redelivered, or a cron slot's second copy came: settled by the first run, without another one."""


class Done(msgspec.Struct, frozen=True):
    """The job is finished; a handler that returns None, or its result, ends its job like this."""

    kind: ClassVar[Kind] = Kind.DONE
    result: Any = None
    """The result of a `Job[R]`, as the handler returned it."""


class Expired(msgspec.Struct, frozen=True):
    """The job had expired before it ran; the job is acked and counted, or buried."""

    kind: ClassVar[Kind] = Kind.EXPIRED
    keep: bool = False
    """Whether the job goes to the dead letters."""


class ExpiredOnArrival(Expired, frozen=True):
    """The job had expired before its first delivery."""

    kind: ClassVar[Kind] = Kind.EXPIRED_ON_ARRIVAL


def _delay(name: str, delay_s: float, *, zero: bool) -> float:
    if isinstance(delay_s, bool) or not isinstance(delay_s, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
        msg = f"{name}: delay_s must be a number of seconds, not {delay_s!r}"
        raise TypeError(msg)
    if not (0 <= delay_s if zero else 0 < delay_s) or delay_s > MAX_DELAY_S:
        msg = f"{name}: delay_s must be {'at least' if zero else 'above'} 0 and at most 48 days ({MAX_DELAY_S:.0f} s), not {delay_s}"
        raise ValueError(msg)
    return float(delay_s)


@final
class Snooze(Exception):
    """Run the job again in `delay_s` seconds, without counting an attempt. Return it or raise it.

    `delay_s` must be above 0 and at most 48 days; otherwise ValueError.
    """

    kind: ClassVar[Kind] = Kind.SNOOZE
    __match_args__: ClassVar[tuple[Literal["delay_s"]]] = ("delay_s",)

    def __init__(self, delay_s: float) -> None:
        super().__init__(delay_s)
        self._delay_s = _delay("Snooze", delay_s, zero=False)

    @property
    def delay_s(self) -> float:
        """Seconds to wait, in the broker."""
        return self._delay_s

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snooze) and other.delay_s == self.delay_s

    def __hash__(self) -> int:
        return hash((Snooze, self._delay_s))

    def __str__(self) -> str:
        return f"Snooze({self._delay_s!r})"

    __repr__ = __str__


@final
class Retry(Exception):
    """Run the job again, counting an attempt. Return it or raise it.

    `delay_s` is in seconds, at most 48 days; otherwise ValueError. With None, `Retries` computes the wait; without `Retries`,
    the job runs again at once.
    """

    kind: ClassVar[Kind] = Kind.RETRY
    __match_args__: ClassVar[tuple[Literal["delay_s"]]] = ("delay_s",)

    def __init__(self, delay_s: float | None = None) -> None:
        super().__init__(delay_s)
        self._delay_s = None if delay_s is None else _delay("Retry", delay_s, zero=True)

    @property
    def delay_s(self) -> float | None:
        """Seconds to wait, in the broker; None leaves the wait to `Retries`."""
        return self._delay_s

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Retry) and other.delay_s == self.delay_s

    def __hash__(self) -> int:
        return hash((Retry, self._delay_s))

    def __str__(self) -> str:
        return f"Retry({self._delay_s!r})"

    __repr__ = __str__


@final
class Bury(Exception):
    """Give up: the job goes to the dead-letter queue with `reason`. Return it or raise it."""

    kind: ClassVar[Kind] = Kind.BURY
    __match_args__: ClassVar[tuple[Literal["reason"]]] = ("reason",)

    def __init__(self, reason: str) -> None:
        if not isinstance(reason, str) or not reason:  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"Bury: reason must be a str that isn't empty, not {reason!r}"
            raise TypeError(msg)
        super().__init__(reason)
        self._reason = reason

    @property
    def reason(self) -> str:
        """Why the job is buried; shown by `leveret dead list`."""
        return self._reason

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bury) and other.reason == self.reason

    def __hash__(self) -> int:
        return hash((Bury, self._reason))

    def __str__(self) -> str:
        return f"Bury({self._reason!r})"

    __repr__ = __str__


Outcome: TypeAlias = Done | Expired | Retry | Snooze | Bury
"""The result of a chain: a closed set, so that a `match` can be exhaustive."""

OUTCOMES = (Done, Expired, Retry, Snooze, Bury)


class Undecodable(msgspec.Struct, frozen=True):
    """The job can't be decoded, so no handler can run it: buried at once, byte for byte."""

    kind: ClassVar[Kind] = Kind.UNDECODABLE
    reason: str


class Unknown(msgspec.Struct, frozen=True):
    """No handler of this worker knows the job's name, or only an older version: the job waits in the broker, then is buried."""

    kind: ClassVar[Kind] = Kind.UNKNOWN
    reason: str


class NotStarted(msgspec.Struct, frozen=True):
    """The worker held the job but didn't start it: given back, or published again where the next worker would take that for a crash."""

    kind: ClassVar[Kind] = Kind.NOT_STARTED


class CutOff(msgspec.Struct, frozen=True):
    """The job was still running at the end of the grace: left unsettled, so that the broker delivers it again."""

    kind: ClassVar[Kind] = Kind.CUT_OFF


class Aborted(msgspec.Struct, frozen=True):
    """The publish is aborted: acked, and not retried."""

    kind: ClassVar[Kind] = Kind.ABORTED


class Repeated(msgspec.Struct, frozen=True):
    """An earlier run has settled the job, or its settlement also settles this delivery: acked without a run.

    This process remembers that run, or the job store has its end.
    """

    kind: ClassVar[Kind] = Kind.REMEMBERED


class Suspect(msgspec.Struct, frozen=True):
    """The job came back, and this worker doesn't know why: published again with one more crash, before it starts."""

    kind: ClassVar[Kind] = Kind.SUSPECTED


class WorkerLost(msgspec.Struct, frozen=True):
    """The job was running whenever one of several workers died: buried."""

    kind: ClassVar[Kind] = Kind.WORKER_LOST
    crashes: int

    @property
    def reason(self) -> str:
        """Why the job is buried; shown by `leveret dead list`."""
        return f"worker_lost: {self.crashes} workers died while they ran this job (crash_limit)"


Ending: TypeAlias = Outcome | Aborted | Undecodable | Unknown | NotStarted | CutOff | Repeated | Suspect | WorkerLost
"""Every way in which a delivery can end in a worker; `Settlement.settle` acts on each."""
