"""What every job store promises of states: each publish has one record, and what comes late changes nothing."""

from __future__ import annotations

import time

import pytest

from leveret.ids import new_job_id
from leveret.store import Change, Key, Record, State, Store
from tests.contract.store.changes import HOUR_S, Publish


async def read(store: Store, publish: Publish) -> Record:
    """Return the record of a publish that has one."""
    (record,) = await store.read([publish.key])
    assert record is not None
    return record


async def test_a_record_says_what_was_written(store: Store) -> None:
    """A user sees another job's state, or none."""
    publish = Publish()
    before_ms = time.time() * 1000

    await store.write([publish.is_("queued", queue="emails", job="invoice.send", at_ms=17, body=b"\x00\xff")])

    record = await read(store, publish)
    after_ms = time.time() * 1000
    assert record.key == publish.key
    assert (record.queue, record.job, record.state) == ("emails", "invoice.send", "queued")
    assert (record.passes, record.attempt, record.asked, record.ended) == (0, 1, False, False)
    assert (record.created_ms, record.started_ms, record.at_ms) == (17, None, 17)
    assert (record.progress, record.note, record.error, record.reason) == (None, "", "", "")
    assert (record.result, record.content_type, record.body) == (None, "", b"\x00\xff")
    # a store may keep a record a little longer, so that it needn't note each change of that time
    assert before_ms - 1 <= record.keep_until_ms - HOUR_S * 1000 <= after_ms + 1 + HOUR_S * 1000 / 32


async def test_every_field_of_an_end_is_there(store: Store) -> None:
    """A user gets no result, or doesn't learn why a job failed."""
    done, failed = Publish(), Publish()

    await store.write([
        done.is_("done", result=b'{"n":1}\x00', content_type="application/json", reason="two sizes"),
        failed.is_("failed", error="ValueError: no", reason="an error that is never retried"),
    ])  # fmt: skip

    record = await read(store, done)
    assert (record.state, record.ended) == ("done", True)
    assert (record.result, record.content_type, record.reason) == (b'{"n":1}\x00', "application/json", "two sizes")
    record = await read(store, failed)
    assert (record.state, record.error, record.reason) == (
        "failed",
        "ValueError: no",
        "an error that is never retried",
    )


async def test_records_come_in_the_order_of_their_keys(store: Store) -> None:
    """A waiter gets another waiter's result."""
    first, second = Publish(), Publish()
    await store.write([second.is_("queued"), first.is_("running")])
    absent = Publish().key

    found = await store.read([first.key, absent, second.key, first.key])

    assert [record and record.key for record in found] == [first.key, None, second.key, first.key]
    assert await store.read([]) == []


async def test_an_id_may_be_published_twice_and_each_publish_has_its_record(store: Store) -> None:
    """A user who publishes an id again is told the state of the publish before."""
    job_id = new_job_id()
    first, second = Publish(job_id), Publish(job_id)

    await store.write([first.is_("done"), second.is_("queued")])

    assert (await read(store, first)).state == "done"
    assert (await read(store, second)).state == "queued"
    assert await store.read([Key(job_id, 1)]) == [None]


@pytest.mark.parametrize("number", [-(1 << 63), -1, 1, (1 << 63) - 1])
async def test_a_publish_is_any_number_of_64_bits(store: Store, number: int) -> None:
    """One publish in some can't be recorded, and takes the batch with it."""
    publish = Publish()
    publish.key = Key(publish.key.job_id, number)

    await store.write([publish.is_("queued")])

    assert (await read(store, publish)).publish == number


LIFE: list[tuple[State, int, int]] = [
    ("queued", 0, 1),
    ("running", 0, 1),
    ("retrying", 1, 2),
    ("running", 1, 2),
    ("delayed", 2, 2),
    ("running", 2, 2),
    ("failed", 2, 2),
    ("running", 3, 1),
    ("done", 3, 1),
]
"""One life in order: a retry, a snooze, dead letters, a replay. Each entry is a state, its pass and its attempt."""


async def test_a_life_in_order_is_followed(store: Store) -> None:
    """A state is stuck, although the job went on."""
    publish = Publish()
    for place, (state, passes, attempt) in enumerate(LIFE):
        await store.write([publish.is_(state, passes=passes, attempt=attempt, at_ms=1000 - place)])

        record = await read(store, publish)
        assert (record.state, record.passes, record.attempt, record.at_ms) == (state, passes, attempt, 1000 - place)


@pytest.mark.parametrize("last", range(1, len(LIFE)))
async def test_what_comes_late_changes_nothing_whatever_its_clock_says(store: Store, last: int) -> None:
    """A state goes backwards: a job that is done is shown as running, for ever."""
    publish = Publish()
    state, passes, attempt = LIFE[last]
    await store.write([publish.is_(state, passes=passes, attempt=attempt, at_ms=5, error="the one")])
    before = await read(store, publish)

    for state, passes, attempt in LIFE[: last + 1]:
        late = publish.is_(state, passes=passes, attempt=attempt, at_ms=900, error="late", result=b"late", keep_s=9e6)
        await store.write([late, late])

    assert await read(store, publish) == before


async def test_a_batch_may_hold_a_whole_life(store: Store) -> None:
    """A job that is done within one turn of the loop has no record, or an old one."""
    publish, other = Publish(), Publish()
    life: list[Change] = []
    for place, (state, passes, attempt) in enumerate(LIFE):
        life.append(publish.is_(state, passes=passes, attempt=attempt, at_ms=place))
        life.append(other.is_("queued"))

    await store.write(life)

    record = await read(store, publish)
    assert (record.state, record.passes, record.attempt) == LIFE[-1]
    assert (record.created_ms, record.started_ms, record.at_ms) == (0, 7, 8)


async def test_a_change_keeps_what_it_does_not_bring(store: Store) -> None:
    """The body of a job, or the time of its publish, is gone once it runs."""
    publish = Publish()
    await store.write([publish.is_("queued", at_ms=1, body=b"body")])
    await store.write([publish.is_("running", at_ms=2)])
    assert (await read(store, publish)).started_ms == 2
    await store.write([publish.is_("retrying", passes=1, attempt=2, at_ms=3, error="ValueError: no")])

    record = await read(store, publish)

    assert (record.created_ms, record.started_ms, record.at_ms) == (1, 2, 3)
    assert (record.body, record.error) == (b"body", "ValueError: no")
    await store.write([publish.is_("running", passes=1, attempt=2, at_ms=4)])
    record = await read(store, publish)
    assert (record.started_ms, record.error, record.body) == (4, "", b"body")


async def test_progress_is_of_the_run_that_goes_on(store: Store) -> None:
    """A bar shows 80 % of a run that ended, while the next one has begun."""
    publish = Publish()
    await store.write([publish.is_("running"), publish.at(0.25, "one of four"), publish.at(0.5, "two of four")])
    record = await read(store, publish)
    assert (record.progress, record.note, record.state) == (0.5, "two of four", "running")

    await store.write([publish.is_("retrying", passes=1, attempt=2), publish.at(0.75, "late")])
    record = await read(store, publish)
    assert (record.progress, record.note) == (0.5, "two of four")

    await store.write([publish.is_("running", passes=1, attempt=2), publish.at(0.75, "late")])
    record = await read(store, publish)
    assert (record.progress, record.note) == (None, "")

    await store.write([publish.at(0.1, passes=1, attempt=2)])
    assert (await read(store, publish)).progress == 0.1


async def test_progress_of_a_publish_that_nobody_knows_makes_no_record(store: Store) -> None:
    """A record without a queue or a job's name appears in a list."""
    publish = Publish()

    await store.write([publish.at(0.5)])

    assert await store.read([publish.key]) == [None]


async def test_any_text_can_be_kept(store: Store) -> None:
    """One error with a strange character in its message takes the records of a whole batch with it."""
    publish, other = Publish(), Publish()
    text = "a null \0, half a pair \ud83d, é"

    await store.write([
        publish.is_("running", error=text), publish.at(0.5, text), publish.is_("failed", error=text, reason=text), other.is_("done"),
    ])  # fmt: skip

    record = await read(store, publish)
    for kept in (record.error, record.reason, record.note):
        assert kept.startswith("a null ")
        assert kept.endswith(", é")
    assert (await read(store, other)).state == "done"


async def test_a_large_batch_and_a_large_result_are_kept(store: Store) -> None:
    """A worker with a large window, or a job with a large result, can't be recorded."""
    publishes = [Publish() for _ in range(1500)]
    large = bytes(range(256)) * 8192

    await store.write([publish.is_("queued") for publish in publishes])
    await store.write([publishes[7].is_("done", result=large)])

    states = [record and record.state for record in await store.read([publish.key for publish in publishes])]
    assert states == ["done" if place == 7 else "queued" for place in range(1500)]
    assert (await read(store, publishes[7])).result == large
