"""`Timeout`: a run that takes too long ends, and says so."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, cast

import pytest

from leveret import App, Attempt, Bury, ConfigurationError, Consume, Done, Outcome
from leveret.clock import ManualClock, SystemClock
from leveret.consuming.handler import Registration, innermost, resolve
from leveret.middleware import Logs, Retries, Timeout
from leveret.testing import running
from tests.unit import runs
from tests.unit.runs import Greet, attempt


def chain(*layers: Any, handler: Any) -> Callable[[Attempt[Any]], Awaitable[Outcome]]:
    """A chain whose limits are in real time."""
    return runs.chain(*layers, handler=handler, bound=runs.runtime(SystemClock()))


async def forever(_: Attempt[Any]) -> None:
    await asyncio.Event().wait()


async def test_a_run_past_its_limit_is_cancelled_and_fails_with_the_limit_in_its_text() -> None:
    """A handler that hangs would keep its slot until the broker closes the channel, and everyone's deliveries with it."""
    ended = False

    async def handler(_: Attempt[Any]) -> None:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            ended = True

    with pytest.raises(TimeoutError, match=r"^greet was ended by its Timeout of 0.01 s$"):
        await chain(Timeout(0.01), handler=handler)(attempt())
    assert ended


async def test_a_run_within_its_limit_passes() -> None:
    """The layer stands round every run."""
    assert await chain(Timeout(5), handler=lambda _: asyncio.sleep(0))(attempt()) == Done()


async def test_a_short_limit_strikes_in_time_beside_a_long_one() -> None:
    """All limits share a timer: one that is set for the first to come, and not for the first to end, ends a job minutes late."""
    long = asyncio.ensure_future(chain(Timeout(60), handler=forever)(attempt()))
    await asyncio.sleep(0)
    begun = time.monotonic()
    results = await asyncio.gather(
        *(chain(Timeout(limit), handler=forever)(attempt()) for limit in (0.3, 0.1, 0.2)), return_exceptions=True
    )
    took_s = time.monotonic() - begun
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long

    assert all(isinstance(result, TimeoutError) for result in results)
    assert 0.3 <= took_s < 2


async def test_a_timeout_of_the_handlers_own_passes_as_it_is() -> None:
    """Else a slow database is reported as a slow job, with the wrong limit."""

    async def handler(_: Attempt[Any]) -> None:
        raise TimeoutError("the database took 3 s")

    with pytest.raises(TimeoutError, match="the database took 3 s"):
        await chain(Timeout(5), handler=handler)(attempt())


async def test_remaining_s_tells_the_innermost_limit_and_is_restored() -> None:
    """A handler that plans with it (a request's time-out, the next page) would plan past its end."""
    seen: list[float] = []
    run = attempt()

    async def note(attempt: Attempt[Any], proceed: Any) -> Outcome:
        seen.append(attempt.remaining_s())
        outcome: Outcome = await proceed(attempt)
        seen.append(attempt.remaining_s())
        return outcome

    class Own:
        """A limit of a user's, inside the app's."""

        def __init__(self, limit_s: float) -> None:
            self._layer = Timeout(limit_s)

        async def consume(self, attempt: Attempt[Any], proceed: Any) -> Outcome:
            return await self._layer.consume(attempt, proceed)

    async def handler(attempt: Attempt[Any]) -> None:
        seen.append(attempt.remaining_s())

    await chain(Own(100), note, Own(10), Own(50), handler=handler)(run)
    assert 99 < seen[0] <= 100
    assert 9 < seen[1] <= 10
    assert 99 < seen[2] <= 100
    assert run.remaining_s() == float("inf")


async def test_the_limit_is_restored_after_it_struck() -> None:
    """A try in place after it would find no time left."""
    run = attempt()
    with pytest.raises(TimeoutError):
        await chain(Timeout(0.001), handler=forever)(run)
    assert run.remaining_s() == float("inf")


async def test_a_shutdown_is_no_timeout() -> None:
    """A run that is cut off must come again, not be counted as a failure."""
    task = asyncio.create_task(cast("Any", chain(Timeout(60), handler=forever)(attempt())))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_handler_that_swallows_its_cancellation_has_failed_and_is_no_longer_cancelled() -> None:
    """Half of its work would count as done, or the cancellation would strike whoever settles the job."""

    async def handler(_: Attempt[Any]) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # what can't be left half done

    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(TimeoutError, match=r"^greet was ended by its Timeout of 0.001 s, but ignored the cancellation"):
        await chain(Timeout(0.001), handler=handler)(attempt())
    await asyncio.sleep(0)
    assert task.cancelling() == 0


async def test_a_handler_that_ignores_its_cancellation_is_named_every_30_s(caplog: pytest.LogCaptureFixture) -> None:
    """It would hold its slot in silence, and a worker with a hundred of them would stand still."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def note(attempt: Attempt, proceed: Consume) -> Outcome:
        return await proceed(attempt)

    async def wait_on() -> None:
        while not go_on.is_set():
            with suppress(asyncio.CancelledError):
                await go_on.wait()

    app = App("shop", middleware=[Retries(max_attempts=1), Timeout(1), note])

    @app.handler
    async def greet(job: Greet) -> None:
        begun.set()
        await wait_on()

    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if "ignores its cancel" in record.getMessage()]

    async with running(app) as lab:
        receipt = await lab.publish(Greet())
        draining = asyncio.ensure_future(lab.drain())
        await begun.wait()
        lab.advance(1)
        await asyncio.sleep(0.05)
        lab.advance(29)
        assert not lines()
        lab.advance(31)
        go_on.set()
        await draining
        lab.advance(60)
        (buried,) = lab.buried
    assert isinstance(buried.error, TimeoutError)
    place = f"{__file__}:{wait_on.__code__.co_firstlineno + 3} in {wait_on.__qualname__}"
    begins = f"job greet {receipt.job_id} ignores its cancellation: its Timeout was over"
    assert lines() == [f"{begins} {late_s} s ago, it keeps its slot, and it is at {place}" for late_s in (30, 60)]


@pytest.mark.parametrize("limit_s", [30, 0.05])
async def test_a_handler_that_blocks_the_loop_past_its_limit_is_named(
    caplog: pytest.LogCaptureFixture, limit_s: float
) -> None:
    """No limit can end such a handler, so it would hold up all others, and count as done after 3 s with a limit of 1 s."""
    app, ended = App("shop", broker="memory://", middleware=[Logs(), Retries(), Timeout(limit_s)]), asyncio.Event()

    @app.handler
    async def greet(job: Greet) -> None:
        time.sleep(0.15)  # noqa: ASYNC251 - what is tested
        asyncio.get_running_loop().call_soon(ended.set)

    async with app.publisher() as publisher, app.worker(queues=[]):
        receipt = await publisher.publish(Greet())
        await ended.wait()

    said = [record.getMessage() for record in caplog.records if "blocked the event loop" in record.getMessage()]
    if limit_s == 30:
        assert not said
        return
    (line,) = said
    place = f"{__file__}:{greet.__code__.co_firstlineno}"
    handler = f"handler {__name__}.{greet.__qualname__} ({place})"
    begins = f"job greet {receipt.job_id} blocked the event loop: {handler} returned after "
    assert line.startswith(begins)
    assert 0.14 < float(line.removeprefix(begins).partition(" s,")[0]) < 30
    assert "its Timeout of 0.05 s" in line


async def test_a_handler_in_a_thread_keeps_its_slot_and_then_fails(caplog: pytest.LogCaptureFixture) -> None:
    """A thread can't be stopped: freed early, its slot would let the retry run beside it."""
    app = App("shop", middleware=[Retries(max_attempts=2, base_s=0.001, cap_s=0.001), Timeout(0.02)])
    now = threading.Lock()
    overlapped: list[bool] = []
    loop = asyncio.get_running_loop()

    async def end() -> None:
        """Let the time limit pass, and the loop do what it does then."""
        lab.advance(0.03)
        for _ in range(20):
            await asyncio.sleep(0)

    @app.handler
    def greet(job: Greet) -> None:
        overlapped.append(not now.acquire(blocking=False))
        asyncio.run_coroutine_threadsafe(end(), loop).result(30)
        time.sleep(0.05)  # long enough for a retry to begin
        loop.call_soon_threadsafe(lab.advance, 31)
        now.release()

    async with running(app) as lab:
        receipt = await lab.publish(Greet())
        await lab.drain()
        (run,) = lab.buried
    assert overlapped == [False, False]
    assert run.outcome == Bury("TimeoutError: greet was ended by its Timeout of 0.02 s (attempt 2 of 2)")
    assert not [record for record in caplog.records if "ignores its cancel" in record.getMessage()]
    said = [record.getMessage() for record in caplog.records if "is past its time limit" in record.getMessage()]
    assert [line.partition(" is past")[0] for line in said] == [f"job greet {receipt.job_id}"] * 2


async def test_the_time_of_a_lab_ends_a_run_and_a_drain_does_not_move_it_there() -> None:
    """A test couldn't try a time-out without waiting for it; or a drain would end every handler that waits for a thread or a socket."""
    begun, go_on = asyncio.Event(), asyncio.Event()
    left_s: list[float] = []
    app = App("shop", middleware=[Retries(max_attempts=2), Timeout(30)])

    @app.handler
    async def greet(job: Greet, attempt: Attempt) -> None:
        left_s.append(attempt.remaining_s())
        begun.set()
        await go_on.wait()

    async with running(app) as lab:
        receipt = await lab.publish(Greet())
        await lab.publish(Greet(), delay_s=7)
        draining = asyncio.ensure_future(lab.drain())
        await begun.wait()
        lab.advance(29)
        await asyncio.sleep(0.05)
        assert not lab.attempts(receipt.job_id)
        lab.advance(1)
        while not (ended := lab.attempts(receipt.job_id)):
            await asyncio.sleep(0)
        assert isinstance(ended[0].error, TimeoutError)
        await asyncio.sleep(0.05)
        assert not draining.done()  # the second attempt waits for `go_on`, and no time passes
        go_on.set()
        await draining
        assert [run.number for run in lab.done] == [1, 2]
    assert left_s == [30] * 3


async def test_a_handler_in_a_thread_that_is_cut_off_is_not_said_to_be_late(caplog: pytest.LogCaptureFixture) -> None:
    """People would look for a slow handler where a stop had too little grace."""
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def greet(job: Greet) -> None:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait(5)

    with ThreadPoolExecutor(1) as threads:
        step = innermost(
            resolve(Registration(greet, Greet, ()), ()),
            clock=ManualClock(),
            threads=threads,
            around_sync=None,
            stopping=lambda: True,
        )
        task = asyncio.ensure_future(chain(Timeout(60), handler=step)(attempt()))
        await begun.wait()
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    (line,) = [record.getMessage() for record in caplog.records if record.name == "leveret.consumer"]
    assert line.startswith("job greet id-1 is cut off, but its thread can't be stopped")


@pytest.mark.parametrize(
    ("limit_s", "kind"),
    [
        (0, ValueError),
        (-1, ValueError),
        (float("inf"), ValueError),
        (float("nan"), ValueError),
        ("30", TypeError),
        (True, TypeError),
    ],
)
def test_wrong_limits_are_refused_where_they_are_written(limit_s: Any, kind: type[Exception]) -> None:
    """A limit of 0 would end every run, and one without end none."""
    with pytest.raises(kind, match="Timeout: limit_s"):
        Timeout(limit_s)


async def test_a_limit_that_the_broker_would_undercut_is_refused_at_start() -> None:
    """The broker would take the job away first, and run it a second time beside the first."""
    app = App("shop", broker="amqp://127.0.0.1:1/", middleware=[Timeout(1800)])

    @app.handler
    async def greet(job: Greet) -> None: ...

    with pytest.raises(ConfigurationError, match="1800 s is above three quarters of the 1800 s after which the broker"):
        async with app.worker(queues=[]):
            pass


def test_it_says_what_it_was_made_with() -> None:
    """`describe` names a layer by its repr."""
    assert (repr(Timeout(30)), Timeout(30).limit_s) == ("Timeout(30)", 30)
