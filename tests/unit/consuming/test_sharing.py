"""A settlement and its state in one transaction, where the broker and the job store share a database."""

from collections.abc import Sequence
from typing import Any, cast

import pytest

from leveret import Bury, Done, Retry, Snooze
from leveret.broker import Delivery
from leveret.consuming.recording import Recording
from leveret.consuming.settlement import Settlement
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable
from leveret.outcome import Aborted, Ending, Expired
from leveret.results.recorder import Recorder
from leveret.store import Change, Progress, State
from tests.unit import runs

from .kept import Bench, Resize, Thumbnail, images


class Beside:
    """A delivery of a broker that shares its transactions with the store; it keeps what each settlement was to enter."""

    consumers = 0
    queue = images

    def __init__(self, *lives: bool, refuses: bool = False) -> None:
        self.envelope = Envelope(job_id="id-1", job="image.resize", queue="images", body=b"{}", publish=7)
        self.changes: Sequence[Change | Progress] = ()
        self.entered: list[tuple[str, Sequence[tuple[State, int, int]]]] = []
        self._lives = [*lives] or [True]
        self._refuses = refuses

    @property
    def live(self) -> bool:
        return self._lives.pop(0) if self._lives[1:] else self._lives[0]

    def done(self) -> None:
        self._settle("done")

    async def again(self, _: Envelope) -> bool:
        return self._settle("again")

    async def bury(self, _: Envelope) -> bool:
        if self._refuses:
            raise BrokerUnavailable("its dead letters are full")
        return self._settle("bury")

    def _settle(self, how: str) -> bool:
        states: list[tuple[State, int, int]] = [
            (each.state, each.passes, each.attempt) for each in self.changes if isinstance(each, Change)
        ]
        self.entered.append((how, states))
        return True


async def settle(delivery: Beside, ending: Ending, *, stops: bool = False) -> list[Change | Progress]:
    """End a run of a worker that shares; return what its recorder was told."""
    bench, told = Bench(), Heard()

    @bench.handler
    async def resize(job: Resize) -> Thumbnail:
        return Thumbnail(64)

    runtime = runs.runtime()
    recording = Recording(cast("Recorder", told), bench.handlers(), runtime, shared=True)
    settlement = Settlement([], runtime, recording=recording)
    if stops:
        settlement.replacing.stop()
    settled, attempt = cast("Delivery", cast("Any", delivery)), runs.attempt()
    ending = await recording.end(settled, attempt, ending)
    rest = settlement.end(settled, attempt, ending, None)
    if rest is not None:
        await rest
    return told.notes


class Heard:
    """A recorder that only listens."""

    def __init__(self) -> None:
        self.notes: list[Change | Progress] = []

    def note(self, what: Change | Progress) -> None:
        self.notes.append(what)

    async def end(self, change: Change, *, required: bool = False) -> bool:
        self.notes.append(change)
        return not required


@pytest.mark.parametrize(
    ("ending", "how", "state"),
    [
        (Done(Thumbnail(64)), "done", ("done", 0, 1)),
        (Done("no thumbnail"), "bury", ("failed", 0, 1)),
        (Aborted(), "done", ("aborted", 0, 1)),
        (Expired(False), "done", ("expired", 0, 1)),
        (Expired(True), "bury", ("expired", 0, 1)),
        (Retry(5), "again", ("retrying", 1, 2)),
        (Snooze(5), "again", ("delayed", 1, 1)),
        (Bury("no"), "bury", ("failed", 0, 1)),
    ],
)
async def test_beside_the_brokers_jobs_each_settlement_enters_its_state(
    ending: Ending, how: str, state: tuple[State, int, int]
) -> None:
    """Written apart, a worker that dies between the two leaves a state that isn't so."""
    delivery = Beside()

    notes = await settle(delivery, ending)

    assert (delivery.entered, notes) == ([(how, [state])], [])


async def test_a_burial_that_waits_in_the_broker_enters_nothing() -> None:
    """A job would be "failed" whose letter is nowhere."""
    delivery = Beside(refuses=True)

    notes = await settle(delivery, Bury("no"), stops=True)

    assert (delivery.entered, notes) == ([("again", [])], [])


@pytest.mark.parametrize("lives", [[False], [True, False]], ids=["before", "in the last moment"])
async def test_an_end_whose_lease_was_lost_is_written_by_itself(lives: list[bool]) -> None:
    """This worker acknowledges the redelivery without a run: the job would "run" for ever."""
    delivery = Beside(*lives)

    notes = await settle(delivery, Done(Thumbnail(64)))

    assert delivery.entered == []
    assert [each.state for each in notes if isinstance(each, Change)] == ["done"]
