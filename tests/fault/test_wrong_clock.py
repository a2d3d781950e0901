"""A machine whose clock is two hours off: jobs come when they are due all the same."""

import time
import uuid
from typing import Any

import pytest

from leveret import App, Attempt, Job, Queue, Retry
from leveret.consuming.worker import working
from leveret.publishing.publisher import Publisher
from leveret.runtime import Runtime
from tests.fault.bench import eventually
from tests.fault.clock import OffClock

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]

TWO_HOURS_S = 7200.0
DELAY_S = 0.5


@pytest.fixture(params=["quorum", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of each broker that several machines share."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return str(request.getfixturevalue("rabbit").url)


@pytest.mark.parametrize("off_s", [-TWO_HOURS_S, TWO_HOURS_S])
@pytest.mark.parametrize("whose", ["publisher", "worker"])
async def test_a_delay_and_a_retry_take_as_long_as_they_were_asked_to(url: str, whose: str, off_s: float) -> None:
    """R42: one virtual machine that woke up with an old clock, and its jobs run two hours late, or all at once."""
    app, queue = App("shop", broker=url), Queue(f"clock-{uuid.uuid4().hex[:12]}", priorities=False)
    runs: list[tuple[float, float]] = []

    class Order(Job, name="order", queue=queue):
        """A job to run."""

    async def run(job: Any, attempt: Attempt[Any]) -> Retry | None:
        runs.append((time.monotonic(), attempt.envelope.created_s))
        return Retry(DELAY_S) if attempt.number == 1 else None

    app.handler(job=Order)(run)
    off, right = Runtime(app="shop", clock=OffClock(off_s)), Runtime(app="shop")
    sending, consuming = (off, right) if whose == "publisher" else (right, off)
    broker = app.open_broker(sending)
    publisher = Publisher(app.sender(broker, sending))
    try:
        async with working(app, runtime=consuming):
            published, published_s = time.monotonic(), sending.clock.now()
            await publisher.publish(Order(), delay_s=DELAY_S, timeout_s=20)
            await eventually(lambda: len(runs) == 2)
    finally:
        await broker.close()

    [(first, first_s), (second, second_s)] = runs
    assert first - published > 0.9 * DELAY_S
    assert second - first > 0.9 * DELAY_S
    assert first_s == second_s == pytest.approx(published_s, abs=20), "it is when the publisher says it was"
