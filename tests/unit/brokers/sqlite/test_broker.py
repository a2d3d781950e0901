"""What is the SQLite broker's own: locks, leases, clocks, forks and the file under it."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from leveret.broker import Broker, Subscription
from leveret.brokers import leases
from leveret.brokers.sqlite import open_admin, open_broker
from leveret.brokers.sqlite.identity import known_dead, my_identity
from leveret.brokers.turns import Look, Run
from leveret.clock import Clock, ManualClock
from leveret.consuming.settlement import Lost, Settlement
from leveret.errors import BrokerUnavailable, ConfigurationError, PublishError, PublishTimeout
from leveret.job import Queue
from leveret.outcome import Retry
from leveret.runtime import Runtime
from tests.contract.harness import PATIENCE_S, Recorder, consume, make_envelope, ready, soon, timed

QUEUE = Queue("jobs")
RUNTIME = Runtime(app="unit")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


@pytest.fixture
async def opened(path: Path) -> AsyncGenerator[Callable[..., Broker]]:
    """Make brokers on the file; closed at the end."""
    made: list[Broker] = []

    def make(runtime: Runtime = RUNTIME) -> Broker:
        made.append(open_broker(f"sqlite:///{path}", runtime))
        return made[-1]

    yield make
    for broker in made:
        await broker.close()


async def publish(broker: Broker, *bodies: bytes, delay_s: float = 0.0, clock: Clock | None = None) -> None:
    """Publish one job a body, in order."""
    for body in bodies:
        await broker.publish(QUEUE, timed(make_envelope(QUEUE, body), soon(), delay_s=delay_s, clock=clock))


async def ready_count(path: Path) -> int:
    admin = open_admin(f"sqlite:///{path}", RUNTIME)
    [row] = await admin.depths([QUEUE])
    await admin.close()
    return row.ready


@contextmanager
def locked(path: Path) -> Generator[None]:
    """Hold the file's lock, as a backup or an operator's shell does."""
    with closing(sqlite3.connect(path, isolation_level=None)) as blocker:
        blocker.execute("BEGIN EXCLUSIVE")
        yield
        blocker.execute("ROLLBACK")


async def until(true: Callable[[], object]) -> None:
    """Wait until `true()`, or fail."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.01)


async def looked(broker: Broker) -> None:
    """Wait until the broker has looked at the file as it does each 25 ms, and has delivered what it found."""
    for _ in range(2):  # a turn reads, and then looks for jobs: the second read comes after the first look
        await cast("Any", broker)._turns.run(Look(about="a look", call=lambda _: None))


async def test_a_publish_whose_deadline_passed_under_a_lock_is_never_written(
    path: Path, opened: Callable[..., Broker]
) -> None:
    """The caller was told that it failed and published again: written later after all, it would run twice."""
    broker = opened()
    await publish(broker, b"before")

    with locked(path):
        started = time.monotonic()
        with pytest.raises(PublishTimeout, match="locked by another process") as raised:
            await broker.publish(QUEUE, timed(make_envelope(QUEUE, job_id="late"), started + 0.3))
        took = time.monotonic() - started
    await publish(broker, b"after")

    assert not raised.value.maybe_published
    assert (raised.value.job_id, str(path) in str(raised.value)) == ("late", True)
    assert 0.25 < took < 1.5
    assert await ready_count(path) == 2


async def test_a_short_deadline_is_not_held_up_by_a_long_one(path: Path, opened: Callable[..., Broker]) -> None:
    """All publishes of a process share one thread; one that waits long must not make the others wait."""
    broker = opened()
    await publish(broker, b"before")

    with locked(path):
        long = asyncio.create_task(broker.publish(QUEUE, timed(make_envelope(QUEUE), soon())))
        await asyncio.sleep(0.05)
        started = time.monotonic()
        with pytest.raises(PublishTimeout):
            await broker.publish(QUEUE, timed(make_envelope(QUEUE), started + 0.1))
        took = time.monotonic() - started
        assert not long.done()
    await long

    assert took < 1.0
    assert await ready_count(path) == 2


async def test_opening_is_inside_the_deadline(path: Path, opened: Callable[..., Broker]) -> None:
    """The first publish of a process pays for opening; a lock at that moment must not make it hang."""
    await publish(opened(), b"before")

    with locked(path), pytest.raises(PublishTimeout) as raised:
        await opened().publish(QUEUE, timed(make_envelope(QUEUE), time.monotonic() + 0.2))

    assert not raised.value.maybe_published


async def test_a_cancelled_publish_is_not_written_later(path: Path, opened: Callable[..., Broker]) -> None:
    """Whoever cancels doesn't expect it to happen a minute later."""
    broker = opened()
    await publish(broker, b"before")

    with locked(path):
        cancelled = asyncio.create_task(broker.publish(QUEUE, timed(make_envelope(QUEUE), soon())))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
    await publish(broker, b"after")

    assert await ready_count(path) == 2


async def test_done_under_a_lock_is_kept_until_it_can_be_written(path: Path, opened: Callable[..., Broker]) -> None:
    """A backup of ten seconds must not make every job of these ten seconds run again."""
    broker = opened()
    await publish(broker, b"1", b"2")
    consumption, sink = await consume(broker, QUEUE)
    deliveries = await sink.take(2)

    with locked(path):
        for delivery in deliveries:
            delivery.done()
        await asyncio.sleep(0.2)
    await consumption.close()

    assert await ready_count(path) == 0


async def test_a_settlement_that_timed_out_leaves_the_job_claimed_and_can_be_tried_again(
    path: Path, opened: Callable[..., Broker]
) -> None:
    """The consumer repeats it: neither a second copy nor a loss may come of that."""
    broker = opened()
    await publish(broker, b"1")
    consumption, sink = await consume(broker, QUEUE)
    delivery = await sink.next()

    with locked(path):
        for _ in range(3):
            with pytest.raises(PublishTimeout):
                await delivery.again(timed(delivery.envelope, time.monotonic() + 0.1, delay_s=60))
        assert delivery.live
    await delivery.again(timed(delivery.envelope, soon(), delay_s=60))
    await delivery.again(timed(delivery.envelope, soon(), delay_s=60))  # a repeat has no effect
    await consumption.close()

    with closing(sqlite3.connect(path)) as file:
        assert file.execute("SELECT count(*), count(due_ms) FROM jobs").fetchone() == (1, 1)


async def test_a_retry_committed_after_its_deadline_is_done_and_not_lost(
    path: Path, opened: Callable[..., Broker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that hangs for six seconds: "delivered again" in the log and a job counted as lost send somebody to look for what is all right."""
    monkeypatch.setattr("leveret.consuming.following.SETTLE_TIMEOUT_S", 0.2)
    broker, clock, disk = opened(), ManualClock(), threading.Event()
    await publish(broker, b"1")
    consumption, sink = await consume(broker, QUEUE)
    delivery = await sink.next()
    await consumption.stop_taking()

    settlement = Settlement([], Runtime(app="unit", clock=clock))
    rest = settlement.end(delivery, None, Retry(0), None)
    assert rest is not None
    settling = asyncio.create_task(rest)
    turns = cast("Any", broker)._turns  # what hangs is in the same transaction
    hanging = asyncio.create_task(turns.run(Run(about="a disk that hangs", call=lambda _: disk.wait(PATIENCE_S))))
    await until(lambda: clock.sleepers)
    disk.set()
    await hanging
    clock.advance(60)

    await settling
    assert not settlement.counts[Lost]
    assert await ready_count(path) == 1


async def test_a_consumer_that_starts_under_a_lock_waits_for_it_and_says_so(
    path: Path, opened: Callable[..., Broker], caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that dies, or waits without a word, because somebody copies the file is a page at night."""
    await publish(opened(), b"1")
    sink = Recorder()

    with caplog.at_level(logging.INFO, "leveret.sqlite"):
        with locked(path):
            started = time.monotonic()
            consumption = await opened().consume([Subscription(QUEUE, 10)], sink)
            assert time.monotonic() - started < 3
            assert not ready(consumption)
            await until(lambda: caplog.records)
            await asyncio.sleep(0.3)
        await sink.next()
        await until(lambda: ready(consumption))

    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert all(str(path) in record.getMessage() for record in caplog.records)


async def test_closing_under_a_lock_ends(
    path: Path, opened: Callable[..., Broker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker must stop when it is told to, whatever the file does; what was done and can't be written runs again."""
    monkeypatch.setattr("leveret.brokers.turns.turns.CLOSE_S", 0.3)
    broker = opened()
    await publish(broker, b"1")
    _, sink = await consume(broker, QUEUE)
    delivery = await sink.next()

    with locked(path):
        delivery.done()
        async with asyncio.timeout(5):
            await broker.close()
        with pytest.raises(BrokerUnavailable, match="closed"):
            await publish(broker, b"2")
    assert not delivery.live


async def test_a_job_given_back_keeps_its_place_and_was_not_started(opened: Callable[..., Broker]) -> None:
    """It never ran: to call it redelivered would make the crash counters of rule 6 punish the innocent."""
    broker = opened()
    await publish(broker, b"1", b"2", b"3")
    consumption, sink = await consume(broker, QUEUE, prefetch=2)
    first, second = await sink.take(2)
    await consumption.stop_taking()

    second.give_back()
    first.give_back()
    await consumption.close()
    _, sink = await consume(opened(), QUEUE)

    assert [(each.envelope.body, each.redelivered) for each in await sink.take(3)] == [
        (b"1", False),
        (b"2", False),
        (b"3", False),
    ]


async def test_a_job_that_falls_due_joins_the_tail(opened: Callable[..., Broker]) -> None:
    """Ahead of the backlog, retries of a failing job would starve the good ones; behind all that ever comes, they would starve."""
    clock = ManualClock()
    broker = opened(Runtime(app="unit", clock=clock))
    for delay_s, body in ((20.0, b"late"), (10.0, b"early"), (0.0, b"now")):
        await publish(broker, body, delay_s=delay_s, clock=clock)
    consumption, sink = await consume(broker, QUEUE, prefetch=1)
    now = await sink.next()
    clock.advance(30)
    await looked(broker)  # and saw that the time has come
    await publish(broker, b"after")
    now.done()

    order = [now.envelope.body]
    for _ in range(3):
        delivery = await sink.next()
        order.append(delivery.envelope.body)
        delivery.done()
    await consumption.close()

    assert order == [b"now", b"early", b"late", b"after"]


async def test_a_clock_set_back_delays_no_job_that_has_no_delay(opened: Callable[..., Broker]) -> None:
    """After a correction of the clock by an hour, jobs must not stand still for an hour."""
    await publish(opened(Runtime(app="unit", clock=ManualClock(1_800_000_000))), b"1")

    _, sink = await consume(opened(Runtime(app="unit", clock=ManualClock(1_799_996_400))), QUEUE)

    assert (await sink.next()).envelope.body == b"1"


class SetClock(ManualClock):
    """A clock whose wall time can be set, as an operator or NTP does; its monotonic time goes on."""

    step_s = 0.0

    def now(self) -> float:
        return super().now() + self.step_s


async def test_a_clock_set_back_holds_up_no_job_that_was_delayed_before(opened: Callable[..., Broker]) -> None:
    """A retry that was due in 3 s would run two hours later, or never if its customer has gone by then."""
    clock = SetClock()
    broker, other = (opened(Runtime(app="unit", clock=clock)) for _ in range(2))
    _, sink = await consume(broker, QUEUE)
    await publish(other, b"before", delay_s=3, clock=clock)
    await looked(broker)

    clock.step_s = -7200
    await looked(broker)
    await publish(other, b"after", delay_s=60, clock=clock)
    clock.advance(2.5)
    await looked(broker)
    assert sink.waiting == 0
    clock.advance(0.5)
    first = await sink.next()
    clock.advance(56.5)
    await looked(broker)
    assert sink.waiting == 0
    clock.advance(0.5)

    assert (first.envelope.body, (await sink.next()).envelope.body) == (b"before", b"after")


async def test_a_clock_set_forward_and_back_delivers_no_job_early(opened: Callable[..., Broker]) -> None:
    """After a wrong step is corrected each job must be due when it was asked for, whatever the clock was when it came."""
    clock = SetClock()
    broker = opened(Runtime(app="unit", clock=clock))
    _, sink = await consume(broker, QUEUE)
    for step_s, body, delay_s in ((0, b"9000", 9000), (7200, b"4000", 4000), (0, b"5000", 5000)):
        clock.step_s = step_s
        await looked(broker)
        await publish(broker, body, delay_s=delay_s, clock=clock)
        await looked(broker)

    came = list[tuple[float, bytes]]()
    while len(came) < 3:
        clock.advance(500)
        await looked(broker)
        came += [(clock.monotonic(), each.envelope.body) for each in await sink.take(sink.waiting)]

    assert came == [(4000, b"4000"), (5000, b"5000"), (9000, b"9000")]


async def test_many_jobs_due_at_once_keep_their_order(opened: Callable[..., Broker]) -> None:
    """They are made ready some thousand at a time."""
    clock = ManualClock()
    broker = opened(Runtime(app="unit", clock=clock))
    sent = [b"%d" % number for number in range(2500)]
    await asyncio.gather(
        *(
            broker.publish(QUEUE, timed(make_envelope(QUEUE, body), soon(), delay_s=1 + n / 1000, clock=clock))
            for n, body in enumerate(sent)
        )
    )
    _, sink = await consume(broker, QUEUE, prefetch=3000)

    clock.advance(60)

    assert [delivery.envelope.body for delivery in await sink.take(2500)] == sent


async def test_a_job_that_cannot_be_stored_fails_alone(path: Path, opened: Callable[..., Broker]) -> None:
    """Publishes share a transaction: one with a text that has no UTF-8 must not take the others with it."""
    broker = opened()
    jobs = [make_envelope(QUEUE, b"%d" % number) for number in range(20)]
    jobs[7] = msgspec.structs.replace(jobs[7], correlation_id="\ud800")
    jobs[12] = msgspec.structs.replace(jobs[12], created_s=1 << 70)

    results = await asyncio.gather(*(broker.publish(QUEUE, timed(job, soon())) for job in jobs), return_exceptions=True)

    assert [number for number, result in enumerate(results) if result is not None] == [7, 12]
    assert all(isinstance(results[number], PublishError) for number in (7, 12))
    assert await ready_count(path) == 18


async def test_a_header_that_cannot_be_stored_is_refused(opened: Callable[..., Broker]) -> None:
    """Headers of other brokers' making may hold anything."""
    with pytest.raises(PublishError, match="header"):
        await opened().publish(QUEUE, timed(make_envelope(QUEUE, headers={"x": object()}), soon()))


async def test_large_bodies_are_committed_some_at_a_time(path: Path, opened: Callable[..., Broker]) -> None:
    """A thousand bodies of 15 MiB in one transaction would be 15 GiB of log."""
    broker = opened()
    body = os.urandom(9 << 20)

    await asyncio.gather(*(broker.publish(QUEUE, timed(make_envelope(QUEUE, body), soon(60))) for _ in range(8)))

    assert await ready_count(path) == 8


POISON = {
    "job_id": "CAST(x'ff41' AS TEXT)",
    "job": "CAST(x'80' AS TEXT)",
    "correlation_id": "CAST(x'c3' AS TEXT)",
    "headers": "CAST('{\"x\":\"' || x'fc' || '\"}' AS TEXT)",
    "app": "x'ff42'",
    "content_type": "x'00ff'",
}
"""A column, and what SQLite takes for it: text that isn't UTF-8, and bytes."""


def poison(path: Path, column: str, table: str = "jobs", body: str = "bad") -> None:
    """Write a row that isn't UTF-8 in `column`."""
    row = {
        "queue": "'jobs'",
        "level": "'normal'",
        "job_id": "'id'",
        "job": "'case'",
        "content_type": "'application/json'",
        "created_s": "0",
    }
    row["body"] = f"'{body}'"
    row[column] = POISON.get(column, "CAST(x'ff' AS TEXT)")
    with closing(sqlite3.connect(path, timeout=PATIENCE_S)) as file, file:
        file.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join(row.values())})")


@pytest.mark.parametrize("column", POISON)
@pytest.mark.parametrize("running", [True, False], ids=["running", "starting"])
async def test_a_row_that_is_not_utf_8_stops_nobody_and_can_be_buried(
    path: Path, opened: Callable[..., Broker], caplog: pytest.LogCaptureFixture, column: str, running: bool
) -> None:
    """One such row of a program in another language stood before all others: no worker of the file took a job any more."""
    broker, sink = opened(), Recorder()
    await publish(broker, b"1")
    if running:
        await consume(broker, QUEUE, sink=sink)
        await sink.next()
    poison(path, column)
    await publish(broker, b"2")
    if not running:
        await consume(broker, QUEUE, sink=sink)
        await sink.next()

    bad, good = await sink.take(2)
    await bad.bury(timed(bad.envelope, soon()))

    assert good.envelope.body == b"2"
    assert bad.envelope.body == b"bad"
    assert f"its column {column} isn't UTF-8 text" in str(bad.problem)
    assert not caplog.records
    assert sink.losses == 0
    admin = open_admin(f"sqlite:///{path}", RUNTIME)
    async with admin.dead(QUEUE) as letters:
        assert [letter.envelope.body async for letter in letters] == [b"bad"]
    await admin.close()


@pytest.mark.parametrize("column", [*POISON, "level"])
async def test_a_letter_that_is_not_utf_8_is_read_replayed_and_dropped(
    path: Path, opened: Callable[..., Broker], column: str
) -> None:
    """An operator who can't list the dead letters for the sake of one of them can do nothing for the others."""
    broker = opened()
    await publish(broker, b"1")
    consumption, sink = await consume(broker, QUEUE)
    delivery = await sink.next()
    await delivery.bury(timed(delivery.envelope, soon()))
    await consumption.close()
    poison(path, column, "dead", "to be replayed")
    poison(path, column, "dead", "to be dropped")
    poison(path, "level", "jobs", "never taken")

    admin = open_admin(f"sqlite:///{path}", RUNTIME)
    async with admin.dead(QUEUE) as letters:
        good, replayed, dropped = [letter async for letter in letters]
        await letters.replay(replayed, replayed.envelope)
        await letters.drop(dropped)
    [row] = await admin.depths([QUEUE])
    await admin.close()

    assert [letter.envelope.body for letter in (good, replayed, dropped)] == [b"1", b"to be replayed", b"to be dropped"]
    assert (row.dead, row.levels["normal"], row.levels["\ufffd"]) == (1, 1, 1)


async def test_a_worker_that_shows_no_life_loses_what_it_holds_and_hears_of_it(
    path: Path, opened: Callable[..., Broker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Suspended for longer than its lease it must not settle what another one runs by then."""
    monkeypatch.setattr(leases, "BEAT_S", 0.1)
    monkeypatch.setattr(leases, "LEASE_S", 0.3)
    broker = opened()
    await publish(broker, b"1")
    _, sink = await consume(broker, QUEUE)
    held = await sink.next()
    with closing(sqlite3.connect(path)) as file, file:  # what another worker does to one that it takes for dead
        file.execute("UPDATE jobs SET claimed_by = NULL")
        file.execute("DELETE FROM workers")

    await asyncio.wait_for(sink.lost_once.wait(), PATIENCE_S)
    held.done()
    again = await sink.next()

    assert not held.live
    assert (again.envelope, again.redelivered, again.live) == (held.envelope, True, True)
    assert await ready_count(path) == 0


async def test_a_dead_workers_row_is_taken_over_after_the_lease(
    path: Path, opened: Callable[..., Broker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a worker in another container only its silence tells that it is dead."""
    monkeypatch.setattr(leases, "BEAT_S", 0.1)
    monkeypatch.setattr(leases, "LEASE_S", 0.3)
    broker = opened()
    await publish(broker, b"1")
    with closing(sqlite3.connect(path)) as file, file:
        worker = file.execute("INSERT INTO workers (identity) VALUES ('another-boot pid:[1] 1 1')").lastrowid
        file.execute("UPDATE jobs SET claimed_by = ?, deliveries = 1", (worker,))

    started = time.monotonic()
    _, sink = await consume(broker, QUEUE)
    delivery = await sink.next()

    assert time.monotonic() - started >= 0.3
    assert delivery.redelivered


async def test_a_death_counts_as_a_crash_of_what_had_begun_and_of_what_has_none_yet(
    path: Path, opened: Callable[..., Broker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only waited beside a job that kills its workers would be buried with it; nobody knows of a first death what had begun."""
    monkeypatch.setattr(leases, "BEAT_S", 0.1)
    monkeypatch.setattr(leases, "LEASE_S", 0.3)
    broker = opened()
    await publish(broker, b"first death", b"had begun", b"had waited")
    with closing(sqlite3.connect(path)) as file, file:
        worker = file.execute("INSERT INTO workers (identity) VALUES ('another-boot pid:[1] 1 1')").lastrowid
        file.execute("UPDATE jobs SET claimed_by = ?, deliveries = 1", (worker,))
        file.execute("UPDATE jobs SET crashes = 2 WHERE body != ?", (b"first death",))
        file.execute("UPDATE jobs SET begun = 1 WHERE body = ?", (b"had begun",))

    _, sink = await consume(broker, QUEUE)
    crashes = {(delivery := await sink.next()).envelope.body: delivery.envelope.crashes for _ in range(3)}

    assert crashes == {b"first death": 1, b"had begun": 3, b"had waited": 2}


async def test_a_living_worker_keeps_what_it_holds_for_longer_than_a_lease(
    opened: Callable[..., Broker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of an hour must not be given to another worker after 15 seconds."""
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    monkeypatch.setattr(leases, "LEASE_S", 0.15)
    broker, other = opened(), opened()
    await publish(broker, b"long")
    _, sink = await consume(broker, QUEUE)
    held = await sink.next()
    _, other_sink = await consume(other, QUEUE)

    await asyncio.sleep(1.0)

    assert held.live
    assert (sink.losses, other_sink.losses, other_sink.waiting) == (0, 0, 0)


async def test_a_lock_longer_than_the_lease_costs_nobody_his_lease(
    path: Path, opened: Callable[..., Broker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nobody can show life, silence proves nothing; else one long backup makes every running job run twice."""
    monkeypatch.setattr(leases, "BEAT_S", 0.1)
    monkeypatch.setattr(leases, "LEASE_S", 0.3)
    workers = [opened() for _ in range(3)]
    await publish(workers[0], b"1", b"2", b"3")
    sinks = [(await consume(worker, QUEUE, prefetch=1))[1] for worker in workers]
    held = [await sink.next() for sink in sinks]

    with locked(path):
        await asyncio.sleep(1.0)
    await asyncio.sleep(0.5)

    assert all(delivery.live for delivery in held)
    assert [sink.losses for sink in sinks] == [0, 0, 0]


def test_only_a_process_that_is_certainly_gone_is_called_dead() -> None:
    """Its jobs are handed out at once: a mistake runs them twice."""
    mine = my_identity()
    if not mine:
        pytest.skip("no /proc here: only silence tells")
    boot, namespace, pid, start = mine.split()
    ended = os.fork()
    if ended == 0:
        os._exit(0)
    unfetched = f"{boot} {namespace} {ended} {start}"
    os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)
    zombie = known_dead(unfetched)
    os.waitpid(ended, 0)

    assert zombie
    assert known_dead(unfetched)
    assert known_dead(f"{boot} {namespace} {pid} {int(start) + 1}")  # its number was given to another
    assert not known_dead(mine)
    assert not known_dead(f"other-boot {namespace} {ended} {start}")
    assert not known_dead(f"{boot} pid:[1] {ended} {start}")
    assert not known_dead("")


async def test_a_forked_child_publishes_on_a_connection_of_its_own(path: Path, opened: Callable[..., Broker]) -> None:
    """Gunicorn forks after the app was loaded: a connection used by both sides corrupts the file."""
    broker = opened()
    await publish(broker, b"parent")

    child = os.fork()
    if child == 0:
        status = 1
        try:
            asyncio.events._set_running_loop(None)
            asyncio.run(publish(broker, b"child"))
            status = 0
        finally:
            os._exit(status)
    await publish(broker, b"parent again")
    _, status = await asyncio.to_thread(os.waitpid, child, 0)

    assert status == 0
    assert await ready_count(path) == 3
    with closing(sqlite3.connect(path)) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_a_file_deleted_under_a_running_worker_is_noticed(
    path: Path, opened: Callable[..., Broker], caplog: pytest.LogCaptureFixture
) -> None:
    """On the old, nameless file every publish would be confirmed and no worker would ever see it; a false cause misleads."""
    publisher, worker = opened(), opened()
    await publish(publisher, b"1")
    consumption, sink = await consume(worker, QUEUE)
    old = await sink.next()

    for file in path.parent.glob("jobs.db*"):
        file.unlink()
    await publish(publisher, b"2")
    delivery = await sink.next()

    assert (delivery.envelope.body, delivery.live, old.live) == (b"2", True, False)
    assert sink.losses == 1
    assert "deleted or replaced" in caplog.text
    assert "sent no beat" not in caplog.text
    await consumption.close()


async def test_a_file_that_cannot_be_used_any_more_ends_the_consumption(
    path: Path, opened: Callable[..., Broker]
) -> None:
    """A worker without its file must end and say why, not sit there looking well."""
    consumption, _ = await consume(opened(), QUEUE)
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()

    with pytest.raises(ConfigurationError, match=r"the folder .* doesn't exist"):
        await asyncio.wait_for(consumption.failed(), PATIENCE_S)

    assert not ready(consumption)
    path.parent.mkdir()


async def test_space_is_given_back(path: Path, opened: Callable[..., Broker], monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that was long once must not fill the disk for ever."""
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    broker = opened()
    bodies = [os.urandom(64 << 10)] * 200
    await asyncio.gather(*(broker.publish(QUEUE, timed(make_envelope(QUEUE, body), soon())) for body in bodies))
    _, sink = await consume(broker, QUEUE, prefetch=200)

    for delivery in await sink.take(200):
        delivery.done()

    with closing(sqlite3.connect(path)) as file:
        await until(lambda: file.execute("PRAGMA page_count").fetchone()[0] < 1500)


async def test_a_publisher_and_a_worker_of_one_process_meet_at_once(
    opened: Callable[..., Broker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedded worker should answer in a millisecond, not at the next poll; the two have a connection each."""
    publisher, worker = opened(), opened()
    _, sink = await consume(worker, QUEUE)
    await publish(publisher, b"before")
    await sink.next()
    monkeypatch.setattr("leveret.brokers.sqlite.store.POLL_S", 60.0)
    await asyncio.sleep(0.1)  # the last short poll is over

    await publish(publisher, b"1")

    assert (await sink.next()).envelope.body == b"1"
