"""What holds on Redis alone: foreign entries, places in a list, lost answers, rights, keys of somebody else, and what confirmed means."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec
import pytest
import pytest_asyncio

from leveret.broker import Broker
from leveret.brokers.redis import confirming, open_admin, open_broker, store
from leveret.errors import BrokerUnavailable, ConfigurationError, PublishTimeout
from leveret.job import Priority, Queue
from leveret.runtime import Runtime
from tests.conftest import StartRedis
from tests.contract.harness import PATIENCE_S, consume, depth, make_envelope, soon, timed
from tests.proxy import FaultProxy
from tests.redis.node import Cluster, Server, ask

RUNTIME = Runtime(app="tests")
Opened = Callable[..., Broker]


@pytest.fixture
def queue() -> Queue:
    """A queue of the test's own."""
    return Queue(f"t-{uuid.uuid4().hex[:12]}")


@pytest_asyncio.fixture
async def opened(redis: Server) -> AsyncGenerator[Opened]:
    """Open brokers on the session's server, or on another URL; closed at the end."""
    brokers: list[Broker] = []

    def make(url: str = redis.url) -> Broker:
        brokers.append(open_broker(url, RUNTIME))
        return brokers[-1]

    yield make
    for broker in brokers:
        await broker.close()


async def publish(broker: Broker, queue: Queue, *bodies: bytes, **fields: Any) -> None:
    for body in bodies:
        await broker.publish(queue, timed(make_envelope(queue, body, **fields), soon()))


async def publish_many(broker: Broker, queue: Queue, count: int) -> None:
    """Publish jobs with the numbers from 0 on as their bodies."""
    for number in range(count):
        envelope = timed(make_envelope(queue, b"%d" % number), soon())
        while (posted := broker.post(queue, envelope)) is None:
            await asyncio.sleep(0)
        if number % 500 == 499 or number == count - 1:
            await posted.wait()


def key(queue: Queue, name: str) -> str:
    return f"lv:{{{queue.name}}}:{name}"


async def keys_of(redis: Server, queue: Queue) -> set[str]:
    """The names of all keys of a queue."""
    found = cast("list[str]", await redis.command("KEYS", key(queue, "*")))
    return {name.rpartition(":")[2] if "held" not in name else "held" for name in found}


async def test_a_foreign_producer_pushes_a_body_alone(redis: Server, opened: Opened, queue: Queue) -> None:
    """A shell script has redis-cli and no more; its job has its place like any other, and an id."""
    await redis.command("RPUSH", key(queue, "normal"), b'{"n": 1}', b'{"n": 2}')
    broker = opened()
    await publish(broker, queue, b"last")

    _, sink = await consume(broker, queue)
    deliveries = await sink.take(3)

    assert [delivery.envelope.body for delivery in deliveries] == [b'{"n": 1}', b'{"n": 2}', b"last"]
    assert len({delivery.envelope.job_id for delivery in deliveries} - {""}) == 3
    assert [delivery.problem for delivery in deliveries] == [None] * 3


async def test_an_entry_that_cannot_be_read_has_a_problem_and_the_others_run(
    redis: Server, opened: Opened, queue: Queue
) -> None:
    """One entry that no script of ours wrote must not stop all that are claimed with it."""
    broker = opened()
    await publish(broker, queue, b"1")
    number = (77).to_bytes(8, "big")
    await redis.command("RPUSH", key(queue, "normal"), b"\x9e\xcf" + number + b"\x01\x00\x03\xa2\xff\xff")
    await publish(broker, queue, b"2")

    _, sink = await consume(broker, queue)
    first, odd, last = await sink.take(3)

    assert (first.envelope.body, first.problem, last.envelope.body, last.problem) == (b"1", None, b"2", None)
    assert odd.problem is not None
    assert "can't be read" in odd.problem
    await odd.bury(timed(msgspec.structs.replace(odd.envelope, origin=queue.name), soon()))
    assert (await depth_of(redis, queue)).dead == 1


async def test_a_foreign_entry_with_an_unknown_level_has_its_place(redis: Server, opened: Opened, queue: Queue) -> None:
    """By its level it would get to a key that is no list: lost, with all that go back with it."""
    await publish(opened(), queue, b"1")
    entry = b"\x9e\xcf" + (77).to_bytes(8, "big") + b"\x01\x00\x05" + b"\xa1x" * 10
    await redis.command("RPUSH", key(queue, "normal"), entry)
    await publish(opened(), queue, b"2")
    consumption, sink = await consume(opened(), queue)
    await sink.take(3)

    await consumption.close()

    assert (await depth_of(redis, queue)).ready == 3


async def test_a_foreign_delayed_entry_costs_no_other_its_life(redis: Server, opened: Opened, queue: Queue) -> None:
    """A script that fails in its middle has taken out all the others that are due."""
    broker = opened()
    await broker.publish(queue, timed(make_envelope(queue, b"ours"), soon(), delay_s=0.01))
    await redis.command("ZADD", key(queue, "delayed"), 1, b"theirs")

    _, sink = await consume(broker, queue)

    assert {delivery.envelope.body for delivery in await sink.take(2)} == {b"ours", b"theirs"}


async def test_foreign_dead_letters_are_listed_and_dropped_like_ours(
    redis: Server, opened: Opened, queue: Queue
) -> None:
    """One member that is no entry would hide every letter behind an error, or take another's place."""
    broker = opened()
    await publish(broker, queue, b"ours")
    _, sink = await consume(broker, queue)
    ours = await sink.next()
    await ours.bury(timed(ours.envelope, soon()))
    await redis.command("ZADD", key(queue, "dead"), 1, b"a", 1, b"b")
    admin = open_admin(redis.url, RUNTIME)

    async with admin.dead(queue) as letters:
        found = [letter async for letter in letters]
        for letter in found:
            await letters.drop(letter)

    assert {letter.envelope.body for letter in found} == {b"a", b"b", b"ours"}
    assert (await depth_of(redis, queue)).dead == 0
    await admin.close()


async def test_a_counter_that_was_deleted_gives_no_number_twice(redis: Server, opened: Opened, queue: Queue) -> None:
    """A worker's hash has one place for a number, so one of two jobs would be lost with their worker."""
    broker = opened()
    await publish(broker, queue, b"1", b"2", b"3")
    await redis.command("DEL", key(queue, "seq"))
    await publish(broker, queue, b"4", b"5", b"6")
    consumption, sink = await consume(opened(), queue)
    await sink.take(6)

    await consumption.close()
    _, sink = await consume(broker, queue)

    assert [delivery.envelope.body for delivery in await sink.take(6)] == [b"%d" % number for number in range(1, 7)]


async def test_large_jobs_come_in_answers_that_a_slow_link_can_pass(
    redis: Server, opened: Opened, queue: Queue
) -> None:
    """An answer that takes longer than a turn may is given up, and asked for again: no job would ever run."""
    bodies = [b"%d" % number + b"x" * (1 << 20) for number in range(10)]
    await publish(opened(), queue, b"small", *bodies)
    parts = urlsplit(redis.url)
    async with FaultProxy(parts.port or 6379, host=parts.hostname or "") as link:
        broker = opened(link.url_of(redis.url))
        link.freeze_after("down", 5 << 20)
        _, sink = await consume(broker, queue, prefetch=20)

        first = await sink.take(4)
        async with asyncio.timeout(PATIENCE_S):
            while link.passed["down"] < 5 << 20:
                await asyncio.sleep(0.01)
        link.thaw()

        assert [delivery.envelope.body for delivery in [*first, *(await sink.take(7))]] == [b"small", *bodies]
        await broker.close()


async def test_large_letters_are_read_some_at_a_time(redis: Server, opened: Opened, queue: Queue) -> None:
    """A hundred letters of 15 MiB in one answer are more than a server or a terminal has memory for."""
    broker = opened()
    bodies = [b"%d" % number + b"x" * (1 << 20) for number in range(6)]
    await publish(broker, queue, *bodies)
    _, sink = await consume(broker, queue)
    for delivery in await sink.take(6):
        await delivery.bury(timed(delivery.envelope, soon()))
    admin = open_admin(redis.url, RUNTIME)

    async with admin.dead(queue) as letters:
        found = [letter.envelope.body async for letter in letters]

    await admin.close()
    assert found == bodies


async def depth_of(redis: Server, queue: Queue) -> Any:
    admin = open_admin(redis.url, RUNTIME)
    try:
        return await depth(admin, queue)
    finally:
        await admin.close()


async def test_jobs_of_several_workers_that_are_given_back_have_their_places_again(
    opened: Opened, queue: Queue
) -> None:
    """Put before those that were put back by another worker, the newest would run first."""
    broker = opened()
    await publish(broker, queue, *(b"%d" % number for number in range(9)))
    taken, holders = list[Any](), list[Any]()
    for _ in range(3):
        consumption, sink = await consume(opened(), queue, prefetch=3)
        taken.append(await sink.take(3))
        holders.append(consumption)

    await holders[1].stop_taking()
    for delivery in taken[1]:
        delivery.give_back()
    for number in (0, 2, 1):
        await holders[number].close()
    _, sink = await consume(broker, queue)
    again = await sink.take(9)

    assert [delivery.envelope.body for delivery in again] == [b"%d" % number for number in range(9)]
    redelivered = [int(delivery.envelope.body) for delivery in again if delivery.redelivered]
    assert redelivered == [0, 1, 2, 6, 7, 8], "what was given back wasn't delivered"


async def test_thousands_of_jobs_are_settled_and_given_back_at_once(opened: Opened, queue: Queue) -> None:
    """Lua unpacks some 7 000 values: a worker with more in its hands than that would fail for ever."""
    broker, count = opened(), 9000
    await publish_many(broker, queue, count)
    consumption, sink = await consume(broker, queue, prefetch=count)
    deliveries = await sink.take(count)

    await consumption.stop_taking()
    for delivery in deliveries[::2]:
        delivery.done()
    for delivery in deliveries[1::2]:
        delivery.give_back()
    await consumption.close()
    other, sink = await consume(broker, queue, prefetch=count)
    again = await sink.take(count // 2)
    assert [delivery.envelope.body for delivery in again] == [b"%d" % number for number in range(1, count, 2)]
    await other.close()

    _, sink = await consume(broker, queue, prefetch=count)
    released = await sink.take(count // 2)
    assert [delivery.envelope.body for delivery in released] == [delivery.envelope.body for delivery in again]
    assert all(delivery.redelivered for delivery in released)


@pytest.mark.fault
async def test_a_job_that_is_due_at_a_worker_with_full_hands_stops_nothing(opened: Opened) -> None:
    """A driver that looks for the job without a pause takes the loop from the handlers until its next beat, seconds later."""
    queue = Queue(f"t-{uuid.uuid4().hex[:12]}", priorities=False)
    broker = opened()
    _, sink = await consume(broker, queue, prefetch=1)
    await publish(broker, queue, b"held")
    held = await sink.next()
    await broker.publish(queue, timed(make_envelope(queue, b"due"), soon(), delay_s=0.2))
    longest_s, last = 0.0, time.monotonic()
    ends = last + 2.0

    while last < ends:
        await asyncio.sleep(0.01)
        longest_s, last = max(longest_s, time.monotonic() - last), time.monotonic()
    held.done()

    assert (await sink.next()).envelope.body == b"due"
    assert longest_s < 3.0


async def test_nothing_is_kept_of_a_finished_job(redis: Server, opened: Opened, queue: Queue) -> None:
    """A server that fills up with finished work stops to take new work."""
    broker = opened()
    consumption, sink = await consume(broker, queue)
    for level in Priority:
        await publish(broker, queue, b"x", priority=level)
        (await sink.next()).done()
    await broker.publish(queue, timed(make_envelope(queue), soon(), delay_s=0.05))
    (await sink.next()).done()
    await consumption.close()
    await broker.close()

    assert await keys_of(redis, queue) <= {"seq", "server", "idle"}


async def test_an_answer_that_is_lost_is_a_publish_that_may_have_happened(
    redis: Server, opened: Opened, queue: Queue
) -> None:
    """Sent again by itself, the job would run twice; told as not published, it would be lost to its publisher."""
    parts = urlsplit(redis.url)
    async with FaultProxy(parts.port or 6379, host=parts.hostname or "") as link:
        broker = opened(link.url_of(redis.url))
        await publish(broker, queue, b"before")
        link.freeze("down")
        task = asyncio.create_task(publish(broker, queue, b"lost"))
        async with asyncio.timeout(PATIENCE_S):
            while (await depth_of(redis, queue)).ready < 2:
                await asyncio.sleep(0.01)
        link.reset()
        link.thaw()

        with pytest.raises(PublishTimeout) as raised:
            await task

        assert raised.value.maybe_published
        await publish(broker, queue, b"after")
        assert (await depth_of(redis, queue)).ready == 3
        await broker.close()


@pytest.mark.fault
async def test_a_turn_that_arrives_after_its_worker_gave_it_up_does_nothing(
    redis: Server, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel sends it again when a link is back. It would claim a job that nobody knows of: held for as long as the worker lives."""
    monkeypatch.setattr(store, "TURN_S", 1.0)
    queue = Queue(f"t-{uuid.uuid4().hex[:12]}", priorities=False)
    parts = urlsplit(redis.url)
    async with FaultProxy(parts.port or 6379, host=parts.hostname or "") as link:
        broker, direct = opened(link.url_of(redis.url)), opened()
        _, sink = await consume(broker, queue, prefetch=1)
        late = link.strand()
        await publish(direct, queue, b"1")
        held = await sink.next()
        await publish(direct, queue, b"2")
        before, calls = link.passed["up"], await script_calls(redis)
        late.set()
        async with asyncio.timeout(PATIENCE_S):
            while link.passed["up"] == before or await script_calls(redis) == calls:
                await asyncio.sleep(0.01)
        held.done()

        assert (await sink.next()).envelope.body == b"2"
        await broker.close()


async def script_calls(redis: Server) -> int:
    found = await redis.info("commandstats")
    return int(found["cmdstat_evalsha"]["calls"])


async def test_a_key_of_somebody_else_is_one_line(redis: Server, opened: Opened, queue: Queue) -> None:
    """Found in the middle of a script, it would cost the jobs that the script had taken out already."""
    await redis.command("SET", key(queue, "low"), "theirs")

    with pytest.raises(BrokerUnavailable, match="is a string, not a list; choose another prefix") as raised:
        await publish(opened(), queue, b"x")

    assert isinstance(raised.value.__cause__, ConfigurationError)
    assert await redis.command("GET", key(queue, "low")) == "theirs"


async def test_a_right_that_is_missing_is_found_before_a_job_is_touched(
    redis: Server, opened: Opened, queue: Queue
) -> None:
    """A script has no rollback: one that may take a job out of its list, and not note who holds it, would lose the job."""
    await publish(opened(), queue, b"x")

    async with redis.user("~*", "&*", "+@all", "-hset") as url:
        with pytest.raises(ConfigurationError, match=r"can't run this command|ACL failure"):
            await consume(opened(url), queue)

    assert (await depth_of(redis, queue)).ready == 1


async def test_numbers_go_on_far_behind_the_last_on_another_server(redis: Server, opened: Opened, queue: Queue) -> None:
    """A replica that is promoted may lack the newest jobs. Their numbers given again, a worker would settle another's job."""
    await publish(opened(), queue, b"1")
    await publish(opened(), queue, b"2")
    before = int(await redis.command("GET", key(queue, "seq")))
    await publish(opened(), queue, b"3")
    assert int(await redis.command("GET", key(queue, "seq"))) == before + 1, "the server is the same"

    await redis.command("SET", key(queue, "server"), "the one before")
    await publish(opened(), queue, b"4")

    assert int(await redis.command("GET", key(queue, "seq"))) > before + 1_000_000
    _, sink = await consume(opened(), queue)
    assert [delivery.envelope.body for delivery in await sink.take(4)] == [b"1", b"2", b"3", b"4"]


async def test_an_outage_is_said_once_by_all_queues_of_a_broker(
    redis: Server, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    """Twenty queues that say the same bury the line that says why."""
    queues = [Queue(f"t-{uuid.uuid4().hex[:12]}") for _ in range(4)]
    caplog.set_level(logging.INFO)
    parts = urlsplit(redis.url)
    async with FaultProxy(parts.port or 6379, host=parts.hostname or "") as link:
        broker = opened(link.url_of(redis.url))
        await consume(broker, *queues)
        link.refuse = True
        link.reset()
        async with asyncio.timeout(PATIENCE_S):
            while not said(caplog, "can't be written"):
                await asyncio.sleep(0.02)
        link.refuse = False
        async with asyncio.timeout(PATIENCE_S):
            while not said(caplog, "can be written again"):
                await asyncio.sleep(0.02)
        await broker.close()

    assert [len(said(caplog, words)) for words in ("can't be written", "can be written again")] == [1, 1]


async def until_ready(broker: Broker) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while broker.publishing.name != "ready":
            await asyncio.sleep(0.02)


def said(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


async def test_what_the_server_may_lose_is_said(
    redis_node: StartRedis, opened: Opened, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    """Durable is what the server does, not what the program hopes."""
    node = await redis_node(conf={"appendonly": "no"})
    caplog.set_level(logging.INFO)
    broker = opened(node.url)
    assert not broker.features().durable
    await publish(broker, queue, b"x")
    await publish(broker, Queue("other"), b"x")
    assert len(said(caplog, "no append-only file")) == 1
    admin = open_admin(node.url, RUNTIME)
    assert any("no append-only file" in note for note in await admin.notes())
    await admin.close()

    with pytest.raises(BrokerUnavailable, match="confirm=fsync can't be kept"):
        await publish(opened(f"{node.url}?confirm=fsync"), queue, b"x")
    await node.configure("appendonly", "yes")
    await node.configure("appendfsync", "always")
    synced = opened(f"{node.url}?confirm=fsync")
    assert synced.features().durable
    await publish(synced, queue, b"x")
    always = opened(node.url)
    await publish(always, queue, b"x")
    assert always.features().durable


async def test_the_notes_say_what_a_power_cut_loses_by_the_servers_settings_and_the_url(redis_node: StartRedis) -> None:
    """Who reads that a second is lost, and loses half a minute, or nothing, has settings that nobody would choose."""
    node = await redis_node()

    async def notes(query: str = "", url: str = node.url) -> str:
        admin = open_admin(f"{url}{query}", RUNTIME)
        try:
            return " ".join(await admin.notes())
        finally:
            await admin.close()

    assert "up to a second (appendfsync everysec)" in await notes()
    assert await notes("?confirm=replica") == (
        "the server has no replica now: with confirm=replica no job is confirmed until one has it"
    )
    async with node.user() as unread:
        assert "unless appendfsync is always" in await notes(url=unread)
    await node.configure("appendfsync", "no")
    assert "half a minute or more (appendfsync no)" in await notes()
    await node.configure("appendfsync", "always")
    assert await notes() == await notes("?confirm=fsync") == ""


async def test_a_publish_waits_for_a_replica_that_is_there(
    redis_node: StartRedis, opened: Opened, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    """confirm=replica that is confirmed without one promises what a fail-over breaks; and workers go on without it."""
    node = await redis_node()
    broker = opened(f"{node.url}?confirm=replica")
    with pytest.raises(PublishTimeout) as raised:
        await broker.publish(queue, timed(make_envelope(queue, b"1"), soon(1.5)))  # it connects first
    assert raised.value.maybe_published
    assert "no replica has confirmed it" in str(raised.value)
    assert len(said(caplog, "has no replica now")) == 1
    async with asyncio.timeout(PATIENCE_S):
        while broker.publishing.name != "blocked":
            await asyncio.sleep(0.02)
    assert "no replica" in broker.publishing.why

    _, sink = await consume(broker, queue)
    (await sink.next()).done()
    await node.replica()
    await publish(broker, queue, b"2")

    assert (await sink.next()).envelope.body == b"2"
    assert await ask(node.url, "LLEN", key(queue, "normal")) == 0
    await until_ready(broker)


@pytest.mark.fault
async def test_without_a_replica_retries_hold_up_jobs_for_some_seconds_and_the_log_says_why(
    redis_node: StartRedis, opened: Opened, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    """A queue whose jobs fail would stand still for ten seconds at each retry, and nothing would say why."""
    caplog.set_level(logging.INFO)
    node = await redis_node()
    direct, broker = opened(node.url), opened(f"{node.url}?confirm=replica")
    await publish(direct, queue, b"1", b"2")
    _, sink = await consume(broker, queue)
    first, second = await sink.take(2)
    with pytest.raises(PublishTimeout):
        await broker.publish(queue, timed(make_envelope(queue), soon(0.1)))

    with pytest.raises(PublishTimeout, match="no replica has confirmed it"):
        async with asyncio.timeout(0.8 * confirming.TURN_S):
            await first.again(timed(msgspec.structs.replace(first.envelope, attempt=2), soon(60)))
    async with asyncio.timeout(0.8 * confirming.TURN_S):
        for delivery in (second, *(await sink.take(2))):  # the publish and the retry
            delivery.done()
        while (await depth_of(node, queue)).unsettled:
            await asyncio.sleep(0.05)

    assert len(said(caplog, "confirms no jobs: the server has it, and no replica has confirmed it")) == 1
    await node.replica()
    await publish(broker, queue, b"3")
    await until_ready(broker)
    assert len(said(caplog, "confirms jobs again")) == 1


async def test_keys_that_somebody_deletes_are_said_to_be_deleted(
    redis: Server, opened: Opened, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    """After FLUSHALL the log would blame a worker that stood still; and jobs that come later must run."""
    broker = opened()
    await publish(broker, queue, b"1")
    _, sink = await consume(broker, queue)
    held = await sink.next()

    await redis.command("DEL", *(await redis.command("KEYS", key(queue, "*"))))
    await publish(broker, queue, b"2")

    assert (await sink.next()).envelope.body == b"2"
    assert (held.live, sink.losses) == (False, 1)
    assert len(said(caplog, "FLUSHALL")) == 1
    assert said(caplog, "sent no beat") == []


async def test_jobs_come_back_although_somebody_deleted_the_leases_alone(
    redis: Server, opened: Opened, queue: Queue
) -> None:
    """What a worker holds is found by its lease alone: its jobs would stay held for ever, and no count would show them."""
    broker = opened()
    await publish(broker, queue, b"held")
    _, sink = await consume(broker, queue)
    held = await sink.next()

    await redis.command("DEL", key(queue, "workers"))

    again = await sink.next()
    assert (again.envelope.body, again.redelivered, held.live) == (b"held", True, False)
    again.done()


async def test_dead_letters_come_back_although_somebody_deleted_the_leases_alone(
    redis: Server, opened: Opened, queue: Queue
) -> None:
    """A letter that is being read would be in no list of dead letters any more."""
    broker, admin = opened(), open_admin(redis.url, RUNTIME)
    await publish(broker, queue, b"1")
    _, sink = await consume(broker, queue)
    delivery = await sink.next()
    await delivery.bury(timed(delivery.envelope, soon()))
    async with admin.dead(queue) as letters:
        assert [letter.envelope.body async for letter in letters] == [b"1"]

        await redis.command("DEL", key(queue, "workers"))

    await admin.close()
    assert (await depth_of(redis, queue)).dead == 1


async def test_each_node_of_a_cluster_counts(redis_cluster: Cluster) -> None:
    """A full node, or one that syncs nothing, takes its share of the jobs: asked of another node, nothing is wrong."""
    nodes, broker = redis_cluster.primaries, open_broker(redis_cluster.url, RUNTIME)
    admin = open_admin(redis_cluster.url, RUNTIME)
    try:
        await nodes[1].configure("appendfsync", "always")
        await nodes[2].configure("appendfsync", "no")
        for node in nodes[:2]:
            queue = Queue("elsewhere")
            while await redis_cluster.owner(f"{{{queue.name}}}") is not node:
                queue = Queue(f"t-{uuid.uuid4().hex[:12]}")
            await publish(broker, queue, b"x")
            await admin.purge(queue)
        durable = broker.features().durable
        await nodes[2].configure("maxmemory", 1)
        notes = await admin.notes()
    finally:
        await asyncio.gather(broker.close(), admin.close())
        for node in nodes:
            await node.configure("appendfsync", "everysec")
            await node.configure("maxmemory", 0)

    assert not durable
    for number, what in ((0, "appendfsync everysec"), (2, "appendfsync no"), (2, "memory is nearly full")):
        assert [note.startswith(f"127.0.0.1:{nodes[number].port}: ") for note in notes if what in note] == [True], notes
    assert len(notes) == 3, "the second node has nothing to say"


async def test_a_full_server_says_so_and_takes_jobs_again(redis_node: StartRedis, opened: Opened, queue: Queue) -> None:
    """A service that is asked whether it is ready must know without a publish, also of the end."""
    node = await redis_node()
    broker = opened(node.url)
    await publish(broker, queue, b"held")
    _, sink = await consume(broker, queue)
    held = await sink.next()
    await node.configure("maxmemory", 1)

    with pytest.raises(BrokerUnavailable, match="OOM"):
        await publish(broker, queue, b"too much")
    assert broker.publishing.name == "blocked"
    await held.again(timed(msgspec.structs.replace(held.envelope, attempt=2), soon()))
    (await sink.next()).done()
    await node.configure("maxmemory", 0)
    await until_ready(broker)
    await publish(broker, queue, b"room")

    assert (await sink.next()).envelope.body == b"room"


@pytest.mark.parametrize("verb", ["done", "again", "claim"])
async def test_a_lost_answer_costs_no_lease_and_settles_once(
    redis: Server, opened: Opened, queue: Queue, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is restarted under load would otherwise run each job again that a worker has in its hands."""
    for name in ("FIRST_POLL_S", "POLL_S"):
        monkeypatch.setattr(store, name, 600.0)  # no turn is under way when the link freezes
    parts = urlsplit(redis.url)
    async with FaultProxy(parts.port or 6379, host=parts.hostname or "") as link:
        broker = opened(link.url_of(redis.url))
        await publish(broker, queue, b"1", b"2")
        consumption, sink = await consume(broker, queue)
        running, ended = await sink.take(2)

        link.freeze("down")
        task: asyncio.Task[Any] | None = None
        if verb == "done":
            ended.done()
        elif verb == "again":
            retried = msgspec.structs.replace(ended.envelope, attempt=2)
            task = asyncio.create_task(ended.again(timed(retried, soon())))
        else:
            task = asyncio.create_task(publish(broker, queue, b"3"))
        async with asyncio.timeout(PATIENCE_S):
            while (now := await depth_of(redis, queue)).unsettled != {"done": 1, "again": 2, "claim": 3}[verb]:
                await asyncio.sleep(0.01)
        link.reset()
        link.thaw()

        if verb == "again":
            assert task is not None
            assert await task, now
        elif task is not None:
            with pytest.raises(PublishTimeout):
                await task
        if verb != "done":
            again = await sink.next()
            assert (again.redelivered, again.envelope.attempt) == (True, 2 if verb == "again" else 1)
            again.done()
        assert running.live
        running.done()
        if verb == "claim":
            ended.done()
        await consumption.close()
        row = await depth_of(redis, queue)
        assert (row.ready, row.unsettled, sink.losses, sink.waiting) == (0, 0, 0, 0)
        await broker.close()


async def test_a_confirm_by_the_disk_waits_for_it_or_is_refused(redis: Server, opened: Opened, queue: Queue) -> None:
    """A job that is called safe on the disk, and isn't, is lost with the next power cut."""
    server = await redis.info("server")
    waits = "valkey_version" in server or server["redis_version"] >= "7.2"
    broker = opened(f"{redis.url}?confirm=fsync")
    assert broker.features().durable

    if waits:
        await publish(broker, queue, b"1")
        assert (await redis.info("commandstats"))["cmdstat_waitaof"]["calls"] >= 1
        _, sink = await consume(broker, queue)
        assert (await sink.next()).envelope.body == b"1"
    else:
        with pytest.raises(BrokerUnavailable, match=r"set appendfsync always, or take Redis 7.2 or Valkey"):
            await publish(broker, queue, b"1")
