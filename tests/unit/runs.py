"""An attempt and a chain without a broker, for tests of single layers."""

import random
from collections.abc import Awaitable, Callable
from typing import Any, cast

from leveret import Attempt, Job, Outcome, Queue
from leveret.attempt import make_attempt
from leveret.chain import bind, fold_consume
from leveret.clock import Clock, ManualClock, SystemClock
from leveret.envelope import Envelope
from leveret.layer import check_layers
from leveret.outcome import Done
from leveret.runtime import Region, Runtime, Shared

QUEUE = Queue("emails")


class Greet(Job, name="greet", queue=QUEUE):
    """A job to run."""

    who: str = "Ada"


class Memory:
    """What the workers' shared memory is to one of several processes, all of them played in this one."""

    def __init__(self, regions: list[Any]) -> None:
        self._regions = iter(regions)

    def region(self) -> Region | None:
        return next(self._regions, None)


class Piece:
    """A region with a lock that a test can keep."""

    def __init__(self) -> None:
        self.numbers: memoryview[float] = memoryview(bytearray(64)).cast("d")
        self.kept = False

    def lock(self) -> bool:
        return not self.kept

    def unlock(self) -> None: ...


def runtime(clock: Clock | None = None, *, processes: int = 1, seed: int = 1, shared: Shared | None = None) -> Runtime:
    """A runtime whose clock is moved by hand and whose chance repeats."""
    return Runtime(
        app="test", clock=clock or ManualClock(), rng=random.Random(seed), processes=processes, shared=shared
    )


def attempt(number: int = 1, *, clock: Clock | None = None, **fields: Any) -> Attempt[Any]:
    """The attempt that a consumer would make; its deadlines are the machine's without a `clock`."""
    envelope = Envelope(
        **{"job_id": "id-1", "job": "greet", "queue": "emails", "body": b'{"who":"Ada"}', "attempt": number, **fields}
    )
    return make_attempt(Greet(), envelope, False, 0.0, None, cast("Any", None), clock or SystemClock())


def chain(
    *layers: Any, handler: Callable[[Attempt[Any]], Awaitable[Outcome | None]], bound: Runtime | None = None
) -> Callable[[Attempt[Any]], Awaitable[Outcome]]:
    """Fold `layers` around `handler`, checked and bound as a consumer does it; nothing is done."""

    async def inner(attempt: Attempt[Any]) -> Outcome:
        return await handler(attempt) or Done()

    checked = check_layers(layers, "test")
    bind(checked, bound or runtime())
    return fold_consume(checked, inner)
