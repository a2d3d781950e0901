"""A machine whose clock is two hours off: jobs come when they are due all the same."""

import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from leveret import App, Attempt, Job, Queue, Retry
from leveret.clock import SystemClock
from leveret.consuming.worker import working
from leveret.publishing.publisher import Publisher
from leveret.runtime import Runtime
from tests.fault.bench import eventually
from tests.rabbit.node import Rabbit

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]

TWO_HOURS_S = 7200.0


class OffClock(SystemClock):
    """The machine's clock, as it would be `off_s` later."""

    def __init__(self, off_s: float) -> None:
        self._off_s = off_s
        self.now: Callable[[], float] = lambda: time.time() + self._off_s


@pytest.mark.parametrize("off_s", [-TWO_HOURS_S, TWO_HOURS_S])
@pytest.mark.parametrize("whose", ["publisher", "worker"])
async def test_a_delay_and_a_retry_take_as_long_as_they_were_asked_to(rabbit: Rabbit, whose: str, off_s: float) -> None:
    """R42: one virtual machine that woke up with an old clock, and its jobs run two hours late, or all at once."""
    app, queue = App("shop", broker=rabbit.url), Queue(f"clock-{uuid.uuid4().hex[:12]}", priorities=False)
    runs: list[tuple[float, float]] = []

    class Order(Job, name="order", queue=queue):
        """A job to run."""

    async def run(job: Any, attempt: Attempt[Any]) -> Retry | None:
        runs.append((time.monotonic(), attempt.envelope.created_s))
        return Retry(1.0) if attempt.number == 1 else None

    app.handler(job=Order)(run)
    off, right = Runtime(app="shop", clock=OffClock(off_s)), Runtime(app="shop")
    sending, consuming = (off, right) if whose == "publisher" else (right, off)
    broker = app.open_broker(sending)
    publisher = Publisher(app.sender(broker, sending))
    try:
        async with working(app, runtime=consuming):
            await publisher.publish(Order(), timeout_s=20)
            await eventually(lambda: len(runs) == 2)
            began = time.monotonic()
            receipt = await publisher.publish(Order(), delay_s=1.0, timeout_s=20)
            await eventually(lambda: len(runs) == 4)
    finally:
        await broker.close()

    assert receipt
    for early, late in ((runs[0][0], runs[1][0]), (began, runs[2][0]), (runs[2][0], runs[3][0])):
        assert 0.9 < late - early < 2.5
    published_s = time.time() + (off_s if whose == "publisher" else 0)
    assert all(abs(created_s - published_s) < 30 for _, created_s in runs), "it is when the publisher says it was"
