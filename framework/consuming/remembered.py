"""What a worker remembers of jobs that it ran, so that a redelivery doesn't run them again. In memory, per process."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from ..clock import Clock
from ..envelope import Envelope
from ..failure import Failure
from ..outcome import Ending, Repeated

if TYPE_CHECKING:
    from .slots import Held

MOST = 10_000
"""How many jobs are remembered; the oldest is forgotten first."""
FOR_S = 3600.0
"""How long a lost delivery is remembered, seconds. Most come back within a second; others wait behind a sick broker."""

Slot: TypeAlias = tuple[str, str, int]
"""Queue, job id and passes: a retry has the id of its first run, and one more pass."""
Key: TypeAlias = tuple[str, str, int, int, int]
"""The same, with the time of the publish and a hash of the body's end: publishers may use an id again, for another job."""
_END = 256
"""So many bytes of a body are hashed: a hash of 15 MiB would take 10 ms of the event loop."""


def key_of(envelope: Envelope) -> Key:
    """Return the key of a delivery."""
    return envelope.queue, envelope.job_id, envelope.passes, envelope.created_s, hash(envelope.body[-_END:])


def slot_of(envelope: Envelope) -> Slot:
    """Return the key of a cron slot, of which there may be several publishes."""
    return envelope.queue, envelope.job_id, envelope.passes


class Past(msgspec.Struct, frozen=True):
    """How a run ended whose delivery couldn't be settled. Holds neither a body nor a traceback's frames."""

    ending: Ending
    failure: Failure | None = None
    """What the retry or the dead letter says of the run."""


ACKED = Past(Repeated())
"""The job is settled, or its replacement is published: only the ack is missing."""


class Remembered:
    """The settlements that the broker may not have received, and the runs whose deliveries were lost.

    Args:
        clock: The time for forgetting.
        window: How many settlements can be on their way to the broker at once: its workers hold no more deliveries.
    """

    def __init__(self, clock: Clock, window: int) -> None:
        self._clock = clock
        self.settled: deque[Key] = deque(maxlen=window)
        """The last settlements. If the connection is lost now, any of them may not have arrived."""
        self._lost: dict[Key, tuple[float, Held | Past]] = {}
        """Oldest first, each with its time."""
        self._slots: dict[Slot, None] = {}
        self._given_back: dict[Key, None] = {}
        """The jobs that were given back after too long a wait. Another process may have run them since."""

    def lose(self, running: Iterable[Held]) -> None:
        """Remember the last settlements and the `running` jobs, because a channel or lease was lost."""
        for key in self.settled:
            self.add(key, ACKED)
        self.settled.clear()
        for held in running:
            self.add(key_of(held.delivery.envelope), held)

    def add(self, key: Key, what: Held | Past) -> None:
        """Remember a job that runs without a live delivery, or how it ended."""
        now = self._clock.monotonic()
        self._lost.pop(key, None)
        self._lost[key] = now, what
        while len(self._lost) > MOST or next(iter(self._lost.values()))[0] < now - FOR_S:
            del self._lost[next(iter(self._lost))]

    def take(self, key: Key) -> Held | Past | None:
        """Return what is remembered of a job, and forget it: the settlement of its redelivery is remembered again."""
        since, what = self._lost.pop(key, (0.0, None))
        return what if since >= self._clock.monotonic() - FOR_S else None

    def give_back(self, envelope: Envelope) -> None:
        """Remember that a job goes back to its queue without a run."""
        self._given_back[key_of(envelope)] = None
        if len(self._given_back) > MOST:
            del self._given_back[next(iter(self._given_back))]

    def gave_back(self, envelope: Envelope) -> bool:
        """Whether this process gave the job back, and forget it: the next time it comes back for another reason."""
        return self._given_back.pop(key_of(envelope), 0) is None

    def keep_slot(self, envelope: Envelope) -> None:
        """Remember the job of a cron slot for good if it has just been settled."""
        key = key_of(envelope)
        if key in self.settled or self._lost.get(key, (0.0, None))[1] is ACKED:
            self._slots[slot_of(envelope)] = None
            if len(self._slots) > MOST:
                del self._slots[next(iter(self._slots))]

    def has_slot(self, envelope: Envelope) -> bool:
        """Whether the job of a cron slot was settled here."""
        return slot_of(envelope) in self._slots
