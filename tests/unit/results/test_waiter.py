"""The waiter: one question for all handles, and no wait that a store's fault ends or hides."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from leveret.errors import ConfigurationError, StoreUnavailable
from leveret.results import waiter as module
from leveret.results.waiter import LONGEST_S, Waiter, due_after
from leveret.store import Key, Record

from .levers import Breakable, change, key_of, memory_jobs
from .stores import at_once, down


class Waiting:
    """A waiter with its store."""

    def __init__(self, *, tells: bool = True) -> None:
        self.records = memory_jobs()
        self.store = Breakable(self.records, tells=tells)
        self.waiter = Waiter(self.store)

    async def runs(self, job_id: str) -> Key:
        """Let a job run, and return its publish."""
        key = key_of(job_id)
        await self.records.write([change(key, "running")])
        return key

    def waits(self, *keys: Key) -> list[asyncio.Task[Record]]:
        """Begin to wait for publishes, in one turn of the loop."""
        return [asyncio.create_task(self.waiter.ended(key)) for key in keys]

    async def asked(self, times: int) -> None:
        """Return when the store was asked so often, and the answer had time to come."""
        while len(self.store.questions) < times:
            await asyncio.sleep(0.001)


async def test_all_handles_of_a_turn_share_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand handles would be ten thousand queries, each 20 ms."""
    monkeypatch.setattr(module, "AT_ONCE", 100)
    waiting = Waiting()
    keys = [await waiting.runs(f"id-{number}") for number in range(1000)]
    await waiting.records.write([change(key, "done") for key in keys])

    records = await asyncio.gather(*waiting.waits(*keys))

    assert [record.key for record in records] == keys
    assert [len(question) for question in waiting.store.questions] == [100] * 10


def test_publishes_of_one_age_are_asked_for_together() -> None:
    """A service that begins to wait a hundred times a second would ask a hundred times a second for ever."""
    begins = [7.0 + number / 100 for number in range(100)]

    dues = [due_after(now, LONGEST_S) for now in begins]

    assert len(set(dues)) <= 3
    assert all(LONGEST_S / 2 <= due - now <= LONGEST_S for now, due in zip(begins, dues, strict=True))


async def test_an_end_is_found_though_the_store_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notice may be lost, and some stores have none."""
    monkeypatch.setattr(module, "FIRST_S", 0.001)
    waiting = Waiting(tells=False)
    key = await waiting.runs("id")
    [wait] = waiting.waits(key)
    await waiting.asked(3)

    await waiting.records.write([change(key, "done", result=b"7")])

    assert (await wait).result == b"7"


async def test_an_end_that_the_store_tells_of_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result would come up to a second late."""
    monkeypatch.setattr(module, "FIRST_S", 3600.0)
    waiting = Waiting()
    key = await waiting.runs("id")
    [wait, twin] = waiting.waits(key, key)
    await waiting.asked(1)

    await waiting.records.write([change(key, "failed")])

    assert (await wait).state == (await twin).state == "failed"


async def test_a_blip_of_the_store_ends_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that restarts would fail every request that waits for a result."""
    monkeypatch.setattr(module, "FIRST_S", 0.001)
    waiting = Waiting(tells=False)
    key = await waiting.runs("id")
    waiting.store.answer = down
    [wait] = waiting.waits(key)
    await waiting.asked(3)
    trouble = waiting.waiter.trouble

    waiting.store.answer = at_once
    await waiting.records.write([change(key, "done")])

    assert (await wait).state == "done"
    assert "nobody listens" in trouble
    assert not waiting.waiter.trouble


async def test_a_store_that_hangs_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One frozen connection would hide every end until the waits are over."""
    monkeypatch.setattr(module, "FIRST_S", 0.001)
    monkeypatch.setattr(module, "CALL_S", 0.01)
    waiting = Waiting()
    key = await waiting.runs("id")
    await waiting.records.write([change(key, "done")])
    waiting.store.answer = _never
    [wait] = waiting.waits(key)
    await waiting.asked(2)

    waiting.store.answer = at_once

    assert (await wait).state == "done"


async def _never() -> None:
    await asyncio.Event().wait()


async def _refused() -> None:
    msg = "tests://store refuses the login"
    raise ConfigurationError(msg)


async def _faulty() -> None:
    msg = "a fault of the store"
    raise KeyError(msg)


@pytest.mark.parametrize(("answer", "error"), [(_refused, ConfigurationError), (_faulty, KeyError)])
async def test_what_asking_again_will_not_mend_is_raised_to_each(
    answer: Callable[[], Awaitable[None]], error: type[Exception]
) -> None:
    """A wrong password would look like a job that takes long."""
    waiting = Waiting()
    waiting.store.answer = answer

    ends = await asyncio.gather(*waiting.waits(key_of("one"), key_of("two")), return_exceptions=True)

    assert [type(end) for end in ends] == [error] * 2


async def test_a_wait_that_is_given_up_is_asked_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The questions of a service would grow with every request that timed out."""
    monkeypatch.setattr(module, "FIRST_S", 0.001)
    waiting = Waiting(tells=False)
    kept, given_up = await waiting.runs("kept"), await waiting.runs("given up")
    [first, second] = waiting.waits(kept, given_up)
    await waiting.asked(1)

    second.cancel()
    await asyncio.wait([second])
    so_far = len(waiting.store.questions)
    await waiting.asked(so_far + 3)
    first.cancel()

    assert [list(question) for question in waiting.store.questions[so_far + 1 :]] == [[kept]] * 2


async def test_a_close_ends_every_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request would wait for its whole time-out on a publisher that is gone."""
    monkeypatch.setattr(module, "FIRST_S", 3600.0)
    waiting = Waiting()
    waits = waiting.waits(key_of("one"), key_of("two"))
    await waiting.asked(1)

    waiting.waiter.close("the publisher has ended")
    ends = await asyncio.gather(*waits, *waiting.waits(key_of("late")), return_exceptions=True)

    assert [type(end) for end in ends] == [StoreUnavailable] * 3
