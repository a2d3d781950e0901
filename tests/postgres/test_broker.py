"""What holds on PostgreSQL alone: foreign rows, notices that get lost, transactions that commit late, roles, and backends that end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
import pytest_asyncio

from leveret.broker import Broker
from leveret.brokers.postgresql import admin as admin_module
from leveret.brokers.postgresql import open_admin, open_broker, store
from leveret.brokers.postgresql.statements import Statements
from leveret.errors import BrokerUnavailable, ConfigurationError, PublishTimeout
from leveret.job import Priority, Queue
from leveret.runtime import Runtime
from tests.contract.harness import PATIENCE_S, consume, depth, make_envelope, ready, soon, soonest_s, timed
from tests.postgres.node import Postgres
from tests.proxy import FaultProxy

QUEUE = Queue("jobs")
RUNTIME = Runtime(app="tests")
Opened = Callable[..., Broker]


@pytest_asyncio.fixture
async def opened(postgres_url: str) -> AsyncGenerator[Opened]:
    """Open brokers on the test's database, or on another URL; closed at the end."""
    brokers: list[Broker] = []

    def make(url: str = postgres_url) -> Broker:
        brokers.append(open_broker(url, RUNTIME))
        return brokers[-1]

    yield make
    for broker in brokers:
        await broker.close()


async def publish(broker: Broker, *bodies: bytes, queue: Queue = QUEUE, **fields: Any) -> None:
    for body in bodies:
        await broker.publish(queue, timed(make_envelope(queue, body, **fields), soon()))


async def until_state(broker: Broker, name: str) -> None:
    """Wait until publishing is in this state."""
    async with asyncio.timeout(PATIENCE_S):
        while broker.publishing.name != name:
            await asyncio.sleep(0.01)


async def test_a_foreign_producer_publishes_with_one_function(
    opened: Opened, postgres: Postgres, postgres_url: str
) -> None:
    """A trigger, or a program in another language, has nothing of leveret but the schema."""
    call = "SELECT leveret.publish('jobs', 'invoice.send', '{\"order_id\": 7}', level => 'high', headers => '{\"x-tenant\": \"a\"}')"
    [[job_id]] = await postgres.query(call, url=postgres_url)
    await postgres.query("SELECT leveret.publish('jobs', 'thumb', '\\xff00'::bytea, delay_s => 0.1)", url=postgres_url)
    _, sink = await consume(opened(), QUEUE)

    first, second = await sink.take(2)

    assert (first.envelope.job_id, first.envelope.job, first.envelope.body) == (
        job_id,
        "invoice.send",
        b'{"order_id": 7}',
    )
    assert (first.envelope.priority, first.envelope.headers) == (Priority.HIGH, {"x-tenant": "a"})
    assert (second.envelope.job, second.envelope.body) == ("thumb", b"\xff\x00")


async def test_a_publish_that_is_cancelled_leaves_no_lock_to_its_session(postgres_url: str) -> None:
    """A lock that stays with a connection of a web service's pool would hang each worker of the queue, as long as the pool lives."""
    connection = await asyncpg.connect(postgres_url)
    cancelled, count = 0, 5000
    try:
        while not cancelled:  # a fast machine needs more queues
            wake = f"SELECT leveret.wake(ARRAY(SELECT 'q' || n FROM generate_series(1, {count}) n), 'new')"
            for limit_ms in range(1, 31):
                try:
                    await connection.execute(f"BEGIN; SET LOCAL statement_timeout = {limit_ms}; {wake}; COMMIT")
                except asyncpg.QueryCanceledError:
                    cancelled += 1
                    await connection.execute("ROLLBACK")
            count *= 4

        held = await connection.fetchval(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        )

        assert held == 0
    finally:
        await connection.close()


@pytest.mark.parametrize(
    ("call", "body", "problem"),
    [
        ("publish('jobs', 'a', NULL::text)", b"", None),
        ("publish('jobs', NULL, '{}')", b"{}", None),
        ("publish('jobs', 'a', '\\xc3'::bytea, level => 'soon')", b"\xc3", "its level '0' is unknown"),
        ("publish('jobs', 'a', repeat('x', 15 << 20))", b"x" * (15 << 20), None),
    ],
    ids=["no body", "no name", "no level", "15 MiB"],
)
async def test_what_makes_no_sense_arrives_byte_for_byte(
    opened: Opened, postgres: Postgres, postgres_url: str, call: str, body: bytes, problem: str | None
) -> None:
    """A worker can only bury what it gets: a row that it never claims, or can't read, would wait there for ever."""
    await postgres.query(f"SELECT leveret.{call}", url=postgres_url)
    broker = opened()
    consumption, sink = await consume(broker, QUEUE)
    delivery = await sink.next()

    assert delivery.envelope.body == body
    assert (delivery.problem or "").startswith(problem or "")
    await delivery.bury(timed(delivery.envelope, soon()))
    await consumption.close()
    row = await depth(open_admin(postgres_url, RUNTIME), QUEUE)
    assert (row.ready, row.unsettled, row.dead) == (0, 0, 1)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("my jobs", "a queue's name must have 1 to 150 characters"),
        ("jobs.high", "the queue name 'jobs.high' is reserved"),
        ("jobs.dead", "the queue name 'jobs.dead' is reserved"),
        ("lv.jobs", "the queue name 'lv.jobs' is reserved"),
    ],
)
async def test_a_name_that_no_queue_can_have_is_refused_at_its_producer(
    postgres: Postgres, postgres_url: str, name: str, why: str
) -> None:
    """No worker could ever consume it."""
    with pytest.raises(asyncpg.InvalidParameterValueError, match=why):
        await postgres.query("SELECT leveret.publish($1, 'a', '{}'::text)", name, url=postgres_url)


async def test_a_delayed_row_that_makes_no_sense_and_is_locked_stops_no_worker(
    opened: Opened, postgres_url: str
) -> None:
    """A row that somebody wrote by hand, and all workers would stand still for as long as he looks at it."""
    looker = await asyncpg.connect(postgres_url)
    try:
        await looker.execute(
            "INSERT INTO leveret.delayed (queue, level, due_ms, job_id, job, content_type, body, created_s)"
            " VALUES ('jobs', 3, -9223372036854775808, 'odd', 'j', 'application/json', '', 0)"
        )
        await looker.execute("BEGIN; SELECT FROM leveret.delayed FOR UPDATE")
        broker = opened()
        _, sink = await consume(broker, QUEUE)
        await publish(broker, b"1")

        assert (await sink.next()).envelope.body == b"1"
    finally:
        looker.terminate()


async def test_a_job_of_which_no_notice_told_starts_within_a_second(
    opened: Opened, postgres: Postgres, postgres_url: str
) -> None:
    """Poolers lose notices, and LISTEN's connection is cut: a job that waited for the next notice would wait for ever."""
    _, sink = await consume(opened(), QUEUE)

    async def took_s() -> float:
        await asyncio.sleep(1.5)  # the worker's polling is at its widest
        before = time.monotonic()
        await postgres.query("INSERT INTO leveret.jobs (queue, body) VALUES ('jobs', '1')", url=postgres_url)
        assert (await sink.next()).envelope.body == b"1"
        return time.monotonic() - before

    limit_s = 1.1 + 1.0  # a slow machine's second
    assert await soonest_s(took_s, limit_s) <= limit_s


async def test_a_publish_that_commits_late_is_not_passed_over(
    opened: Opened, postgres: Postgres, postgres_url: str
) -> None:
    """Reading behind the last number loses it, as home-made outboxes do: its number was given before those that are done."""
    broker = opened()
    _, sink = await consume(broker, QUEUE)
    late = await asyncpg.connect(postgres_url)

    async def took_s() -> float:
        transaction = late.transaction()
        await transaction.start()
        await late.execute("SELECT leveret.publish('jobs', 'a', 'late')")
        for number in range(20):
            await publish(broker, b"%d" % number)
            (await sink.next()).done()
            await asyncio.sleep(0.02)
        await transaction.commit()
        committed = time.monotonic()
        assert (await sink.next()).envelope.body == b"late"
        return time.monotonic() - committed

    limit_s = 1.1 + 1.0  # a slow machine's second
    assert await soonest_s(took_s, limit_s) <= limit_s
    await late.close()


async def test_a_lock_costs_no_lease(opened: Opened, postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's VACUUM FULL lets every job that runs meanwhile run once more, at another worker."""
    monkeypatch.setattr(store, "TURN_S", 6.0)
    for name in ("POLL_S", "LOOK_S"):  # a notice, and nothing else, leads to the next turn: it only claims
        monkeypatch.setattr(store, name, 600.0)
    holder = await asyncpg.connect(postgres_url)
    broker = opened()
    try:
        consumption, sink = await consume(broker, QUEUE)
        await publish(opened(), b"1")
        held = await sink.next()
        async with asyncio.timeout(PATIENCE_S):
            while not await holder.fetch("SELECT FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock'"):
                await asyncio.sleep(0.01)
        await holder.execute("BEGIN; LOCK leveret.claims IN ACCESS EXCLUSIVE MODE")
        await publish(opened(), b"2")
        async with asyncio.timeout(PATIENCE_S):
            while ready(consumption) and not sink.losses:
                await asyncio.sleep(0.01)
        await holder.execute("ROLLBACK")
        held.done()
        await sink.next()
    finally:
        await holder.close()

    assert (sink.losses, held.live) == (0, True)


async def test_two_consumptions_of_a_process_both_look_from_the_start(
    opened: Opened, postgres: Postgres, postgres_url: str
) -> None:
    """The second would never find what was committed late, or freed: nobody looks for it behind its cursor."""
    broker, queues = opened(), [Queue("one"), Queue("two")]
    sinks = [(await consume(broker, queue))[1] for queue in queues]
    late = await asyncpg.connect(postgres_url)
    transaction = late.transaction()
    await transaction.start()
    for queue in queues:
        await late.execute("SELECT leveret.publish($1, 'a', 'late'::text)", queue.name)
    for queue, sink in zip(queues, sinks, strict=True):
        for _ in range(5):
            await publish(broker, b"1", queue=queue)
            (await sink.next()).done()
            await asyncio.sleep(0.1)

    await transaction.commit()

    for sink in sinks:
        assert (await sink.next()).envelope.body == b"late"
    await late.close()


async def test_a_killed_backend_costs_no_delivery(opened: Opened, postgres: Postgres, postgres_url: str) -> None:
    """An administrator ends connections, and a fail-over all of them: what runs goes on, and nobody else may run it."""
    broker, other = opened(), opened()
    await publish(broker, *(b"%d" % number for number in range(5)))
    _, sink = await consume(broker, QUEUE)
    held = await sink.take(5)
    _, others = await consume(other, QUEUE)

    backends = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    # of a turn that is just committed nobody knows what it claimed, which costs the lease
    end = "SELECT state = 'idle' AND pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE pid = $1"
    for _ in range(3):
        async with asyncio.timeout(PATIENCE_S):
            for [pid] in await postgres.query(backends, url=postgres_url):
                while [row[0] for row in await postgres.query(end, pid, url=postgres_url)] == [False]:
                    await asyncio.sleep(0.01)
        await asyncio.sleep(1.0)  # as long as others need to see that a backend is gone

    assert all(delivery.live for delivery in held)
    assert (sink.losses, sink.waiting, others.waiting) == (0, 0, 0)
    for delivery in held:
        delivery.done()
    await broker.close()
    row = await depth(open_admin(postgres_url, RUNTIME), QUEUE)
    assert (row.ready, row.unsettled) == (0, 0)


async def test_a_claim_that_the_server_ended_costs_no_lease(
    opened: Opened, postgres: Postgres, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An administrator, or a restart, ends a worker's connection while it looks for jobs: all jobs that it runs would run twice."""
    monkeypatch.setattr(store, "LOOK_S", 600.0)  # the next turn claims, and does nothing else
    monkeypatch.setattr(store, "POLL_S", 600.0)
    broker = opened()
    await publish(broker, b"1")
    _, sink = await consume(broker, QUEUE)
    held = await sink.next()
    waits = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    holder = await asyncpg.connect(postgres_url)
    try:
        async with asyncio.timeout(PATIENCE_S):
            await holder.execute("BEGIN; LOCK TABLE leveret.claims")
            await postgres.query(f"SELECT pg_notify('{Statements('leveret').channel}', 'new')", url=postgres_url)
            while not (waiting := await postgres.query(waits, url=postgres_url)):
                await asyncio.sleep(0.01)
        await postgres.terminate(waiting[0]["pid"])
        await holder.execute("ROLLBACK")

        await publish(broker, b"2")
        assert (await sink.next()).envelope.body == b"2"
    finally:
        holder.terminate()
    assert (held.live, sink.losses) == (True, 0)


async def test_a_lost_connection_of_a_publisher_is_told_and_opened_again(opened: Opened, postgres_url: str) -> None:
    """A service that isn't ready gets no traffic: if only a publish could bring it back, it would never be ready again."""
    async with FaultProxy(urlsplit(postgres_url).port or 0) as link:
        broker = opened(link.url_of(postgres_url))
        await publish(broker, b"1")
        link.refuse = True
        link.reset()
        await until_state(broker, "connecting")
        assert broker.publishing.why

        link.refuse = False

        await until_state(broker, "ready")
        await broker.close()


async def test_a_lost_answer_of_a_commit_says_that_the_job_may_be_published(
    opened: Opened, postgres: Postgres, postgres_url: str
) -> None:
    """Neither yes nor no would be true, and only who knows that publishes again under the same id."""
    async with FaultProxy(urlsplit(postgres_url).port or 0) as link:
        broker = opened(link.url_of(postgres_url))
        sizes: list[int] = []
        for _ in range(3):
            await publish(broker, b"before")
            await asyncio.sleep(0.05)  # the link counts what it has passed on
            sizes.append(link.passed["down"])
        link.freeze_after("down", sizes[-1] - sizes[-2] - 10)  # half the answer of the commit is lost
        publishing = asyncio.create_task(publish(broker, b"1"))
        async with asyncio.timeout(PATIENCE_S):
            while not await postgres.query("SELECT FROM leveret.jobs WHERE body = '1'", url=postgres_url):
                await asyncio.sleep(0.01)

        link.reset()

        with pytest.raises(PublishTimeout, match="lost during the commit") as raised:
            await publishing
        assert raised.value.maybe_published
        link.thaw()
        await publish(broker, b"after")
        await broker.close()


async def test_jobs_that_are_published_together_keep_what_each_has(opened: Opened) -> None:
    """What all have in common is sent once: a job must not get another's level, name or headers by it."""
    alike = [make_envelope(QUEUE, b"1"), make_envelope(QUEUE, b"1")]
    various = [
        make_envelope(QUEUE, b"2", priority=Priority.HIGH, headers={"x-tenant": "a"}, app=None),
        make_envelope(QUEUE, b"3", job="thumb", content_type="application/msgpack", correlation_id="line"),
        make_envelope(QUEUE, b"4", reply_to="there", content_encoding="utf-8", created_s=1),
    ]
    broker = opened()
    await publish(broker, b"connected")

    for envelopes in (alike, various):
        posts = [broker.post(QUEUE, timed(envelope, soon())) for envelope in envelopes]
        for each in posts:
            assert each is not None
            await each.wait()
            assert each.error() is None

    _, sink = await consume(broker, QUEUE)
    came = {delivery.envelope.job_id: delivery.envelope for delivery in await sink.take(6)}
    for sent in alike + various:
        assert timed(came[sent.job_id], 0.0) == timed(sent, 0.0)


async def test_a_publish_that_the_server_ended_is_done_again(
    opened: Opened, postgres: Postgres, postgres_url: str
) -> None:
    """A server that ends its connections, as before a restart, says so before the commit: a publisher need not ask itself whether the job is there."""
    broker = opened()
    await publish(broker, b"before")
    holder = await asyncpg.connect(postgres_url)
    try:
        await holder.execute("BEGIN; LOCK TABLE leveret.jobs IN SHARE MODE")
        publishing = asyncio.create_task(publish(broker, b"1"))
        waits = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        async with asyncio.timeout(PATIENCE_S):
            while not (waiting := await postgres.query(waits, url=postgres_url)):
                await asyncio.sleep(0.01)

        await postgres.terminate(waiting[0]["pid"])
        await holder.execute("ROLLBACK")

        await publishing
    finally:
        holder.terminate()
    [[found]] = await postgres.query("SELECT count(*) FROM leveret.jobs WHERE body = '1'", url=postgres_url)
    assert found == 1


async def test_a_publish_is_durable_whatever_the_database_says(
    opened: Opened, postgres: Postgres, postgres_url: str
) -> None:
    """Services set `synchronous_commit = off` for their own speed: a confirmed job would be lost in a crash of the server."""
    name = urlsplit(postgres_url).path[1:]
    theirs = {"synchronous_commit": "off", "default_transaction_isolation": "serializable", "lock_timeout": "0"}
    for setting, value in theirs.items():
        await postgres.query(f"ALTER DATABASE {name} SET {setting} = '{value}'")
    await postgres.query("CREATE TABLE seen (commit text, isolation text, locks text)", url=postgres_url)
    note = """CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO public.seen SELECT current_setting('synchronous_commit'), current_setting('transaction_isolation'), current_setting('lock_timeout');
        RETURN NULL;
    END $$"""
    await postgres.query(note, url=postgres_url)
    await postgres.query("CREATE TRIGGER note AFTER INSERT ON leveret.jobs EXECUTE FUNCTION note()", url=postgres_url)
    broker = opened()

    await publish(broker, b"alone")
    _, sink = await consume(broker, QUEUE)
    await publish(broker, b"beside a consumer")
    await sink.take(2)

    rows = await postgres.query("SELECT DISTINCT * FROM seen", url=postgres_url)
    assert [tuple(row) for row in rows] == [("on", "read committed", "2s")]


async def test_a_server_that_is_away_is_told_and_waited_for(
    opened: Opened, postgres: Postgres, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that starts before its database, or outlives a restart of it, needs nobody's help."""
    caplog.set_level(logging.INFO, "leveret.postgresql")
    async with FaultProxy(urlsplit(postgres_url).port or 0) as link:
        link.refuse = True
        broker = opened(link.url_of(postgres_url))
        assert broker.publishing.name == "connecting"
        consumption, sink = await consume(broker, QUEUE)
        with pytest.raises((BrokerUnavailable, PublishTimeout)):
            await broker.publish(QUEUE, timed(make_envelope(QUEUE), soon(0.5)))
        [state] = consumption.queues
        assert (state.name, broker.publishing.name) == ("connecting", "connecting")
        assert state.why

        link.refuse = False
        await publish(broker, b"1")

        assert (await sink.next()).envelope.body == b"1"
        assert (ready(consumption), broker.publishing.name) == (True, "ready")
        await broker.close()


async def test_a_worker_without_rights_fails_with_one_line(postgres: Postgres, postgres_url: str) -> None:
    """Waiting doesn't help, and a worker that waits nevertheless looks healthy."""
    async with postgres.role(postgres_url) as role:
        broker = open_broker(role, RUNTIME)
        try:
            with pytest.raises(ConfigurationError) as raised:
                await consume(broker, QUEUE)
        finally:
            await broker.close()

    said = str(raised.value)
    assert "\n" not in said
    assert str(urlsplit(role).password) not in said


async def test_who_waits_is_told_and_who_has_enough_is_not(
    postgres: Postgres, postgres_url: str, opened: Opened
) -> None:
    """A commit that notifies takes a lock of the whole cluster: with a notice for each, publishers get in each other's way."""
    queue = Queue("plain", priorities=False)
    heard: asyncio.Queue[str] = asyncio.Queue()
    [[channel]] = await postgres.query("SELECT 'leveret_' || md5('\"leveret\"')")
    listener = await asyncpg.connect(postgres_url)

    def hear(_connection: object, _pid: int, _channel: str, payload: object) -> None:
        heard.put_nowait(str(payload))

    await listener.add_listener(channel, hear)

    async def hears() -> list[str]:
        """Return what was heard before a notice of this test's own, which comes last."""
        await postgres.query("SELECT pg_notify($1, 'end')", channel, url=postgres_url)
        said: list[str] = []
        while (notice := await asyncio.wait_for(heard.get(), PATIENCE_S)) != "end":
            said.append(notice)
        return [notice for notice in said if notice in {"new", "later", "freed"}]

    async def idle() -> bool:
        held = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        return bool(await postgres.query(held, url=postgres_url))

    broker, publisher = opened(), opened()
    await publish(publisher, b"1", b"2", queue=queue)
    nobody_there = await hears()
    _, sink = await consume(broker, queue, prefetch=2)
    first, second = await sink.take(2)
    await publish(publisher, b"3", queue=queue)
    full = await hears()
    first.done()
    second.done()
    (await sink.next()).done()
    async with asyncio.timeout(PATIENCE_S):
        while not await idle():
            await asyncio.sleep(0.01)
    await publish(publisher, b"4", queue=queue)
    await sink.next()

    assert (nobody_there, full, await hears()) == ([], [], ["new"])
    await listener.close()


async def test_a_store_finds_out_that_no_notice_comes_back(
    postgres: Postgres, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind a pooler LISTEN seems to work, and nothing is heard: jobs would start a second late, without a word."""
    caplog.set_level(logging.INFO, "leveret.postgresql")
    pooler = await postgres.pooler()
    broker = open_broker(f"{pooler.url_of(postgres_url)}?prepared=off", RUNTIME)
    try:
        consumption, sink = await consume(broker, QUEUE)
        async with asyncio.timeout(PATIENCE_S):
            while not ready(consumption):
                await asyncio.sleep(0.01)
        await publish(broker, b"1")
        await sink.next()
    finally:
        await broker.close()

    [said] = [record.getMessage() for record in caplog.records if "passes no notices" in record.message]
    assert "every 100 ms" in said


@pytest.mark.parametrize("kept", [0, 10])
async def test_a_pooler_that_forgets_prepared_statements_is_said_once_and_one_that_keeps_them_is_used(
    postgres: Postgres, postgres_url: str, caplog: pytest.LogCaptureFixture, kept: int
) -> None:
    """Each program would lose its connection many times a second, and nobody would hear why."""
    try:
        pooler = await postgres.pooler(default_pool_size=2, max_prepared_statements=kept)
    except RuntimeError:  # PgBouncer before 1.21 has no such setting
        if kept:
            pytest.skip("this PgBouncer keeps no prepared statements")
        pooler = await postgres.pooler(default_pool_size=2)
    url = pooler.url_of(postgres_url)
    broker = open_broker(url, RUNTIME)
    other = await asyncpg.connect(url, statement_cache_size=0)
    try:
        await publish(broker, b"1")
        async with other.transaction():  # has the server's connection that knows the statements
            await other.execute("SELECT 1")
            await publish(broker, b"2")
        async with other.transaction():
            await other.execute("SELECT 1")
            await publish(broker, b"3")
    finally:
        await other.close()
        await broker.close()

    said = [record.getMessage() for record in caplog.records if "write ?prepared=off into the URL" in record.message]
    assert len(said) == (0 if kept else 1)


async def test_the_admin_names_who_keeps_the_vacuum_from_its_work(
    postgres: Postgres, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report that somebody left open at night makes the tables grow until they fill the disk, and nothing else shows why."""
    monkeypatch.setattr(
        "leveret.brokers.postgresql.admin.HORIZON", admin_module.HORIZON.replace("1 minute", "0 seconds")
    )
    admin = open_admin(postgres_url, RUNTIME)
    reader = await asyncpg.connect(postgres_url, server_settings={"application_name": "report"})
    quiet = await admin.notes()
    await reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM leveret.jobs")

    [note] = await admin.notes()

    assert quiet == []
    assert f"process {reader.get_server_pid()} (report of user postgres, idle in transaction)" in note
    assert ", since 20" in note
    await reader.close()
    await admin.close()


async def test_a_purge_of_many_batches_leaves_what_is_held_and_nothing_else(
    opened: Opened, postgres: Postgres, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch begins behind the last one, so that millions take minutes: what falls due behind that place mustn't stay."""
    monkeypatch.setattr(admin_module, "_PURGED_AT_ONCE", 10)
    queue = Queue("plain", priorities=False)
    broker, admin = opened(), open_admin(postgres_url, RUNTIME)
    await publish(broker, b"1", b"2", b"3", queue=queue)
    _, sink = await consume(broker, queue, prefetch=3)
    held = await sink.take(3)
    rows = "INSERT INTO leveret.{} (queue, level, body{}) SELECT 'plain', 1 + n % 4, ''{} FROM generate_series(1, 35) n"
    await postgres.query(rows.format("jobs", "", ""), url=postgres_url)
    await postgres.query(rows.format("delayed", ", due_ms", ", 0"), url=postgres_url)

    purged = await admin.purge(queue)

    row = await depth(admin, queue)
    assert (purged, row.ready, row.delayed, row.unsettled) == (70, 0, 0, 3)
    assert all(delivery.live for delivery in held)
    await admin.close()
