"""What becomes of a delivery whose run has ended."""

import logging
from typing import Any, cast

import pytest

from leveret.broker import Delivery
from leveret.consuming.settlement import Ended, Settlement
from leveret.envelope import Envelope
from leveret.outcome import Bury, Done, Ending, Retry
from tests.unit import runs


class Settled:
    """A live delivery that records how it is settled."""

    live = True
    queue = runs.QUEUE

    def __init__(self) -> None:
        self.envelope = Envelope(job_id="id-1", job="greet", queue="emails", body=b"{}")
        self.how: list[str] = []

    def done(self) -> None:
        self.how.append("done")

    async def again(self, envelope: Envelope) -> None:
        self.how.append(f"again, attempt {envelope.attempt}")

    async def bury(self, envelope: Envelope) -> None:
        self.how.append(f"buried from {envelope.origin}")


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
