"""What every job store promises those who look: waiters, operators, and who deletes what is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

import pytest

from leveret.errors import StoreUnavailable
from leveret.ids import new_job_id
from leveret.store import Key, Record, State, Store, Verdict
from tests.contract.store.changes import Publish
from tests.contract.store.conftest import OpenStore
from tests.contract.store.harness import PATIENCE_S, StoreHarness


def keys(records: Sequence[Record]) -> list[Key]:
    """Return whose records they are, in order."""
    return [record.key for record in records]


class Told:
    """Watches for the end of one publish."""

    def __init__(self, key: Key) -> None:
        self.came = asyncio.Event()
        self._key = key

    def __call__(self, ended: Sequence[Key], /) -> None:
        if self._key in ended:
            self.came.set()


async def test_ended_returns_those_that_have_ended(store: Store) -> None:
    """A waiter never gets its result, or gets one that isn't there yet."""
    done, failed, runs, absent = Publish(), Publish(), Publish(), Publish()
    await store.write([done.is_("done", result=b"1"), failed.is_("failed", error="no"), runs.is_("running")])

    found = await store.ended([runs.key, done.key, absent.key, failed.key])

    assert {record.key: (record.state, record.result, record.error) for record in found} == {
        done.key: ("done", b"1", ""),
        failed.key: ("failed", None, "no"),
    }
    assert list(await store.ended([])) == []


async def test_thousands_of_publishes_are_asked_for_at_once(store: Store) -> None:
    """A process that awaits ten thousand handles asks one by one, or not at all."""
    publishes = [Publish() for _ in range(3000)]
    await store.write([one.is_("done" if place % 1000 == 0 else "running") for place, one in enumerate(publishes)])

    found = await store.ended([one.key for one in publishes])

    assert {record.key for record in found} == {one.key for one in publishes[::1000]}


@pytest.mark.tells
@pytest.mark.parametrize("state", ["done", "failed", "aborted", "expired"])
async def test_who_watches_is_told_of_the_end(open_store: OpenStore, state: State) -> None:
    """A waiter learns of the result up to a second late."""
    waiter, worker = open_store(), open_store()
    publish, other = Publish(), Publish()
    told = Told(publish.key)
    waiter.watch(told)
    await worker.write([publish.is_("queued"), other.is_("running")])
    assert list(await waiter.ended([publish.key, other.key])) == []

    if state == "aborted":
        await worker.abort(publish.key)
    else:
        await worker.write([publish.is_("running"), publish.is_(state)])

    async with asyncio.timeout(PATIENCE_S):
        await told.came.wait()
    assert keys(await waiter.ended([publish.key])) == [publish.key]


@pytest.mark.tells
async def test_who_asks_for_more_goes_on_watching_the_first(open_store: OpenStore) -> None:
    """A process that awaits more jobs than one question holds hears only of the last ones in time."""
    waiter, worker = open_store(), open_store()
    first, second = Publish(), Publish()
    told = Told(first.key)
    waiter.watch(told)
    await worker.write([first.is_("running"), second.is_("running")])

    await waiter.ended([first.key])
    await waiter.ended([second.key])
    await worker.write([first.is_("done")])

    async with asyncio.timeout(PATIENCE_S):
        await told.came.wait()


@pytest.mark.tells
async def test_two_who_watch_are_both_told(open_store: OpenStore) -> None:
    """The second who awaits a job takes the notice from the first."""
    worker, publish = open_store(), Publish()
    await worker.write([publish.is_("running")])
    both = [Told(publish.key), Told(publish.key)]
    for told in both:
        waiter = open_store()
        waiter.watch(told)
        await waiter.ended([publish.key])

    assert list(await worker.begin([publish.is_("running")])) == ["go"]
    await worker.abort(publish.key)
    await worker.begin([publish.is_("running")])

    async with asyncio.timeout(PATIENCE_S):
        for told in both:
            await told.came.wait()


async def test_newest_is_the_publish_that_was_heard_of_last_whatever_its_clock_says(store: Store) -> None:
    """`publisher.handle` gives the publish of yesterday."""
    job_id = new_job_id()
    first, second = Publish(job_id), Publish(job_id)
    assert await store.newest([job_id]) == [None]
    await store.write([first.is_("queued", at_ms=9_000)])
    await store.write([second.is_("queued", at_ms=1_000)])
    await store.write([first.is_("running", at_ms=9_001)])

    assert await store.newest([job_id]) == [second.key]

    assert await store.newest([job_id[:-1]]) == [None]
    await store.drop([second.key])
    assert await store.newest([job_id]) == [first.key]


async def test_newest_of_a_batch_is_the_last_in_it(store: Store) -> None:
    """A program that publishes an id twice at once sees the state of either."""
    job_id = new_job_id()
    publishes = [Publish(job_id) for _ in range(9)]

    await store.write([one.is_("queued") for one in publishes])

    assert await store.newest([job_id]) == [publishes[-1].key]
    assert keys(await store.find(job_id)) == [one.key for one in reversed(publishes)]


async def test_thousands_of_ids_are_looked_up_at_once(store: Store) -> None:
    """Ten thousand handles that were made by id would be ten thousand queries, and nothing else would get through."""
    publishes = [Publish() for _ in range(1000)]
    await store.write([one.is_("queued") for one in publishes])

    ids = [job_id for one in publishes for job_id in (one.key.job_id, f"no-{one.key.job_id}", one.key.job_id)]
    assert await store.newest(ids) == [key for one in publishes for key in (one.key, None, one.key)]
    assert list(await store.newest([])) == []


async def test_a_list_has_the_last_created_first_and_no_more_than_asked(store: Store) -> None:
    """An operator sees the oldest jobs, or a terminal full of results."""
    queue = new_job_id()
    publishes = [Publish(queue=queue) for _ in range(5)]
    for place, publish in enumerate(publishes):
        await store.write([publish.is_("queued", at_ms=50 - place, body=b"body")])
    await store.write([publishes[1].is_("done", result=b"result", at_ms=60)])

    found = await store.list(queue=queue, limit=4)

    assert keys(found) == [publish.key for publish in reversed(publishes[1:])]
    assert [record.body or record.result for record in found] == [None] * 4
    assert found[3].state == "done"


async def test_a_list_can_be_of_a_state_a_queue_and_a_job(store: Store) -> None:
    """An operator who asks what runs in a queue reads everything."""
    emails, reports = new_job_id(), new_job_id()
    first = Publish(queue=emails, job="invoice.send")
    second = Publish(queue=emails, job="report.make")
    third = Publish(queue=reports, job="report.make")
    await store.write([first.is_("running"), second.is_("queued"), third.is_("running")])

    assert keys(await store.list(queue=emails, limit=9)) == [second.key, first.key]
    assert keys(await store.list(queue=emails, state="running", limit=9)) == [first.key]
    assert keys(await store.list(queue=emails, job="report.make", limit=9)) == [second.key]
    assert keys(await store.list(queue=reports, job="report.make", state="running", limit=9)) == [third.key]
    assert keys(await store.list(queue=reports, job="invoice.send", limit=9)) == []
    assert third.key in keys(await store.list(limit=9))


async def test_find_returns_the_publishes_of_an_id_the_last_first(store: Store) -> None:
    """`show` shows one of two lives of a job."""
    job_id = new_job_id()
    first, second, other = Publish(job_id), Publish(job_id), Publish(job_id + "x")
    await store.write([first.is_("done", result=b"1"), second.is_("queued", body=b"2"), other.is_("queued")])

    found = await store.find(job_id)

    assert keys(found) == [second.key, first.key]
    assert (found[0].body, found[1].result) == (b"2", b"1")
    assert keys(await store.find(job_id, limit=1)) == [second.key]
    assert await store.find(job_id[:-1]) == []


async def test_find_by_the_beginning_of_an_id(store: Store) -> None:
    """The short id that a list shows finds nothing, or the wrong job."""
    start = new_job_id()
    first, second = Publish(f"{start}-1"), Publish(f"{start}-2")
    await store.write([first.is_("queued"), second.is_("queued"), Publish("0" + start).is_("queued")])

    assert keys(await store.find(start, prefix=True)) == [second.key, first.key]
    assert keys(await store.find(start, prefix=True, limit=1)) == [second.key]
    assert keys(await store.find(f"{start}-1", prefix=True)) == [first.key]


@pytest.mark.parametrize("character", ["%", "_", "*", "?", "[", "\\", "é", "'"])
async def test_a_character_of_an_id_stands_for_itself(store: Store, character: str) -> None:
    """`drop 5%` finds everybody's jobs."""
    start = new_job_id()
    own, other = Publish(f"{start}{character}1"), Publish(f"{start}abc1")
    await store.write([own.is_("queued"), other.is_("queued")])

    assert keys(await store.find(f"{start}{character}", prefix=True)) == [own.key]


async def test_drop_deletes_records_and_says_how_many(store: Store) -> None:
    """A record that was dropped is still there."""
    first, second, third = Publish(), Publish(), Publish()
    await store.write([one.is_("queued") for one in (first, second, third)])

    assert await store.drop([first.key, Publish().key, third.key]) == 2

    assert [record and record.key for record in await store.read([one.key for one in (first, second, third)])] == [
        None,
        second.key,
        None,
    ]
    assert await store.drop([first.key]) == 0
    assert await store.drop([]) == 0


async def until_gone(store: Store, publishes: Sequence[Publish]) -> int:
    """Trim until no record is there; return how many the store says it deleted."""
    count = 0
    async with asyncio.timeout(PATIENCE_S):
        while any(await store.read([one.key for one in publishes])):
            count += await store.trim(1000)
            await asyncio.sleep(0.01)
    return count


async def test_a_record_goes_when_its_time_is_over_and_no_other_does(store: Store) -> None:
    """The store grows for ever, or a result is gone before its user comes."""
    short, long = [Publish(keep_s=0.05) for _ in range(3)], Publish()
    await store.write([one.is_("queued") for one in (*short, long)])

    trimmed = await until_gone(store, short)

    assert trimmed >= 3 or trimmed == 0  # others may have left records whose time is over

    (record,) = await store.read([long.key])
    assert record is not None


async def test_each_change_begins_the_time_anew(store: Store) -> None:
    """The record of a job that waits for long, and then runs, is gone in the middle; or one that is done stays as if it had failed."""
    longer, shorter = Publish(), Publish()
    await store.write([longer.is_("queued", keep_s=0.05), shorter.is_("queued", keep_s=9e6)])
    await store.write([longer.is_("done", keep_s=9e6), shorter.is_("done", keep_s=0.05)])

    await until_gone(store, [shorter])
    deadline = time.time() + 0.1
    while time.time() < deadline:
        await asyncio.sleep(0.01)
        await store.trim(1000)

    (record,) = await store.read([longer.key])
    assert record is not None


async def test_trim_deletes_no_more_than_it_was_asked_to(store: Store) -> None:
    """One look at what is over holds the store up for minutes."""
    publishes = [Publish(keep_s=0.001) for _ in range(5)]
    await store.write([one.is_("queued") for one in publishes])
    await asyncio.sleep(0.05)

    assert await store.trim(2) in {2, 0}


async def test_calls_have_their_effects_in_order(store: Store) -> None:
    """What a worker notes of one job overtakes itself: progress of before covers that of now."""
    publish = Publish()

    unknown = asyncio.ensure_future(store.abort(publish.key))
    queued = asyncio.ensure_future(store.write([publish.is_("queued")]))
    begun = asyncio.ensure_future(store.begin([publish.is_("running")]))
    notes = [asyncio.ensure_future(store.write([publish.at(place / 100)])) for place in range(50)]
    asked = asyncio.ensure_future(store.abort(publish.key))
    last = asyncio.ensure_future(store.write([publish.at(0.9, "the last")]))
    await asyncio.gather(queued, *notes, last)

    assert (await unknown, list(await begun), await asked) == ("unknown", ["go"], "asked")
    (record,) = await store.read([publish.key])
    assert record is not None
    assert (record.note, record.asked) == ("the last", True)


async def test_a_call_that_is_cancelled_leaves_the_store_usable(store: Store) -> None:
    """A limit of time, or a stop, ends the records of everything that follows."""
    for turns in range(12):
        publish = Publish()
        call = asyncio.ensure_future(store.begin([publish.is_("running")]))
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])

        assert list(await store.begin([publish.is_("running")])) == ["go"]


async def test_a_value_that_cannot_be_kept_costs_no_call_beside_it(store: Store) -> None:
    """An id that a client made up would fail every wait of its process, or let the store look down for ever."""
    good, bad = Publish(), Publish("\ud800")
    huge = bad.is_("running", passes=1 << 70)
    calls = [store.newest(["\ud800"]), store.read([bad.key]), store.write([huge]), store.begin([huge])]

    beside = asyncio.gather(store.write([good.is_("queued")]), store.newest([good.key.job_id]))
    answers = await asyncio.gather(*calls, return_exceptions=True)

    assert await beside == [None, [good.key]]
    failed = [answer for answer in answers if isinstance(answer, BaseException)]
    assert all(isinstance(answer, ValueError) for answer in failed), failed
    assert await store.newest([good.key.job_id]) == [good.key]


async def test_every_call_says_so_while_the_store_does_not_answer_and_works_afterwards(
    kept: StoreHarness, store: Store
) -> None:
    """A call hangs, or raises what nobody catches; or the store stays away after the trouble is over."""
    publish = Publish()
    await store.write([publish.is_("queued")])
    hurried = kept.open(limit_s=1.0)
    await kept.break_()

    async with asyncio.timeout(PATIENCE_S):
        answers = await asyncio.gather(
            hurried.write([publish.is_("running")]),
            hurried.begin([publish.is_("running")]),
            hurried.abort(publish.key),
            hurried.drop([publish.key]),
            hurried.trim(10),
            return_exceptions=True,
        )

    assert [type(answer) for answer in answers] == [StoreUnavailable] * 5
    assert [answer for answer in answers if "\n" in str(answer)] == []
    await kept.heal()
    verdicts: Sequence[Verdict] = ()
    async with asyncio.timeout(2 * PATIENCE_S):
        while not verdicts:
            with suppress(StoreUnavailable):
                verdicts = list(await hurried.begin([publish.is_("running")]))
    assert verdicts == ["go"]


async def test_a_store_can_be_closed_twice_and_says_where_it_is(store: Store) -> None:
    """A stop raises, or hangs."""
    await store.write([Publish().is_("queued")])
    assert "://" in store.what

    await store.close()
    await store.close()
