"""How many may run, and what a process holds and hasn't started: picked by level, with ageing, within the limits of concurrency."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import msgspec

from ..broker import Delivery
from ..clock import Clock, Timer
from ..codec import Decoder
from ..errors import ConfigurationError
from ..job import Priority, Queue
from ..layer import Consume, Readiness
from ..texts import named
from .handler import Handler
from .settlement import at_debug

logger = logging.getLogger("leveret.consumer")

_ASK_AGAIN_S = 1.0
AGEING_S = 10.0
"""A job that was held this much longer goes before one that is a level more urgent, so that the lowest isn't starved."""

_RANK_S = {Priority.URGENT: 0.0, Priority.HIGH: AGEING_S, Priority.NORMAL: 2 * AGEING_S, Priority.LOW: 3 * AGEING_S}


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How many handlers may run at once in a process."""

    concurrency: int = 100
    """All of them together."""
    threads: int = 8
    """Those that are a `def`."""
    queues: Mapping[str, int] = {}
    """Those of one queue; left out: no limit of its own."""

    def __post_init__(self) -> None:
        for name, value in [("concurrency", self.concurrency), ("threads", self.threads), *self.queues.items()]:
            if value < 1:
                msg = f"concurrency of {name!r} must be at least 1, not {value}"
                raise ConfigurationError(msg)

    def of(self, queue: str, *, in_threads: bool) -> int:
        """Return how many handlers of `queue` may run at once; `in_threads` where all of them are a `def`."""
        limit = min(self.queues.get(queue, self.concurrency), self.concurrency)
        return min(limit, self.threads) if in_threads else limit


class Route(msgspec.Struct, frozen=True, eq=False):
    """Where a job of one name goes: made at start, looked up once a delivery."""

    handler: Handler
    version: int
    """The highest that the handler's job knows."""
    decoder: Decoder
    step: Consume
    """The folded chain."""
    in_thread: bool


class Held(msgspec.Struct, eq=False, gc=False):
    """A delivery that waits here for a slot, or has one."""

    delivery: Delivery
    route: Route
    arrived: float
    """Unix seconds."""
    since: float = 0.0
    """Monotonic seconds; 0 for one that needn't wait."""
    task: asyncio.Task[None] | None = None
    """Its run, while it runs. Taken out at its end: the task of a run that was cancelled holds this in its traceback."""


class Gate:
    """What lets a queue start: the readiness of the layers that all its handlers have.

    A layer counts a start when the job's task gets there, a turn of the loop later. So once it was asked no more start
    than it said may (`starts_now`), and it is asked again when all of those tasks have begun.
    """

    def __init__(self, layers: Sequence[Readiness]) -> None:
        self._ready = [layer.ready_in_s for layer in layers]
        self._now = [layer.starts_now for layer in layers]
        self.left = 0
        """Starts that are left of what the layers said."""
        self.coming = 0
        """Starts whose tasks haven't begun."""
        self.timer: Timer | None = None
        """Set while nothing may start."""

    def wait_s(self) -> float:
        """Ask the layers: seconds until a start; 0 for now, and then `left` says how many."""
        try:
            wait_s = max(ready() for ready in self._ready)
            if wait_s <= 0:
                self.left = max(1, min(now() for now in self._now))
        except Exception as error:  # a user's layer: what was delivered with this one must not be lost sight of
            logger.error(  # noqa: TRY400 - one line
                "a layer can't say when its next job may start, so it is asked again in %g s: %s",
                _ASK_AGAIN_S,
                named(error),
                exc_info=at_debug(error),
            )
            return _ASK_AGAIN_S
        return wait_s

    def start(self) -> None:
        """Count a start."""
        self.left -= 1
        self.coming += 1

    def begin(self) -> bool:
        """Count a task that has begun; whether it was the last of those that were to."""
        self.coming -= 1
        if self.coming:
            return False
        self.left = 0
        return True

    def forget(self) -> None:
        """Drop an answer that nothing was started on: it doesn't keep."""
        if not self.coming:
            self.left = 0


class QueueHeld:
    """One queue here: its routes, its slots, and what is held of it: a lane a level and kind of handler, first in, first out."""

    def __init__(self, queue: Queue, routes: Iterable[Route], limit: int, gate: Gate | None, hold_s: float) -> None:
        self.queue = queue
        self.routes = {route.handler.spec.name: route for route in routes}
        self.only = next(iter(self.routes.values())) if len(self.routes) == 1 else None
        """The route of a job without a name, where the queue has one job only."""
        self.limit = limit
        self.hold_s = hold_s
        """Seconds after which what waits here is given back."""
        self.running = 0
        self.gate = gate
        self.count = 0
        self._lanes: dict[tuple[Priority, bool], deque[Held]] = {}

    def add(self, held: Held) -> None:
        """Take `held` in, behind the others of its level."""
        key = (held.delivery.envelope.priority, held.route.in_thread)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = deque()
        lane.append(held)
        self.count += 1

    def first(self, threads_full: bool) -> tuple[float, deque[Held]] | None:
        """Return the lane whose head is to start next, and its rank (lower is first); None if none may."""
        best: tuple[float, deque[Held]] | None = None
        for (level, in_thread), lane in self._lanes.items():
            if not lane or (in_thread and threads_full):
                continue
            rank = lane[0].since + _RANK_S[level]
            if best is None or rank < best[0]:
                best = (rank, lane)
        return best

    def take(self, lane: deque[Held]) -> Held:
        """Take the head of `lane` out."""
        self.count -= 1
        return lane.popleft()

    def remove(self, unwanted: Callable[[Held], bool]) -> Iterator[Held]:
        """Take out, and yield, whatever is `unwanted`."""
        for key, lane in self._lanes.items():
            out = [held for held in lane if unwanted(held)]
            if out:
                self._lanes[key] = deque(held for held in lane if not unwanted(held))
                self.count -= len(out)
                yield from out

    def overdue(self, now: float) -> Iterator[Held]:
        """Take out, and yield, what has waited here for longer than `hold_s`; `now` in the clock's monotonic seconds."""
        return self.remove(lambda held: held.since < now - self.hold_s)


class Slots:
    """Which delivery starts next: what is held of all queues, and how many run, within the limits and the readiness of the layers.

    Args:
        limits: How many may run at once.
        clock: For the time that was waited, and for asking a gate again.
        start: Called for each delivery that gets a slot; `free` gives the slot back.
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
        self._stopping = False

    def add_queue(self, queue: QueueHeld) -> None:
        """Hold deliveries of `queue` too."""
        self.queues[queue.queue.name] = queue

    @property
    def held(self) -> int:
        """Deliveries that wait for a slot."""
        return sum(queue.count for queue in self.queues.values())

    @property
    def busy_queues(self) -> set[str]:
        """The names of the queues of which something runs."""
        return {name for name, queue in self.queues.items() if queue.running}

    def take(self, held: Held, queue: QueueHeld) -> bool:
        """Start `held` now, if there is a slot and nothing waits before it; else hold it. Return whether it was started."""
        if (
            not queue.count
            and self.running < self._concurrency
            and queue.running < queue.limit
            and not (held.route.in_thread and self._in_threads >= self._threads)
            and (queue.gate is None or self._may_start(queue.gate))
        ):
            self.running += 1  # nearly all start here: `_give_slot`, written out
            queue.running += 1
            if held.route.in_thread:
                self._in_threads += 1
            if queue.gate is not None:
                queue.gate.start()
            self._start(held, queue)
            return True
        held.since = self._clock.monotonic()
        queue.add(held)
        self._pump()
        return False

    def _give_slot(self, held: Held, queue: QueueHeld) -> None:
        self.running += 1
        queue.running += 1
        if held.route.in_thread:
            self._in_threads += 1
        if queue.gate is not None:
            queue.gate.start()
        self._start(held, queue)

    def begun(self, queue: QueueHeld) -> None:
        """Note that a task that was started has begun; only for a queue with a gate."""
        if queue.gate is not None and queue.gate.begin() and queue.count:
            # once the layers have counted those that have begun, they can be asked again
            asyncio.get_running_loop().call_soon(self._pump)

    def free(self, route: Route, queue: QueueHeld) -> None:
        """Take a slot back, and start what may start then."""
        self.running -= 1
        queue.running -= 1
        if route.in_thread:
            self._in_threads -= 1
        if queue.count or (len(self.queues) > 1 and self.held):
            self._pump()

    def _pump(self) -> None:
        """Start what may start: of all queues, whatever ranks first."""
        while self.running < self._concurrency and not self._stopping:
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
                self._give_slot(held, queue)
        for queue in self.queues.values():
            if queue.gate is not None:
                queue.gate.forget()  # it was asked, and another queue went first

    def _may_start(self, gate: Gate) -> bool:
        """Whether the readiness of its layers lets a queue start one now; if not, it is asked again when that may have changed."""
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
        """Take out, and yield, whatever is held and `unwanted`."""
        for queue in self.queues.values():
            yield from queue.remove(unwanted)

    def overdue(self, now: float) -> Iterator[Held]:
        """Take out, and yield, what has waited for longer than its queue's `hold_s`; `now` in the clock's monotonic seconds."""
        for queue in self.queues.values():
            yield from queue.overdue(now)

    def stop(self) -> None:
        """Start nothing more."""
        self._stopping = True
        for queue in self.queues.values():
            if queue.gate is not None and queue.gate.timer is not None:
                queue.gate.timer.cancel()


def in_arrival_order(held: Iterable[Held]) -> list[Held]:
    """Return what was held, oldest first."""
    return sorted(held, key=lambda one: one.since)
