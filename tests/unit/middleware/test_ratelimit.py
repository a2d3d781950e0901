"""`RateLimit`: how many starts in a time, and what becomes of a job that comes too early."""

import asyncio
import heapq
import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from leveret import App, Attempt, Consume, Done, Job, Outcome, Snooze
from leveret.brokers.rabbitmq.topology import UNIT_MS, delay_units
from leveret.clock import ManualClock
from leveret.middleware import RateLimit, Retries
from leveret.runtime import Runtime
from leveret.testing import running
from tests.unit.runs import QUEUE, Greet, Memory, Piece, attempt, chain, runtime


class Other(Job, name="other", queue=QUEUE):
    """A job of the same queue that isn't limited."""


class Watch:
    """A layer that notes when runs start."""

    def __init__(self) -> None:
        self.starts: dict[str, list[float]] = {}

    def bind(self, runtime: Runtime) -> None:
        self._clock = runtime.clock

    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        self.starts.setdefault(attempt.envelope.job, []).append(self._clock.monotonic())
        return await proceed(attempt)


def most_in(starts: Sequence[float], window_s: float) -> int:
    """Return the most starts that any window of this length holds."""
    return max(sum(1 for other in starts if 0 <= other - start < window_s - 1e-6) for start in starts)


async def pass_time(clock: ManualClock, until: float) -> None:
    """Move the clock from timer to timer, so that what wakes sees the time for which it was due."""
    while (due_in_s := clock.next_due_in_s()) is not None and clock.monotonic() + due_in_s <= until:
        clock.advance(due_in_s)
        await asyncio.sleep(0)
    clock.advance(max(0.0, until - clock.monotonic()))


def step_on(clock: ManualClock, layer: RateLimit, starts: list[float], **more: Any) -> Any:
    async def handler(_: Attempt[Any]) -> None:
        starts.append(clock.monotonic())

    return chain(layer, handler=handler, bound=runtime(clock, **more))


async def test_starts_are_spaced_and_never_more_than_the_limit() -> None:
    """The API behind the handler would answer 429, or bill for it."""
    clock, starts = ManualClock(), list[float]()
    layer = RateLimit(10)
    step = step_on(clock, layer, starts)
    for _ in range(500):
        if layer.ready_in_s() == 0:
            assert await step(attempt()) == Done()
        clock.advance(0.013)
    assert most_in(starts, 1.0) <= 10
    assert len(starts) > 500 * 0.013 * 10 * 0.85


@pytest.mark.parametrize("limit", [120, 1000, 4000])
async def test_a_loop_that_wakes_late_loses_no_start(limit: int) -> None:
    """A limit of 1000 a second would be 300 where each wake-up comes 2 ms late, and a backlog would grow that the API behind could take."""
    clock, starts = ManualClock(), list[float]()
    layer = RateLimit(limit)
    step = step_on(clock, layer, starts)
    while not starts or starts[-1] - starts[0] < 1.0:
        if wait_s := layer.ready_in_s():
            clock.advance(wait_s + 0.002)
        else:
            await step(attempt())
    assert len(starts) >= limit * 0.99
    assert most_in(starts, 0.1) <= limit / 10 + layer.burst


async def test_a_burst_may_start_at_once_after_a_quiet_time() -> None:
    """`burst=5` must give five, and not five again before they are earned."""
    clock, starts = ManualClock(), list[float]()
    layer = RateLimit(1, burst=5)
    step = step_on(clock, layer, starts)
    for wait_s, expected in ((0.0, 5), (0.9, 0), (0.1, 1), (2.0, 2), (60.0, 5)):
        clock.advance(wait_s)
        before = len(starts)
        while layer.ready_in_s() == 0:
            await step(attempt())
        assert len(starts) - before == expected


async def test_asking_whether_it_is_ready_takes_nothing() -> None:
    """The consumer asks often; a question that costs a start would slow the queue down."""
    clock = ManualClock()
    layer = RateLimit(1, every_s=10.0)
    step = step_on(clock, layer, [])
    assert [layer.ready_in_s() for _ in range(3)] == [0.0, 0.0, 0.0]
    await step(attempt())
    assert [layer.ready_in_s() for _ in range(3)] == [10.0, 10.0, 10.0]


async def test_it_says_how_many_may_start_at_once() -> None:
    """Said too high, the consumer starts jobs only to snooze them; too low, a burst takes a turn of the loop for each."""
    clock = ManualClock()
    layer = RateLimit(2, burst=4)
    step = step_on(clock, layer, [])
    for wait_s in (0.0, 0.1, 0.4, 0.7, 1.3, 60.0):
        clock.advance(wait_s)
        said, begun = layer.starts_now(), 0
        while layer.ready_in_s() == 0:
            await step(attempt())
            begun += 1
        assert (said, layer.starts_now()) == (begun, 0)


@pytest.mark.parametrize("every_s", [1.0, 0.1, 7.3, 1e-3, 86_400.0])
async def test_after_the_wait_that_it_asked_for_it_is_ready(every_s: float) -> None:
    """The last bits of a sum of floats must not make a driver wait for no time, for ever."""
    clock = ManualClock()
    layer = RateLimit(3, every_s=every_s)
    step = step_on(clock, layer, [])
    for _ in range(300):
        await step(attempt())
        clock.advance(layer.ready_in_s())
        assert layer.ready_in_s() == 0.0


async def test_the_processes_of_one_work_share_the_limit() -> None:
    """Four processes would start four times as many."""
    clock, starts = ManualClock(), list[float]()
    layers = [RateLimit(10) for _ in range(4)]
    steps = [step_on(clock, layer, starts, processes=4) for layer in layers]
    assert [layer.starts_per_s for layer in layers] == [2.5] * 4
    for _ in range(1000):
        for layer, step in zip(layers, steps, strict=True):
            if layer.ready_in_s() == 0:
                await step(attempt())
        clock.advance(0.01)
    assert 95 <= len(starts) <= 104


async def test_a_short_wait_is_spent_in_the_slot() -> None:
    """Sending a job back to the broker for 0.2 s costs more than the wait."""
    clock, starts = ManualClock(), list[float]()
    step = step_on(clock, RateLimit(5), starts)
    tasks = [asyncio.create_task(step(attempt())) for _ in range(2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (starts, clock.sleepers) == ([0.0], 1)
    clock.advance(0.2)
    assert await asyncio.gather(*tasks) == [Done(), Done()]
    assert starts == [0.0, 0.2]


async def test_a_longer_wait_goes_back_to_the_broker_and_costs_no_attempt() -> None:
    """Held in its slot, a limited job blocks the others of its queue; retried, it is buried for having waited."""
    clock, starts = ManualClock(), list[float]()
    step = step_on(clock, RateLimit(1, every_s=10.0), starts)
    await step(attempt())
    outcome = await step(attempt())
    assert isinstance(outcome, Snooze)
    assert 10.0 <= outcome.delay_s <= 11.0
    assert len(starts) == 1


async def test_snoozed_jobs_get_places_one_after_the_other() -> None:
    """Snoozed for the same time they come back all together, and all but one are snoozed again."""
    clock = ManualClock()
    step = step_on(clock, RateLimit(1, every_s=10.0), [])
    await step(attempt())
    delays = [(await step(attempt())).delay_s for _ in range(20)]
    assert all(10.0 * place <= delay <= 10.0 * place + 1.0 for place, delay in enumerate(delays, 1))
    clock.advance(1000)
    await step(attempt())
    assert 10.0 <= (await step(attempt())).delay_s <= 11.0  # places that are over are free again


@pytest.mark.parametrize(
    ("count", "limit", "every_s", "processes", "shared", "slower", "most_passes"),
    [
        (1000, 10, 1.0, 1, False, 1.1, 3.0),
        (1000, 10, 1.0, 4, False, 1.3, 4.0),
        (1000, 10, 1.0, 4, True, 1.1, 3.0),
        (5000, 50, 1.0, 1, False, 1.1, 3.0),
        (20, 1, 10.0, 1, False, 1.1, 2.0),
        # few jobs, each in a process chosen by chance: some processes have none at their time
        (20, 1, 10.0, 4, False, 2.0, 2.0),
        (20, 1, 10.0, 4, True, 1.1, 2.0),
    ],
)
async def test_a_heap_of_limited_jobs_ends_in_good_time(
    count: int, limit: int, every_s: float, processes: int, shared: bool, slower: float, most_passes: float
) -> None:
    """Snoozes that miss their starts would take many times as long, or keep the broker busy with trips back and forth.

    The broker rounds delays up as RabbitMQ's ladder does, and hands a job to any of the processes.
    """
    clocks = [ManualClock() for _ in range(processes)]
    starts: list[float] = []
    rng = random.Random(7)
    layers = [RateLimit(limit, every_s=every_s) for _ in range(processes)]
    piece = Piece()
    steps = [
        step_on(clock, layer, starts, processes=processes, seed=n, shared=Memory([piece]) if shared else None)
        for n, (clock, layer) in enumerate(zip(clocks, layers, strict=True))
    ]
    order = itertools.count()
    coming = [(0.001 * n, next(order), 0) for n in range(count)]
    heapq.heapify(coming)
    sleeping: list[asyncio.Task[Outcome]] = []
    snoozes = 0
    while coming:
        now, _, passes = heapq.heappop(coming)
        for clock in clocks:
            await pass_time(clock, now)
        task = asyncio.create_task(steps[rng.randrange(processes)](attempt(passes=passes)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if task.done() and isinstance(task.result(), Snooze):
            snoozes += 1
            heapq.heappush(coming, (now + delay_units(task.result().delay_s) * UNIT_MS / 1000, next(order), passes + 1))
        elif not task.done():
            sleeping.append(task)
    for clock in clocks:
        await pass_time(clock, clock.monotonic() + 1.0)
    assert await asyncio.gather(*sleeping) == [Done()] * len(sleeping)
    assert len(starts) == count
    assert most_in(sorted(starts)[:400], every_s) <= limit + processes - 1
    assert max(starts) <= count / limit * every_s * slower
    assert snoozes / count <= most_passes


async def test_a_limit_on_some_jobs_of_a_queue_leaves_the_others_alone() -> None:
    """One slow API would hold up all that shares a queue with it."""
    watch = Watch()
    app = App("shop", middleware=[Retries(max_attempts=1)])

    @app.handler(middleware=[RateLimit(2, every_s=10.0), watch])
    async def greet(job: Greet) -> None: ...

    @app.handler(middleware=[watch])
    async def other(job: Other) -> None: ...

    async with running(app) as lab:
        for _ in range(10):
            await lab.publish(Greet())
        for _ in range(10):
            await lab.publish(Other())
        await lab.drain()
        assert len(lab.done) == 20
        assert all(run.number == 1 for run in lab.done)
    assert watch.starts["other"] == [0.0] * 10
    assert 40 <= max(watch.starts["greet"]) <= 60
    assert most_in(watch.starts["greet"], 10.0) <= 2


async def test_a_limit_on_every_handler_of_a_queue_holds_the_queue_back() -> None:
    """Without the readiness each job goes once round through the broker, out of order."""
    app = App("shop", middleware=[RateLimit(1, every_s=10.0)])
    starts: list[str] = []

    @app.handler
    async def greet(job: Greet) -> None:
        starts.append(job.who)

    async with running(app) as lab:
        ids = [(await lab.publish(Greet(str(n)))).job_id for n in range(5)]
        await lab.drain()
        assert starts == ["0", "1", "2", "3", "4"]
        assert [[type(run.outcome) for run in lab.attempts(job_id)] for job_id in ids] == [[Done]] * 5


async def test_a_publisher_in_the_same_process_changes_nothing() -> None:
    """A blocking publisher in a handler, bound for one process, would give each of four workers the whole limit."""
    layer = RateLimit(4)
    layer.bind(Runtime(app="shop", processes=4))
    step = chain(layer, handler=lambda _: asyncio.sleep(0), bound=Runtime(app="shop", processes=1))
    await step(attempt())
    layer.bind(Runtime(app="shop", processes=1))
    assert layer.starts_per_s == 1.0
    assert layer.ready_in_s() > 0.5


async def test_a_clock_of_another_kind_begins_anew() -> None:
    """What one test used up would hold up the next test of the same app."""
    layer = RateLimit(1, every_s=60.0)
    await step_on(ManualClock(), layer, [])(attempt())
    assert layer.ready_in_s() == 60.0
    layer.bind(runtime(ManualClock()))
    assert layer.ready_in_s() == 0.0


async def test_it_works_unbound() -> None:
    """A layer of a user's that wraps one need not know about `bind`."""
    layer = RateLimit(1, every_s=3600.0)

    async def inner(_: Attempt[Any]) -> Outcome:
        return Done()

    assert await layer.consume(attempt(), inner) == Done()
    assert 3590 < layer.ready_in_s() <= 3600


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"limit": 0}, ValueError),
        ({"limit": -1}, ValueError),
        ({"limit": float("inf")}, ValueError),
        ({"limit": float("nan")}, ValueError),
        ({"limit": 1, "every_s": 0}, ValueError),
        ({"limit": 1, "every_s": float("inf")}, ValueError),
        ({"limit": 1, "burst": 0}, ValueError),
        ({"limit": 1, "burst": 1.5}, TypeError),
        ({"limit": True}, TypeError),
        ({"limit": "50"}, TypeError),
    ],
)
def test_wrong_figures_are_refused_where_they_are_written(arguments: dict[str, Any], kind: type[Exception]) -> None:
    """A limit of 0 would never start anything, and say nothing."""
    with pytest.raises(kind, match="RateLimit: "):
        RateLimit(**arguments)


def test_it_says_what_it_was_made_with() -> None:
    """`describe` names a layer by its repr."""
    assert [repr(RateLimit(50)), repr(RateLimit(0.5, every_s=60, burst=3))] == [
        "RateLimit(50, every_s=1)",
        "RateLimit(0.5, every_s=60, burst=3)",
    ]
    assert repr(RateLimit(4000)) == "RateLimit(4000, every_s=1, burst=40)"  # what holds, chosen or not
