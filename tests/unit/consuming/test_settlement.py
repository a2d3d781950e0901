"""What becomes of a delivery whose run has ended."""

import asyncio
import logging
from typing import Any, cast

import msgspec
import pytest

from leveret.broker import Delivery
from leveret.clock import ManualClock
from leveret.consuming.settlement import Ended, Settlement
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable, MessageTooLarge
from leveret.outcome import Bury, CutOff, Done, Ending, Expired, Retry, Undecodable, Unknown
from tests.unit import runs


class Settled:
    """A live delivery that records how it is settled."""

    live = True
    consumers = 0
    queue = runs.QUEUE

    def __init__(self, *refusals: Exception) -> None:
        self._refusals = list(refusals)
        self.envelope = Envelope(job_id="id-1", job="greet", queue="emails", body=b"{}")
        self.how: list[str] = []

    def done(self) -> None:
        self.how.append("done")

    async def again(self, envelope: Envelope) -> bool:
        self._refuse()
        self.how.append(f"again, attempt {envelope.attempt}")
        return True

    async def bury(self, envelope: Envelope) -> bool:
        self._refuse()
        self.how.append(f"buried from {envelope.origin}")
        return True

    def _refuse(self) -> None:
        if self._refusals:
            raise self._refusals.pop(0)


def broken(ended: Ended) -> None:
    """An observer that raises."""
    raise LookupError(ended.ending.kind.value)


@pytest.mark.parametrize(
    ("ending", "how"),
    [(Done(), "done"), (Retry(0), "again, attempt 2"), (Bury("no"), "buried from emails")],
    ids=["done", "retry", "bury"],
)
async def test_an_observer_that_raises_is_not_logged_as_a_failed_settlement(
    ending: Ending, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Who reads "couldn't be settled, it stays unacked" waits for a second run that never comes."""
    delivery = Settled()

    rest = Settlement([], runs.runtime(), broken).end(cast("Delivery", cast("Any", delivery)), None, ending, None)
    if rest is not None:
        await rest

    assert delivery.how == [how]
    [said] = [record for record in caplog.records if "observer" in record.message]
    assert said.levelno == logging.ERROR
    assert said.message.endswith(f"the observer of its ending raised: LookupError({ending.kind.value!r})")
    assert said.exc_info is not None
    assert "couldn't be settled" not in caplog.text


def because(outcome: Retry | Bury) -> Retry | Bury:
    outcome.__cause__ = LookupError("no such order")
    return outcome


async def ended(
    caplog: pytest.LogCaptureFixture, delivery: Settled, ending: Ending, *, cut: bool = False
) -> logging.LogRecord:
    """End a run like this, and return the only record of its ending."""
    settlement = Settlement([], runs.runtime())
    if cut:
        settlement.cut_off()
    rest = settlement.end(cast("Delivery", cast("Any", delivery)), runs.attempt(), ending, None)
    if rest is not None:
        await rest
    (record,) = [record for record in caplog.records if record.name in {"leveret.attempt", "leveret.consumer"}]
    return record


@pytest.mark.parametrize("ending", [because(Retry(0)), because(Bury("no"))], ids=["retry", "burial"])
async def test_a_failure_is_logged_once_its_publish_is_confirmed(
    ending: Ending, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody would look for a dead letter that isn't there, while the job waits unacknowledged for its broker."""
    clock = ManualClock()
    delivery = Settled(BrokerUnavailable("no broker"))
    rest = Settlement([], runs.runtime(clock)).end(
        cast("Delivery", cast("Any", delivery)), runs.attempt(clock=clock), ending, None
    )
    assert rest is not None
    settling = asyncio.ensure_future(rest)
    while not clock.sleepers:
        await asyncio.sleep(0)

    assert not [record for record in caplog.records if record.name == "leveret.attempt"]
    clock.advance(60)
    await settling
    (record,) = [record for record in caplog.records if record.name == "leveret.attempt"]
    assert vars(record)["outcome"] == ("retry" if isinstance(ending, Retry) else "buried")
    assert vars(record)["duration_s"] == 0.0  # of the run, not of the wait for the broker


async def test_a_retry_that_can_never_be_published_is_logged_as_the_burial_that_it_became(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two records, one of them untrue, for one run; or the reason without the failure that led to it."""
    too_large = MessageTooLarge("the headers have 9 bytes", size_bytes=9, limit_bytes=8)
    record = await ended(caplog, Settled(too_large), because(Retry(0)))
    assert record.levelno == logging.ERROR
    assert record.getMessage().endswith(": the retry can't be published: the headers have 9 bytes")
    assert (vars(record)["outcome"], vars(record)["error"]) == ("buried", "LookupError: no such order")
    assert record.exc_info
    assert record.exc_info[0] is LookupError


async def test_a_failure_whose_delivery_is_lost_is_logged_as_that(caplog: pytest.LogCaptureFixture) -> None:
    """The job runs again without a retry, and its traceback would be in no log."""
    delivery = Settled()
    delivery.live = False
    record = await ended(caplog, delivery, because(Bury("no")))
    assert (record.name, record.levelno, vars(record)["outcome"]) == ("leveret.attempt", logging.WARNING, "lost")
    assert "so the broker delivers the job again: LookupError: no such order" in record.getMessage()
    assert record.exc_info


async def test_a_hundred_failures_in_an_outage_are_a_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    """They say nothing that the line of the lost connection doesn't, and hide what else happens meanwhile."""
    caplog.set_level(logging.INFO)
    settlement = Settlement([], runs.runtime())
    for _ in range(2):
        settlement.lost()
        caplog.clear()
        for _ in range(100):
            delivery = Settled()
            delivery.live = False
            assert settlement.end(cast("Delivery", cast("Any", delivery)), runs.attempt(), Bury("no"), None) is None
        assert len(caplog.records) == 3
        assert caplog.records[-1].getMessage().endswith("(the next such runs are logged at debug level)")


async def test_a_hundred_retries_that_cannot_be_published_are_a_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """The broker blocks publishers for an hour: a line per job and minute hides what else happens."""
    caplog.set_level(logging.INFO, "leveret.consumer")
    clock = ManualClock()
    settlement = Settlement([], runs.runtime(clock))
    deliveries = [Settled(*[BrokerUnavailable("blocked")] * 20) for _ in range(100)]
    rests = [settlement.end(cast("Delivery", cast("Any", one)), runs.attempt(), Retry(0), None) for one in deliveries]
    settling = [asyncio.ensure_future(rest) for rest in rests if rest is not None]
    while not all(task.done() for task in settling):
        clock.advance(1)
        await asyncio.sleep(0)

    lines = [record.getMessage() for record in caplog.records if record.name == "leveret.consumer"]
    waits = [line for line in lines if "can't be published" in line]
    assert 2 <= len(waits) <= clock.monotonic() / 60 + 1
    assert "(jobs in this state: 1): blocked" in waits[0]
    assert "(jobs in this state: 100): blocked" in waits[1]
    assert len(lines) <= 2 * len(waits), "what the log named is also said to be published"
    assert any("is published after" in line for line in lines)


@pytest.mark.parametrize("ending", [CutOff(), because(Retry(0)), because(Bury("no")), Expired()])
async def test_a_run_that_is_cut_off_is_one_record(ending: Ending, caplog: pytest.LogCaptureFixture) -> None:
    """An operator asks which jobs will run twice; and nothing is true of a retry that a stop kept from being published."""
    record = await ended(caplog, Settled(), ending, cut=True)
    assert (record.levelno, vars(record)["outcome"]) == (logging.WARNING, "cut off")
    assert bool(record.exc_info) is isinstance(ending, (Retry, Bury))


@pytest.mark.parametrize("ending", [Undecodable("not JSON"), Unknown("no handler"), Bury("no")])
async def test_what_did_not_run_is_a_record_of_the_consumer(ending: Ending, caplog: pytest.LogCaptureFixture) -> None:
    """It has neither a duration nor an attempt, so a count of runs must not include it."""
    delivery = Settled()
    delivery.envelope = msgspec.structs.replace(delivery.envelope, unknown_since_ms=1)
    rest = Settlement([], runs.runtime()).end(cast("Delivery", cast("Any", delivery)), None, ending, None)
    assert rest is not None
    assert not caplog.records
    await rest
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("leveret.consumer", logging.ERROR)
    assert record.getMessage().startswith("greet id-1 (queue emails, attempt 1) is buried in emails.dead: ")
