"""What every job store promises of starts and aborts: between the two there is an order, whoever asks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from leveret.ids import new_job_id
from leveret.store import Abort, Change, Record, State, Store, Verdict
from tests.contract.store.changes import HOUR_S, Publish
from tests.contract.store.conftest import OpenStore

ENDS: list[State] = ["done", "failed", "aborted", "expired"]
WAITS: list[State] = ["queued", "delayed", "retrying"]


async def read(store: Store, publish: Publish) -> Record:
    """Return the record of a publish that has one."""
    (record,) = await store.read([publish.key])
    assert record is not None
    return record


async def begin(store: Store, *changes: Change) -> Sequence[Verdict]:
    """Begin runs, and return plain verdicts."""
    return list(await store.begin(changes))


async def test_a_run_may_begin_and_is_recorded(store: Store) -> None:
    """No job with `keep` ever starts, or is shown as waiting while it runs."""
    known, unknown = Publish(), Publish()
    await store.write([known.is_("queued", at_ms=1)])

    assert await begin(store, known.is_("running", at_ms=2), unknown.is_("running", at_ms=3)) == ["go", "go"]

    record = await read(store, known)
    assert (record.state, record.created_ms, record.started_ms) == ("running", 1, 2)
    record = await read(store, unknown)
    assert (record.state, record.created_ms, record.started_ms) == ("running", 3, 3)
    assert await begin(store) == []


async def test_verdicts_come_in_the_order_of_the_changes(store: Store) -> None:
    """A job that may start doesn't, and its aborted neighbour does."""
    free, aborted, over, new = Publish(), Publish(), Publish(), Publish()
    await store.write([free.is_("queued"), aborted.is_("queued"), over.is_("done")])
    assert await store.abort(aborted.key) == "aborted"

    verdicts = await begin(store, *(one.is_("running") for one in (over, free, aborted, new)))

    assert verdicts == ["ended", "go", "aborted", "go"]


async def test_a_run_whose_worker_died_may_begin_again(store: Store) -> None:
    """A worker that is killed takes its jobs with it: their redelivery never runs."""
    publish = Publish()
    await begin(store, publish.is_("running", at_ms=1))
    await store.write([publish.at(0.5, "half")])
    before = await read(store, publish)

    assert await begin(store, publish.is_("running", at_ms=2)) == ["go"]

    assert await read(store, publish) == before


async def test_two_copies_in_one_batch_both_get_a_verdict(store: Store) -> None:
    """A batch with two deliveries of one publish fails as a whole."""
    publish, other = Publish(), Publish()

    changes = [publish.is_("running"), other.is_("running"), publish.is_("running")]

    assert await begin(store, *changes) == ["go", "go", "go"]
    later = [publish.is_("running", passes=1), publish.is_("running")]
    assert await begin(store, *later) == ["go", "ended"]


@pytest.mark.parametrize("state", ENDS)
async def test_a_pass_that_has_ended_never_begins_again(store: Store, state: State) -> None:
    """A job whose ack got lost runs twice, although its end is known."""
    publish = Publish()
    await store.write([publish.is_(state, passes=1)])
    before = await read(store, publish)

    for passes in (1, 0):
        verdict = "aborted" if state == "aborted" else "ended"
        assert await begin(store, publish.is_("running", passes=passes)) == [verdict]

    assert await read(store, publish) == before


@pytest.mark.parametrize("state", ["queued", "running", "retrying", "delayed"])
async def test_a_pass_before_the_known_one_has_ended(store: Store, state: State) -> None:
    """A copy of the job from before its retry runs beside the retry."""
    publish = Publish()
    await store.write([publish.is_(state, passes=2)])
    before = await read(store, publish)

    assert await begin(store, publish.is_("running", passes=1)) == ["ended"]

    assert await read(store, publish) == before


@pytest.mark.parametrize("state", ENDS)
async def test_a_replay_begins_whatever_the_pass_before_ended_as(store: Store, state: State) -> None:
    """A dead letter that an operator replays is thrown away by the mark of an old abort."""
    publish = Publish()
    await store.write([publish.is_(state)])

    assert await begin(store, publish.is_("running", passes=1)) == ["go"]

    record = await read(store, publish)
    assert (record.state, record.passes, record.asked) == ("running", 1, False)


@pytest.mark.parametrize("state", WAITS)
async def test_a_publish_that_waits_is_aborted_at_once(store: Store, state: State) -> None:
    """An aborted job runs."""
    publish = Publish()
    await store.write([publish.is_(state, passes=3, attempt=2, body=b"body", at_ms=1)])

    assert await store.abort(publish.key) == "aborted"

    record = await read(store, publish)
    assert (record.state, record.passes, record.attempt, record.ended) == ("aborted", 3, 2, True)
    assert (record.asked, record.body, record.created_ms) == (False, b"body", 1)
    assert record.at_ms > 1
    assert await begin(store, publish.is_("running", passes=3, attempt=2)) == ["aborted"]
    assert await store.abort(publish.key) == "aborted"


async def test_a_publish_that_runs_is_asked_to_end(store: Store, open_store: OpenStore) -> None:
    """Nobody tells the worker, and the aborted job runs to its end."""
    publish, other = Publish(), Publish()
    await begin(store, publish.is_("running"), other.is_("running"))

    assert await open_store().abort(publish.key) == "asked"
    assert await open_store().abort(publish.key) == "asked"

    record = await read(store, publish)
    assert (record.state, record.asked, record.ended) == ("running", True, False)
    assert list(await store.asked([other.key, publish.key, Publish().key])) == [publish.key]
    assert list(await store.asked([])) == []


async def test_a_redelivery_of_a_run_that_was_asked_is_aborted(store: Store) -> None:
    """An abort is forgotten when the worker dies, and the job begins from the start."""
    publish = Publish()
    await begin(store, publish.is_("running"))
    await store.abort(publish.key)

    assert await begin(store, publish.is_("running", keep_s=HOUR_S)) == ["aborted"]

    assert (await read(store, publish)).state == "aborted"


async def test_a_retry_of_a_run_that_was_asked_is_aborted(store: Store) -> None:
    """A job that was asked to end fails, and its retry runs as if nobody had asked."""
    publish = Publish()
    await begin(store, publish.is_("running"))
    await store.abort(publish.key)
    await store.write([publish.is_("retrying", passes=1, attempt=2, error="ValueError: no")])
    assert (await read(store, publish)).asked

    assert await begin(store, publish.is_("running", passes=1, attempt=2, at_ms=9)) == ["aborted"]

    record = await read(store, publish)
    assert (record.state, record.passes, record.attempt, record.at_ms) == ("aborted", 1, 2, 9)
    assert not record.asked


@pytest.mark.parametrize("state", ENDS)
async def test_an_end_clears_what_was_asked(store: Store, state: State) -> None:
    """The replay of a job is aborted by a mark that was set before the job failed."""
    publish = Publish()
    await begin(store, publish.is_("running"))
    await store.abort(publish.key)

    await store.write([publish.is_(state)])

    assert not (await read(store, publish)).asked
    assert list(await store.asked([publish.key])) == []
    assert await begin(store, publish.is_("running", passes=1)) == ["go"]


@pytest.mark.parametrize("state", ["done", "failed", "expired"])
async def test_an_abort_after_the_end_says_finished(store: Store, state: State) -> None:
    """A user believes that a job was stopped whose effect is there."""
    publish = Publish()
    await store.write([publish.is_(state, result=b"1" if state == "done" else None)])
    before = await read(store, publish)

    assert await store.abort(publish.key) == "finished"

    assert await read(store, publish) == before


async def test_an_abort_hits_no_other_publish_of_the_id(store: Store) -> None:
    """A job that is published again under its id never runs, since the one before was aborted."""
    job_id = new_job_id()
    first, second = Publish(job_id), Publish(job_id)
    await store.write([first.is_("queued"), second.is_("queued")])

    assert await store.abort(first.key) == "aborted"

    assert await begin(store, second.is_("running"), first.is_("running")) == ["go", "aborted"]


async def test_an_abort_of_what_nobody_knows_says_so_and_leaves_no_mark(store: Store) -> None:
    """A misspelt id leaves a mark for ever, or the user believes that something was stopped."""
    publish = Publish()

    assert await store.abort(publish.key) == "unknown"

    assert await store.read([publish.key]) == [None]
    assert await begin(store, publish.is_("running")) == ["go"]


ABORTED_AT: dict[Abort, Verdict] = {"aborted": "aborted", "asked": "go", "unknown": "go"}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "publishes", [pytest.param(400, id="400"), pytest.param(10_000, marks=pytest.mark.fault, id="10000")]
)
async def test_an_abort_and_a_start_at_once_have_an_order(open_store: OpenStore, publishes: int) -> None:
    """A job that was aborted runs to its end, or one that may run is thrown away."""
    worker, caller, publisher = open_store(), open_store(), open_store()
    chance = random.Random(22)
    answers: set[Abort] = set()
    batches = 0
    # the rest is for a machine on which one of the two was first each time
    while batches < publishes // 100 or (not answers >= {"aborted", "asked"} and batches < publishes // 100 + 100):
        batches += 1
        batch = [Publish() for _ in range(100)]
        await publisher.write([one.is_("queued") for one in batch[:90]])  # nobody has heard of the others

        async def work(batch: Sequence[Publish] = batch) -> Sequence[Verdict]:
            begun: list[Verdict] = []
            for start in range(0, 100, 20):
                begun += await worker.begin([one.is_("running") for one in batch[start : start + 20]])
            return begun

        order = chance.sample(range(100), 100)
        calls = [caller.abort(batch[place].key) for place in order]
        if batches % 2:
            working, aborting = asyncio.ensure_future(work()), asyncio.gather(*calls)
        else:
            aborting, working = asyncio.gather(*calls), asyncio.ensure_future(work())
        aborts, verdicts = await aborting, await working

        by_place = dict(zip(order, aborts, strict=True))
        answers.update(aborts)
        assert [by_place[place] for place in range(100) if ABORTED_AT[by_place[place]] != verdicts[place]] == []
        records = await publisher.read([one.key for one in batch])
        for place, record in enumerate(records):
            assert record is not None
            assert record.state == ("aborted" if by_place[place] == "aborted" else "running")
            assert record.asked == (by_place[place] == "asked")
    assert answers >= {"aborted", "asked"}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "publishes", [pytest.param(300, id="300"), pytest.param(10_000, marks=pytest.mark.fault, id="10000")]
)
async def test_an_abort_and_an_end_at_once_agree(open_store: OpenStore, publishes: int) -> None:
    """A job is shown as done and as aborted, or "aborted" is answered for one that ran to its end."""
    worker, caller, publisher = open_store(), open_store(), open_store()
    chance = random.Random(23)
    for _ in range(publishes // 100):
        batch = [Publish() for _ in range(100)]
        twins = [Publish(one.key.job_id) for one in batch]
        await publisher.write([one.is_("queued") for one in (*batch, *twins)])
        await worker.begin([one.is_("running") for one in batch])
        kinds = [chance.choice(("done", "failed", "retried")) for _ in batch]

        async def settle(batch: Sequence[Publish] = batch, kinds: Sequence[str] = kinds) -> Sequence[Verdict]:
            ends: dict[str, State] = {"done": "done", "failed": "failed"}
            for start in range(0, 100, 20):
                await worker.write([
                    one.is_("retrying", passes=1, attempt=2) if kind == "retried" else one.is_(ends[kind])
                    for one, kind in zip(batch[start : start + 20], kinds[start : start + 20], strict=True)
                ])  # fmt: skip
            retried = [
                one.is_("running", passes=1, attempt=2)
                for one, kind in zip(batch, kinds, strict=True)
                if kind == "retried"
            ]
            return await worker.begin(retried)

        order = chance.sample(range(100), 100)
        settling = asyncio.ensure_future(settle())
        aborts = await asyncio.gather(*(caller.abort(batch[place].key) for place in order))
        by_place, left = dict(zip(order, aborts, strict=True)), list(await settling)
        records = await publisher.read([one.key for one in batch])
        for place, (record, kind) in enumerate(zip(records, kinds, strict=True)):
            assert record is not None
            if kind != "retried":
                assert by_place[place] in {"asked", "finished"}
                assert (record.state, record.asked) == (kind, False)
            elif (verdict := left.pop(0)) == "aborted":
                assert by_place[place] in {"asked", "aborted"}
                assert (record.state, record.asked) == ("aborted", False)
            else:
                assert (verdict, by_place[place]) == ("go", "asked")
                assert (record.state, record.asked) == ("running", True)
        assert {record and record.state for record in await publisher.read([one.key for one in twins])} == {"queued"}
