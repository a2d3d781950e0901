"""The slots of a process and the jobs that wait for one: picked by level, with ageing, within the concurrency limits."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import msgspec

from ..broker import Delivery
from ..clock import Clock, Timer
from ..envelope import Envelope
from ..job import Priority, Queue
from ..layer import Readiness
from ..texts import named
from .limits import Limits
from .routes import Route
from .said import at_debug

logger = logging.getLogger("leveret.consumer")

_ASK_AGAIN_S = 1.0
HOLD_S = 450.0
"""Seconds that a delivery waits for a slot before it is given back; a quarter of the broker's limit, if the broker has one."""
RUN_PART = 0.75
"""The part of the broker's limit for which a job runs before its delivery is given back, once a delivery was overdue."""
AGEING_S = 10.0
"""Each such wait, in seconds, counts as one priority level, so that jobs of the lowest level don't starve."""

_RANK_S = {Priority.URGENT: 0.0, Priority.HIGH: AGEING_S, Priority.NORMAL: 2 * AGEING_S, Priority.LOW: 3 * AGEING_S}


class Held(msgspec.Struct, eq=False, gc=False):
    """A delivery that waits in this process for a slot, or has one."""

    delivery: Delivery
    route: Route
    arrived: float
    """When the delivery arrived, in Unix seconds."""
    since: float = 0.0
    """Since when the delivery is held, in monotonic seconds; 0 if its job started at its arrival."""
    task: asyncio.Task[None] | None = None
    """The task of the run, while it runs. Cleared at the end, because the traceback of a cancelled task refers to this object."""


class Returned(msgspec.Struct, frozen=True, eq=False):
    """Stands for the delivery of a running job that was given back: the job's next delivery takes its place."""

    queue: Queue
    envelope: Envelope
    redelivered: bool
    problem: None = None
    consumers: int = 0
    live: bool = False
    counted: bool = False

    async def begin(self) -> bool:
        """Return False: nothing begins by it."""
        return False

    def done(self) -> None:
        """Do nothing."""

    def give_back(self) -> None:
        """Do nothing."""

    async def again(self, _: Envelope, /) -> bool:
        """Publish nothing."""
        return False

    async def bury(self, _: Envelope, /) -> bool:
        """Publish nothing."""
        return False


class Gate:
    """Decides when a queue may start jobs: by the readiness of the middleware that all of its handlers share.

    Middleware counts a start only when the job's task reaches it, a turn of the loop later. Therefore, after asking, at most
    `starts_now` jobs start, and the gate asks again when the tasks of all of these have begun.
    """

    def __init__(self, layers: Sequence[Readiness]) -> None:
        self._ready = [layer.ready_in_s for layer in layers]
        self._now = [layer.starts_now for layer in layers]
        self.left = 0
        """Starts that remain of the number that the middleware allowed."""
        self.coming = 0
        """Started jobs whose tasks haven't begun."""
        self.timer: Timer | None = None
        """The timer that asks again; set while nothing may start."""

    def wait_s(self) -> float:
        """Ask the middleware, and return the seconds until a start; 0 means now, and `left` is then the number of starts."""
        try:
            wait_s = max(ready() for ready in self._ready)
            if wait_s <= 0:
                self.left = max(1, min(now() for now in self._now))
        except Exception as error:  # an error of a user's middleware must not make the worker forget deliveries
            logger.error(  # noqa: TRY400 - one line
                "middleware failed to say when its next job may start; the worker asks it again in %g s: %s",
                _ASK_AGAIN_S,
                named(error),
                exc_info=at_debug(error),
            )
            return _ASK_AGAIN_S
        return wait_s

    def start(self) -> None:
        """Count a started job."""
        self.left -= 1
        self.coming += 1

    def begin(self) -> bool:
        """Count a task that has begun; return whether all started tasks have begun."""
        self.coming -= 1
        if self.coming:
            return False
        self.left = 0
        return True

    def forget(self) -> None:
        """Drop an answer on which no job was started, because the answer gets stale."""
        if not self.coming:
            self.left = 0


class QueueHeld:
    """A queue in this process: its routes, its slots and its held jobs. Each level and kind of handler has a first-in, first-out lane."""

    def __init__(
        self,
        queue: Queue,
        routes: Iterable[Route],
        limit: int,
        gate: Gate | None,
        held_at_most_s: float | None,
        *,
        counts_crashes: bool = False,
    ) -> None:
        self.queue = queue
        self.routes = {route.handler.spec.name: route for route in routes}
        self.only = next(iter(self.routes.values())) if len(self.routes) == 1 else None
        """The route for jobs without a name, if the queue has only one kind of job."""
        self.limit = limit
        self.held_at_most_s = held_at_most_s
        """Seconds after which the broker takes back a delivery; None: never."""
        self.was_overdue = False
        """Whether the broker has taken back a delivery. Those of running jobs are then given back in time."""
        self.running = 0
        self.counts_crashes = counts_crashes
        """As `Features.counts_crashes`."""
        self.gate = gate
        self.count = 0
        self._lanes: dict[tuple[Priority, bool], deque[Held]] = {}

    def add(self, held: Held) -> None:
        """Add `held` at the end of its lane."""
        key = (held.delivery.envelope.priority, held.route.in_thread)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = deque()
        lane.append(held)
        self.count += 1

    def first(self, threads_full: bool) -> tuple[float, deque[Held]] | None:
        """Return the rank of the job to start next (lowest first) and its lane; None if no job may start."""
        best: tuple[float, deque[Held]] | None = None
        for (level, in_thread), lane in self._lanes.items():
            if not lane or (in_thread and threads_full):
                continue
            rank = lane[0].since + _RANK_S[level]
            if best is None or rank < best[0]:
                best = (rank, lane)
        return best

    def take(self, lane: deque[Held]) -> Held:
        """Remove the head of `lane` and return it."""
        self.count -= 1
        return lane.popleft()

    def remove(self, unwanted: Callable[[Held], bool]) -> Iterator[Held]:
        """Remove and yield every delivery that is `unwanted`."""
        for key, lane in self._lanes.items():
            out = [held for held in lane if unwanted(held)]
            if out:
                self._lanes[key] = deque(held for held in lane if not unwanted(held))
                self.count -= len(out)
                yield from out

    def oldest(self) -> float:
        """Return since when the delivery that has waited longest waits, in the clock's monotonic seconds; infinity if none waits."""
        return min((lane[0].since for lane in self._lanes.values() if lane), default=float("inf"))

    def overdue(self, now: float) -> Iterator[Held]:
        """Remove and yield the deliveries that have waited longer than `hold_s`; `now` is in the clock's monotonic seconds."""
        latest = now - self.hold_s
        return self.remove(lambda held: held.since < latest)

    @property
    def hold_s(self) -> float:
        """Seconds after which a waiting delivery is given back to the broker."""
        return HOLD_S if self.held_at_most_s is None else self.held_at_most_s / 4

    @property
    def run_s(self) -> float:
        """Seconds after which the delivery of a running job is given back; infinity until the broker has taken one back."""
        return self.held_at_most_s * RUN_PART if self.was_overdue and self.held_at_most_s is not None else float("inf")


class Slots:
    """Starts deliveries, and holds those that must wait: within the limits, and when the middleware of their queue is ready.

    Args:
        limits: How many handlers may run at once.
        clock: Measures the time that a delivery waits, and asks a gate again.
        start: Called with each delivery that gets a slot; `free` returns the slot.
    """

    def __init__(self, limits: Limits, clock: Clock, start: Callable[[Held, QueueHeld], None]) -> None:
        self.limits = limits
        self.queues: dict[str, QueueHeld] = {}
        self.running = 0
        """Handlers that run now."""
        self._in_threads = 0
        self._concurrency, self._threads = limits.concurrency, limits.threads
        self._clock = clock
        self._start = start
        self.stopping = False
        """Whether nothing starts any more."""

    def add_queue(self, queue: QueueHeld) -> None:
        """Add a queue."""
        self.queues[queue.queue.name] = queue

    @property
    def held(self) -> int:
        """Deliveries that wait for a slot."""
        return sum(queue.count for queue in self.queues.values())

    @property
    def hold_s(self) -> float:
        """Seconds for which a delivery of any queue may wait."""
        return min(queue.hold_s for queue in self.queues.values())

    @property
    def busy_queues(self) -> set[str]:
        """The names of the queues with running jobs."""
        return {name for name, queue in self.queues.items() if queue.running}

    def take(self, held: Held, queue: QueueHeld) -> bool:
        """Start `held` now if a slot is free and nothing waits before it, else hold it; return whether it was started."""
        if (
            not queue.count
            and self.running < self._concurrency
            and queue.running < queue.limit
            and not (held.route.in_thread and self._in_threads >= self._threads)
            and (queue.gate is None or self._may_start(queue.gate))
        ):
            self.give_slot(held, queue)  # nearly always: nothing waits before it
            return True
        held.since = self._clock.monotonic()
        queue.add(held)
        self._pump()
        return False

    def give_slot(self, held: Held, queue: QueueHeld) -> None:
        """Start `held`, whatever the limits say."""
        self.running += 1
        queue.running += 1
        if held.route.in_thread:
            self._in_threads += 1
        if queue.gate is not None:
            queue.gate.start()
        self._start(held, queue)

    def begun(self, queue: QueueHeld) -> None:
        """Count a started task that has begun; for a queue with a gate."""
        if queue.gate is not None and queue.gate.begin() and queue.count:
            # Only after this turn has the middleware counted the starts, and can be asked again.
            asyncio.get_running_loop().call_soon(self._pump)

    def free(self, route: Route, queue: QueueHeld) -> None:
        """Free the slot of a delivery, and start what may start now."""
        self.running -= 1
        queue.running -= 1
        if route.in_thread:
            self._in_threads -= 1
        if queue.count or (len(self.queues) > 1 and self.held):
            self._pump()

    def _pump(self) -> None:
        """Start every job that may start, over all queues, in the order of rank."""
        while self.running < self._concurrency and not self.stopping:
            best: tuple[float, QueueHeld, deque[Held]] | None = None
            threads_full = self._in_threads >= self._threads
            for queue in self.queues.values():
                if not queue.count or queue.running >= queue.limit:
                    continue
                if queue.gate is not None and not self._may_start(queue.gate):
                    continue
                first = queue.first(threads_full)
                if first is not None and (best is None or first[0] < best[0]):
                    best = (first[0], queue, first[1])
            if best is None:
                break
            _, queue, lane = best
            held = queue.take(lane)
            if held.delivery.live:
                self.give_slot(held, queue)
        for queue in self.queues.values():
            if queue.gate is not None:
                queue.gate.forget()  # the gate was asked, but another queue went first

    def _may_start(self, gate: Gate) -> bool:
        """Return whether `gate` allows a start now; if not, ask again when the answer may have changed."""
        if gate.left:
            return True
        if gate.coming or gate.timer is not None:
            return False
        wait_s = gate.wait_s()
        if wait_s > 0:
            gate.timer = self._clock.call_later(wait_s, partial(self._ask_again, gate))
            return False
        return True

    def _ask_again(self, gate: Gate) -> None:
        gate.timer = None
        self._pump()

    def remove(self, unwanted: Callable[[Held], bool]) -> Iterator[Held]:
        """Remove and yield every held delivery that is `unwanted`."""
        for queue in self.queues.values():
            yield from queue.remove(unwanted)

    def overdue(self, now: float) -> Iterator[Held]:
        """Remove and yield the deliveries that have waited longer than their queue's `hold_s`; `now` is in the clock's monotonic seconds."""
        for queue in self.queues.values():
            yield from queue.overdue(now)

    def pause(self) -> None:
        """Start nothing but by `give_slot`, until `resume`."""
        self._concurrency = 0

    def resume(self) -> None:
        """End a pause."""
        self._concurrency = self.limits.concurrency
        self._pump()

    def stop(self) -> None:
        """Start nothing more."""
        self.stopping = True
        for queue in self.queues.values():
            if queue.gate is not None and queue.gate.timer is not None:
                queue.gate.timer.cancel()


def in_arrival_order(held: Iterable[Held]) -> list[Held]:
    """Return the held deliveries, oldest first."""
    return sorted(held, key=lambda one: one.since)
