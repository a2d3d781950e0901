"""Your own middleware: round a run (`consume`), round a publish (`publish`), both in one class, or a plain function."""

import asyncio
import time
from collections import Counter, defaultdict
from contextvars import ContextVar

from leveret import App, Attempt, Consume, Envelope, Job, Outcome, Publish, Queue, Receipt, Snooze
from leveret.middleware import LayerFacts, Retries, Stated
from leveret.testing import running

tenant: ContextVar[str] = ContextVar("tenant", default="-")


class Tenant:
    """Both sides: the tenant travels as a header, from whoever publishes into the run, and on into what that publishes."""

    async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
        if envelope.cause is None:  # a publisher's own; a retry keeps the headers that it came with
            envelope = envelope.with_headers({"x-tenant-id": tenant.get()})
        return await proceed(envelope)

    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        tenant.set(str(attempt.envelope.headers.get("x-tenant-id", "-")))  # a run has a context of its own
        return await proceed(attempt)


class Seconds:
    """One side: how long runs took, by job and how they ended. Runs overlap, so nothing of one run is kept in `self`."""

    def __init__(self) -> None:
        self.spent: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.runs: Counter[tuple[str, str]] = Counter()

    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        began = time.monotonic()
        outcome = await proceed(attempt)
        key = (attempt.envelope.job, type(outcome).__name__)
        self.spent[key] += time.monotonic() - began
        self.runs[key] += 1
        return outcome


class OnceMore(Stated):
    """A try in place. Its facts tell the others: a `Timeout` inside it counts twice when start-up checks it.

    Other protocols of `leveret.middleware` do as much: `Readiness` holds a queue back, `Bound` takes the clock.
    """

    def facts(self) -> LayerFacts:
        return LayerFacts(tries_in_place=1)

    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        try:
            return await proceed(attempt)
        except ConnectionError:
            return await proceed(attempt)


async def cooling_off(attempt: Attempt, proceed: Consume) -> Outcome:
    """A plain function. It may also decide not to go on: an order can be cancelled for a minute, so it waits in the broker."""
    if attempt.envelope.job == "order.ship" and attempt.envelope.passes == 0:
        return Snooze(60)
    return await proceed(attempt)


seconds = Seconds()
app = App("shop", middleware=[Tenant(), seconds, Retries(max_attempts=3), cooling_off])  # first is outermost


class Ship(Job, name="order.ship", queue=Queue("orders")):
    order_id: int


class Tell(Job, name="customer.tell", queue=Queue("emails")):
    text: str


told: list[str] = []
tries: list[int] = []


@app.handler(middleware=[OnceMore()])  # innermost, for this handler alone
async def ship(job: Ship, attempt: Attempt) -> None:
    tries.append(attempt.number)
    if attempt.number < 3:
        raise ConnectionError("the carrier's service is away")
    await attempt.publish(Tell(f"order {job.order_id} is on its way"))


@app.handler
async def tell(job: Tell) -> None:
    told.append(f"{tenant.get()}: {job.text}")


async def try_out() -> None:
    async with running(app) as lab:
        tenant.set("acme")
        await lab.publish(Ship(7))
        tenant.set("someone else")
        await lab.drain()
    assert tries == [1, 1, 2, 2, 3], tries
    assert told == ["acme: order 7 is on its way"], told  # through two retries and a second job
    assert seconds.runs == {
        ("order.ship", "Snooze"): 1, ("order.ship", "Retry"): 2, ("order.ship", "Done"): 1, ("customer.tell", "Done"): 1,
    }, seconds.runs  # fmt: skip


if __name__ == "__main__":
    asyncio.run(try_out())
