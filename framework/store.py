"""The contract of a job store: what is known of each publish of a job whose class has `keep=`.

    queued, delayed → running → done, failed, aborted, expired
                    ← retrying, delayed

A store keeps one record per publish, and orders what it hears by pass, attempt and stage, never by a clock: what comes late changes
nothing. Every store passes the same conformance suite (tests/contract/store). It knows nothing of jobs, handlers or brokers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

import msgspec

State: TypeAlias = Literal["queued", "delayed", "running", "retrying", "done", "failed", "aborted", "expired"]
"""
- queued: the broker has the job.
- delayed: the broker holds the job back until it is due, or the handler snoozed it.
- running: a worker runs the job, or died while it did.
- retrying: an attempt failed, and the job waits for the next one.
- done: the job is finished; its result is there, if it has one.
- failed: the job is in the dead letters of its queue.
- aborted: the job was aborted before its end.
- expired: the job had expired before it could start.
"""

Stage: TypeAlias = Literal[0, 1, 2]
STAGES: dict[State, Stage] = {
    "queued": 0,
    "delayed": 0,
    "retrying": 0,
    "running": 1,
    "done": 2,
    "failed": 2,
    "aborted": 2,
    "expired": 2,
}
"""The place of each state within one pass: it waits (0), it runs (1), it has ended (2)."""

Verdict: TypeAlias = Literal["go", "aborted", "ended"]
"""
- go: the run may start.
- aborted: the publish is aborted; it must not start.
- ended: this pass of it, or a later one, has ended or waits elsewhere; the delivery is a copy whose acknowledgement got lost.
"""
Abort: TypeAlias = Literal["aborted", "asked", "finished", "unknown"]
"""
- aborted: the publish never starts, or has ended so before.
- asked: it runs; its worker finds the mark.
- finished: it has ended otherwise.
- unknown: there is no record.
"""


class Key(NamedTuple):
    """One publish of a job: an id may be published twice, and both run."""

    job_id: str
    publish: int
    """64 random bits as a signed number, from the header `lv-publish`; never 0."""


class _OfPublish(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    job_id: str
    publish: int

    @property
    def key(self) -> Key:
        """The publish."""
        return Key(self.job_id, self.publish)


class _InState(_OfPublish, frozen=True, kw_only=True, gc=False):
    queue: str
    """The logical queue."""
    job: str
    """The registered name of the job."""
    state: State
    passes: int
    """`Envelope.passes` of the delivery or publish that the state is of."""
    attempt: int
    """`Envelope.attempt` of it."""

    @property
    def rank(self) -> tuple[int, int, Stage]:
        """The place in the life of the publish: only a change of a higher rank than the record's counts."""
        return self.passes, self.attempt, STAGES[self.state]


class Change(_InState, frozen=True, kw_only=True, gc=False):
    """A new state of one publish."""

    keep_s: float
    """Seconds from now for which the record stays, if nothing follows."""
    at_ms: int
    """When the state began, Unix ms, by the writer's clock. Shown to people; orders nothing."""
    result: bytes | None = None
    """The encoded result; of "done" only."""
    content_type: str = ""
    """How `result` is encoded."""
    error: str = ""
    """Why it failed or is retried: the error's class and message."""
    reason: str = ""
    """Why it was buried; or why a finished job has no result here."""
    body: bytes | None = None
    """The job's body, if its `keep` asks for it."""


class Progress(_OfPublish, frozen=True, kw_only=True, gc=False):
    """How far a run is. It changes only a record that is running, in the same pass and attempt."""

    passes: int
    attempt: int
    fraction: float
    note: str


class Record(_InState, frozen=True, kw_only=True, gc=False):
    """What a store knows of one publish: the last change that counted, and what came beside it."""

    created_ms: int
    """`at_ms` of the first change of this publish that the store has heard of."""
    started_ms: int | None
    """`at_ms` of the last "running"; None before."""
    at_ms: int
    """`at_ms` of the last change."""
    keep_until_ms: int
    """When the record may be deleted, Unix ms, by the store's clock."""
    progress: float | None = None
    note: str = ""
    asked: bool = False
    """Whether somebody asked to abort it, and it hasn't ended."""
    result: bytes | None = None
    content_type: str = ""
    error: str = ""
    reason: str = ""
    body: bytes | None = None

    @property
    def ended(self) -> bool:
        """Whether the state is done, failed, aborted or expired. A replay from the dead letters may still run it again."""
        return STAGES[self.state] == 2


class Store(Protocol):
    """A job store, used by one process and one event loop. It connects at the first use.

    Every method raises `StoreUnavailable` if the store can't answer, `ConfigurationError` if waiting won't help (a refused login, a
    schema that is missing), and `ValueError` for a text or a number that the store can't keep. Callers limit the time: a call that
    is cancelled may or may not have its effect, and leaves the store usable. Calls of one caller have their effects in the order
    in which they began.
    """

    @property
    def what(self) -> str:
        """The store's URL, without the password."""
        ...

    async def write(self, changes: Sequence[Change | Progress], /) -> None:
        """Enter changes and progress, in order, in one transaction; a change that is late, or progress of another run, has no effect.

        Progress of a publish without a change may have a transaction of its own.

        A change keeps what the record has of `body`, `created_ms` and, unless it begins a run, `started_ms`. It clears `progress` and
        `note` where it begins a run. The end of a publish clears `asked`; so does the start of a pass that follows an end.
        """
        ...

    async def begin(self, changes: Sequence[Change], /) -> Sequence[Verdict]:
        """Enter that runs begin, if they may: each change is "running". Return a verdict for each, in order.

        - The record is of a later pass, or of the same pass and has ended: "aborted" if it ended so, otherwise "ended".
        - `asked` is set, and the record hasn't ended: the record becomes "aborted" at the change's pass and attempt, kept for
          `keep_s`; "aborted".
        - Otherwise the record is "running"; "go". A redelivery of a run whose worker died changes nothing, and goes.

        Between a `begin` that goes and an `abort` there is an order: an abort that answers "aborted" is never followed by a "go" of
        that pass.
        """
        ...

    async def read(self, keys: Sequence[Key], /) -> Sequence[Record | None]:
        """Return the records of `keys`, in order; None for one that isn't there."""
        ...

    async def ended(self, keys: Sequence[Key], /) -> Sequence[Record]:
        """Return the records of those of `keys` that have ended, in any order; the others are watched from now on, see `watch`."""
        ...

    def watch(self, ended: Callable[[Sequence[Key]], None], /) -> None:
        """Call `ended` on the loop when the store hears that publishes ended that `ended(keys)` asked for.

        A store may never call it, or call it for others: the caller asks again from time to time.
        """
        ...

    async def newest(self, job_ids: Sequence[str], /) -> Sequence[Key | None]:
        """Return for each id, in order, the publish of which the store heard last for the first time; None if it knows none."""
        ...

    async def abort(self, key: Key, /) -> Abort:
        """Abort a publish. One that waits becomes "aborted" at its pass and attempt; one that runs is `asked`."""
        ...

    async def asked(self, keys: Sequence[Key], /) -> Sequence[Key]:
        """Return those of `keys` that are asked to end."""
        ...

    async def list(
        self, *, state: State | None = None, queue: str | None = None, job: str | None = None, limit: int
    ) -> Sequence[Record]:
        """Return records without their bodies and results, the last created first."""
        ...

    async def find(self, job_id: str, /, *, prefix: bool = False, limit: int = 100) -> Sequence[Record]:
        """Return every record of this id, or of the ids that begin with it; the last created first."""
        ...

    async def drop(self, keys: Sequence[Key], /) -> int:
        """Delete records, and return how many were there. The jobs aren't touched."""
        ...

    async def trim(self, at_most: int, /) -> int:
        """Delete at most so many records whose time is over, and return how many; a store that deletes them by itself returns 0."""
        ...

    async def close(self) -> None:
        """Close every connection, within the store's own deadline. Idempotent."""
        ...
