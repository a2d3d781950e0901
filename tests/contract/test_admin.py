"""What every broker's admin promises: depths, purging, and reading dead letters without losing one."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from leveret.admin import Admin, DeadLetter
from leveret.broker import Broker
from leveret.errors import LeveretError
from leveret.job import Priority, Queue
from tests.contract.harness import PATIENCE_S, Harness, consume, depth, make_envelope, received, soon, timed


async def bury(broker: Broker, queue: Queue, *bodies: bytes, priority: Priority = Priority.NORMAL) -> None:
    """Publish and bury one job a body, in order."""
    consumption, sink = await consume(broker, queue)
    for body in bodies:
        await broker.publish(queue, timed(make_envelope(queue, body, priority=priority), soon()))
        delivery = await sink.next()
        buried = msgspec.structs.replace(delivery.envelope, attempt=5, passes=4, origin=queue.name)
        await delivery.bury(timed(buried, soon()))
    await consumption.close()


async def dead_bodies(admin: Admin, queue: Queue, count: int) -> list[bytes]:
    """Read them all, and leave them; once there are `count`, since a quorum queue takes a moment to have back what was only read."""
    async with asyncio.timeout(PATIENCE_S):
        while (await depth(admin, queue)).dead != count:
            await asyncio.sleep(0.02)
    async with admin.dead(queue) as letters:
        return [letter.envelope.body async for letter in letters]


async def test_depths_count_what_waits_by_level(harness: Harness) -> None:
    """An operator scales by this number."""
    broker, admin, queue = harness.open(), harness.admin(), harness.queue()
    for level in (Priority.NORMAL, Priority.NORMAL, Priority.URGENT):
        await broker.publish(queue, timed(make_envelope(queue, priority=level), soon()))
    await broker.publish(queue, timed(make_envelope(queue), soon(), delay_s=60))

    row = await depth(admin, queue)

    assert (row.queue, row.exists, row.ready, row.dead) == (queue.name, True, 3, 0)
    together = await admin.delayed()
    assert row.delayed == 1 if together is None else row.delayed is None and together >= 1
    counted = {name: count for name, count in row.levels.items() if count}
    assert counted in ({"normal": 2, "urgent": 1}, {"all": 3})
    if harness.features().window_per_level:
        assert counted == {"normal": 2, "urgent": 1}


async def test_depths_count_what_workers_hold_and_who_they_are(harness: Harness) -> None:
    """A queue that stands still because its workers hold everything looks empty otherwise."""
    broker, admin, queue = harness.open(), harness.admin(), harness.queue()
    await broker.publish(queue, timed(make_envelope(queue), soon()))
    _, sink = await consume(broker, queue)
    await sink.next()

    row = await depth(admin, queue)

    assert row.ready == 0
    assert row.unsettled in {1, None}
    assert row.consumers in {1, None}


async def test_depths_of_a_queue_that_is_not_there_say_so(harness: Harness) -> None:
    """A misspelt name must not look like an empty queue."""
    broker, admin, there = harness.open(), harness.admin(), harness.queue()
    await broker.publish(there, timed(make_envelope(there), soon()))
    missing = harness.queue()

    rows = await admin.depths([there, missing, there])

    assert [(row.queue, row.exists) for row in rows] == [(there.name, True), (missing.name, False), (there.name, True)]
    assert (rows[1].ready, rows[1].dead) == (0, 0)


async def test_purge_deletes_what_waits_and_nothing_else(harness: Harness) -> None:
    """Purging a queue must not touch what runs, what is delayed, or what a person still has to look at."""
    broker, admin, queue = harness.open(), harness.admin(), harness.queue()
    await bury(broker, queue, b"dead")
    consumption, sink = await consume(broker, queue, prefetch=1)
    await broker.publish(queue, timed(make_envelope(queue, b"held"), soon()))
    held = await sink.next()
    other = harness.queue()
    await broker.publish(other, timed(make_envelope(other), soon()))
    for number in range(3):
        await broker.publish(queue, timed(make_envelope(queue, b"%d" % number), soon()))
    # what is declared and connected now takes no time later, when the delayed job mustn't fall due
    await broker.publish(other, timed(make_envelope(other), soon(), delay_s=60))
    await depth(admin, queue)
    started = time.monotonic()
    await broker.publish(queue, timed(make_envelope(queue, b"delayed"), soon(), delay_s=2))

    assert await admin.purge(queue) == 3
    assert time.monotonic() - started < 2, "too slow a machine: the delayed job is due already"

    assert held.live
    held.done()
    assert (await sink.next()).envelope.body == b"delayed"
    await consumption.close()
    assert await dead_bodies(admin, queue, 1) == [b"dead"]
    assert (await depth(admin, other)).ready == 1


async def test_purge_empties_every_level(harness: Harness) -> None:
    """Siblings of one queue are one queue to its operator."""
    broker, admin, queue = harness.open(), harness.admin(), harness.queue()
    for level in Priority:
        await broker.publish(queue, timed(make_envelope(queue, priority=level), soon()))

    assert await admin.purge(queue) == 4
    assert (await depth(admin, queue)).ready == 0


async def test_a_job_that_was_set_aside_after_crashes_is_counted_and_purged(harness: Harness) -> None:
    """It would run after the purge, and kill one more worker; a queue that holds only such jobs would look empty."""
    broker, admin, queue = harness.open(), harness.admin(), harness.queue()
    await broker.publish(queue, timed(make_envelope(queue), soon()))
    consumption, sink = await consume(broker, queue)
    delivery = await sink.next()
    await consumption.stop_taking()
    assert await delivery.again(timed(msgspec.structs.replace(delivery.envelope, crashes=2, passes=1), soon()))
    await consumption.close()

    row = await depth(admin, queue)
    assert (row.ready, sum(row.levels.values())) == (1, 1)
    assert await admin.purge(queue) == 1
    assert (await depth(admin, queue)).ready == 0


async def test_dead_letters_come_oldest_first_and_stay(harness: Harness) -> None:
    """Looking must change nothing: not the order, not the count."""
    broker, admin, queue = harness.open(), harness.admin(), harness.queue()
    sent = [b"%d" % number for number in range(6)]
    await bury(broker, queue, *sent)

    assert await dead_bodies(admin, queue, 6) == sent
    assert await dead_bodies(harness.admin(), queue, 6) == sent
    assert await dead_bodies(admin, queue, 6) == sent


async def test_dead_letters_can_be_left_half_read(harness: Harness) -> None:
    """`--limit 2` on a long queue reads two, and neither loses nor reorders the rest."""
    broker, admin, queue = harness.open(), harness.admin(), harness.queue()
    sent = [b"%d" % number for number in range(6)]
    await bury(broker, queue, *sent)

    async with admin.dead(queue) as letters:
        some: list[bytes] = []
        async for letter in letters:
            some.append(letter.envelope.body)
            if len(some) == 2:
                break

    assert some == sent[:2]
    assert await dead_bodies(admin, queue, 6) == sent


async def test_dead_letters_of_a_queue_that_has_none(harness: Harness) -> None:
    """No letters is an empty list, not an error: also before the first burial ever."""
    broker, admin, queue = harness.open(), harness.admin(), harness.queue()
    await broker.publish(queue, timed(make_envelope(queue), soon()))

    assert await dead_bodies(admin, queue, 0) == []


async def test_a_replayed_letter_goes_to_its_origin_at_its_own_level_and_is_gone(harness: Harness) -> None:
    """A replay to the wrong level or of the old count is buried again at once; one that stays is replayed twice."""
    broker, admin, queue = harness.open(), harness.admin(), harness.queue()
    await bury(broker, queue, b"1", priority=Priority.URGENT)

    async with admin.dead(queue) as letters:
        [letter] = [letter async for letter in letters]
        replayed = msgspec.structs.replace(
            letter.envelope, attempt=1, passes=5, origin=None, cause="retry", deadline=soon()
        )
        await letters.replay(letter, replayed)
    _, sink = await consume(broker, queue)

    assert (await sink.next()).envelope == received(replayed)
    assert replayed.priority is Priority.URGENT
    assert await dead_bodies(admin, queue, 0) == []


async def test_many_letters_are_dropped_at_once_and_none_comes_back(harness: Harness) -> None:
    """Whoever dropped a thousand letters and saw no error doesn't look again."""
    broker, admin, queue = harness.open(), harness.admin(), harness.queue()
    await bury(broker, queue, *(b"%d" % number for number in range(200)))

    async with admin.dead(queue) as letters:
        found = [letter async for letter in letters]
        for letter in found:
            await letters.drop(letter)

    assert len(found) == 200
    async with admin.dead(queue) as letters:
        assert [letter.envelope.body async for letter in letters] == []


async def test_many_letters_are_replayed_at_once_and_each_arrives_once(harness: Harness) -> None:
    """One by one, 20 000 letters would take minutes; and what is replayed twice runs twice."""
    broker, admin, queue = harness.open(), harness.admin(), harness.queue()
    sent = [b"%d" % number for number in range(50)]
    await bury(broker, queue, *sent)

    async with admin.dead(queue) as letters:
        found = [letter async for letter in letters]
        assert [letter.job_id for letter in found] == [letter.envelope.job_id for letter in found]
        envelopes = [
            msgspec.structs.replace(letter.envelope, attempt=1, origin=None, cause=None, deadline=soon())
            for letter in found
        ]
        await asyncio.gather(*map(letters.replay, found, envelopes))
    _, sink = await consume(broker, queue, prefetch=100)

    assert sorted([(await sink.next()).envelope.body for _ in sent], key=int) == sent
    row = await depth(admin, queue)
    assert (row.ready, row.dead) == (0, 0)


async def test_a_dropped_letter_is_gone_and_the_others_stay_in_order(harness: Harness) -> None:
    """What a person throws away must be that letter and no other."""
    broker, admin, queue = harness.open(), harness.admin(), harness.queue()
    await bury(broker, queue, b"1", b"2", b"3", b"4")

    async with admin.dead(queue) as letters:
        found: list[DeadLetter] = [letter async for letter in letters]
        await letters.drop(found[1])
        await letters.replay(found[2], msgspec.structs.replace(found[2].envelope, attempt=1, origin=None))

    assert await dead_bodies(admin, queue, 2) == [b"1", b"4"]
    _, sink = await consume(broker, queue)
    assert (await sink.next(PATIENCE_S)).envelope.body == b"3"


async def test_what_one_has_read_nobody_else_sees(harness: Harness) -> None:
    """Two operators who replay at once must not replay a letter twice."""
    broker, queue = harness.open(), harness.queue()
    await bury(broker, queue, b"1", b"2")

    async with harness.admin().dead(queue) as letters:
        mine = [letter.envelope.body async for letter in letters]
        async with harness.admin().dead(queue) as other:
            others = [letter.envelope.body async for letter in other]

    assert (mine, others) == ([b"1", b"2"], [])
    assert await dead_bodies(harness.admin(), queue, 2) == [b"1", b"2"]


async def test_a_job_replayed_and_buried_again_is_not_read_twice_in_one_go(harness: Harness) -> None:
    """`dead replay` of a queue whose jobs still fail would otherwise never end."""
    broker, admin, queue = harness.open(), harness.admin(), harness.queue()
    await bury(broker, queue, b"1", b"2")
    consumption, sink = await consume(broker, queue)

    read: list[bytes] = []
    async with admin.dead(queue) as letters:
        async for letter in letters:
            read.append(letter.envelope.body)
            assert len(read) <= 2
            await letters.replay(letter, msgspec.structs.replace(letter.envelope, attempt=1, origin=None))
            delivery = await sink.next()
            await delivery.bury(timed(msgspec.structs.replace(delivery.envelope, origin=queue.name), soon()))
    await consumption.close()

    assert read == [b"1", b"2"]
    assert await dead_bodies(admin, queue, 2) == [b"1", b"2"]


async def test_a_letter_whose_reader_is_closed_is_not_replayed(harness: Harness) -> None:
    """Published before it is known that the letter can't be taken out, the job would run, stay a dead letter, and be replayed again."""
    broker, admin, queue = harness.open(), harness.admin(), harness.queue()
    await bury(broker, queue, b"1")
    async with admin.dead(queue) as letters:
        [letter] = [letter async for letter in letters]

    with pytest.raises(LeveretError):
        await letters.replay(letter, letter.envelope)

    row = await depth(admin, queue)
    assert (row.ready, row.dead) == (0, 1)
