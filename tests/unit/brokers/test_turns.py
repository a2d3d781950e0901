"""What turns do between a loop and a store, on a store in memory that is driven from the loop, as one over a network is."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from leveret.broker import Delivery, Posted, Subscription
from leveret.brokers.rows import BODY, Row, pack
from leveret.brokers.turns import Claimed, Consumption, Run, Taker, Turn, Turns, Window, turns
from leveret.brokers.turns.writes import End
from leveret.clock import ManualClock
from leveret.errors import BrokerUnavailable, ConfigurationError, PublishTimeout
from leveret.job import Queue
from leveret.runtime import Runtime
from leveret.settings import Settings
from leveret.store import Change, Progress, State
from tests.contract.harness import PATIENCE_S, Recorder, make_envelope, ready, soon, timed

QUEUE = Queue("jobs", priorities=False)
log = logging.getLogger("leveret.shelf")


class Locked(Exception):
    """The store can't be written now; it will be."""


class Away(Exception):
    """The store can't be reached now."""


class Broken(Exception):
    """The store can't be written, and a new connection is needed."""


class Doubtful(Exception):
    """The connection was lost during the commit."""


class Shelf:
    """A store: rows by number, and who claimed each. Its driver is a task; a test opens `gate`, and lets a commit raise `fault`."""

    def __init__(self, runtime: Runtime) -> None:
        self.turns = Turns("the shelf", runtime, log, self)
        self.rows: dict[int, Row] = {}
        self.letters: list[Row] = []
        self.changes: list[Change | Progress] = []
        """What the job store on the shelf has heard."""
        self.missed: list[Change | Progress] = []
        self.turns.missed = self.missed.append
        self.claims: dict[int, int] = {}
        self.workers: list[int] = []
        self.commits: list[int] = []
        """The number of writes, by transaction."""
        self.most = math.inf
        """The largest number of writes in a transaction."""
        self.gate = asyncio.Event()
        self.gate.set()
        self.at_gate = asyncio.Event()
        self.fault: Callable[[Turn], Exception | None] = lambda _: None
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._number = 0

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._main())

    def wake(self) -> None:
        self._news.set()

    def tell(self, function: Callable[..., object], /, *args: object) -> None:
        function(*args)

    async def _main(self) -> None:
        try:
            while await self._collect():
                await self._turn()
        except ConfigurationError as error:
            self.turns.give_up(error)
        finally:
            self.turns.end()

    async def _collect(self) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(self.turns.patience(0.02)):
                await self._news.wait()
        self._news.clear()
        return self.turns.collect()

    async def _turn(self) -> None:
        now, turns = time.monotonic(), self.turns
        turns.prepare(now)
        if not (turns.waiting or turns.takers.due(now)):
            turns.rest()
            return
        turn = turns.take(self.most)
        try:
            self.at_gate.set()
            await self.gate.wait()
            if fault := self.fault(turn):
                raise fault
        except Locked as error:
            turns.rolled_back()
            turns.hold_up(str(error), pause_s=0.01, quiet_s=0.0)
        except Away as error:
            turns.rolled_back()
            turns.hold_up(str(error), pause_s=None, quiet_s=0.0, state="connecting")
        except Broken as error:
            turns.rolled_back()
            turns.fail(str(error))
        except Doubtful as error:
            turns.doubt(turn, str(error))
            turns.rolled_back()
            turns.fail(str(error))
        except ValueError as error:
            turns.rolled_back()
            turns.refuse(turn, f"the shelf refuses it: {error}")
        else:
            self._transact(turn)
            self.commits.append(len(turn.writes))
            turns.committed(turn)

    def _transact(self, turn: Turn) -> None:
        """Do all the work of a turn; nothing here can fail."""
        takers = self.turns.takers
        for taker in takers.all:
            if taker.lease.id not in self.workers:
                if taker.lease.id is not None:
                    takers.expired(taker)
                takers.lease(taker, self._next())
                self.workers.append(self._number)
        if takers.all and time.monotonic() >= takers.next_beat:
            takers.silent(turn, [])
        turn.gather()
        for lease, deliveries in [*turn.gone.items(), *turn.given_back.items()]:
            for delivery in deliveries:
                assert self.claims.pop(delivery.seq) == lease.id
                if delivery in turn.gone[lease]:
                    del self.rows[delivery.seq]
        for row in turn.jobs:
            self.rows[self._next()] = row
        self.letters += turn.letters
        self.changes += turn.changes
        if turn.added:
            takers.may_find_jobs()
        for run in turn.calls:
            run.result = run.call(self)
        for taker in turn.closing:
            self.claims = {seq: worker for seq, worker in self.claims.items() if worker != taker.lease.id}
        for taker in takers.all:
            for window, free in turn.wanted(taker):
                seqs = [seq for seq in self.rows if seq not in self.claims][:free]
                self.claims |= dict.fromkeys(seqs, taker.lease.id or 0)
                found = [(seq, 1, 0, *self.rows[seq][:2], *self.rows[seq][3:]) for seq in seqs]
                turn.claim(taker, window, free, found)

    def _next(self) -> int:
        self._number += 1
        return self._number

    @property
    def bodies(self) -> list[bytes]:
        return [row[BODY] for row in self.rows.values()]


@pytest.fixture
async def shelf() -> AsyncGenerator[Shelf]:
    shelf = Shelf(Runtime(app="unit", clock=ManualClock()))
    yield shelf
    shelf.gate.set()
    shelf.fault = lambda _: None
    await shelf.turns.close()


def publish(shelf: Shelf, body: bytes, deadline: float | None = None) -> asyncio.Task[None]:
    envelope = timed(make_envelope(QUEUE, body, job_id=body[:9].decode()), deadline or soon())
    return asyncio.get_running_loop().create_task(shelf.turns.publish(QUEUE, envelope))


def post(shelf: Shelf, body: bytes, deadline: float | None = None) -> Posted:
    envelope = timed(make_envelope(QUEUE, body, job_id=body[:9].decode()), deadline or soon())
    posted = shelf.turns.post_publish(QUEUE, envelope)
    assert posted is not None
    return posted


async def consume(shelf: Shelf, prefetch: int = 10) -> tuple[Consumption, Recorder]:
    sink = Recorder()
    consumption = Consumption(shelf.turns, [Subscription(QUEUE, prefetch)], sink)
    await consumption.open()
    return consumption, sink


async def at_the_gate(shelf: Shelf) -> None:
    """Wait until a transaction is under way and can't be committed."""
    await asyncio.wait_for(shelf.at_gate.wait(), PATIENCE_S)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.005)


async def test_what_comes_in_one_turn_or_during_a_commit_shares_a_transaction(shelf: Shelf) -> None:
    """A commit for each job would make a store 50 times slower."""
    shelf.gate.clear()
    first = [publish(shelf, b"%d" % number) for number in range(5)]
    await at_the_gate(shelf)
    then = []
    for number in range(5, 8):
        then.append(publish(shelf, b"%d" % number))
        await asyncio.sleep(0)
    shelf.gate.set()
    await asyncio.gather(*first, *then)

    assert shelf.commits == [5, 3]
    assert shelf.bodies == [b"%d" % number for number in range(8)]


async def test_a_deadline_before_the_transaction_writes_nothing(shelf: Shelf) -> None:
    """The caller publishes again: written later after all, the job would run twice."""
    shelf.gate.clear()
    held = publish(shelf, b"held")
    await at_the_gate(shelf)

    with pytest.raises(PublishTimeout) as raised:
        await publish(shelf, b"late", time.monotonic() + 0.02)
    shelf.gate.set()
    await held
    await publish(shelf, b"after")

    assert not raised.value.maybe_published
    assert shelf.bodies == [b"held", b"after"]


async def test_a_deadline_in_the_transaction_says_that_the_job_may_be_published(shelf: Shelf) -> None:
    """A caller who heard that it wasn't would count a job as lost that runs."""
    shelf.gate.clear()
    with pytest.raises(PublishTimeout) as raised:
        await publish(shelf, b"slow", time.monotonic() + 0.3)
    assert raised.value.maybe_published

    shelf.gate.set()
    await publish(shelf, b"after")

    assert shelf.bodies == [b"slow", b"after"]


async def test_a_retry_committed_after_its_deadline_is_done_at_the_next_try(shelf: Shelf) -> None:
    """A second copy would run twice; "lost" would be a lie."""
    await publish(shelf, b"1")
    _, sink = await consume(shelf)
    delivery = await sink.next()
    shelf.gate.clear()
    with pytest.raises(PublishTimeout):
        await delivery.again(timed(delivery.envelope, time.monotonic() + 0.3))
    assert delivery.live

    shelf.gate.set()
    again = await sink.next()

    assert await delivery.again(timed(delivery.envelope, soon()))
    assert (again.envelope.body, shelf.bodies) == (b"1", [b"1"])


async def test_a_write_that_the_store_refuses_fails_alone(shelf: Shelf) -> None:
    """Publishes share a transaction: one with a bad text must not take the others with it."""

    def bad(turn: Turn) -> Exception | None:
        rows: list[Any] = [write for write in turn.writes if write.job_id == "bad"]
        return ValueError("a bad text") if rows else None

    shelf.fault = bad
    bodies = [b"1", b"2", b"bad", b"3"]
    results = await asyncio.gather(*(publish(shelf, body) for body in bodies), return_exceptions=True)

    assert [str(result) for result in results if result] == [
        "job bad for queue 'jobs' wasn't written to the shelf: the shelf refuses it: a bad text"
    ]
    assert isinstance(results[2], BrokerUnavailable)
    assert shelf.bodies == [b"1", b"2", b"3"]


async def test_a_store_that_is_held_up_refuses_nothing(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    """A backup of ten seconds must cost neither a publish nor a finished job, and an operator must read why nothing moves."""
    await publish(shelf, b"1")
    consumption, sink = await consume(shelf)
    delivery = await sink.next()
    shelf.fault = lambda _: Locked("somebody copies it")

    with caplog.at_level(logging.INFO, "leveret.shelf"):
        waiting = publish(shelf, b"2")
        delivery.done()
        await sink.until(lambda: not ready(consumption))
        state = shelf.turns.publishing
        [queue] = consumption.queues
        shelf.fault = lambda _: None
        await waiting
        await sink.until(lambda: ready(consumption))

    assert (state.name, state.why, shelf.turns.publishing.name) == ("blocked", "somebody copies it", "ready")
    assert queue.why == "the shelf can't be written: somebody copies it"
    assert shelf.bodies == [b"2"]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_a_store_that_cannot_be_reached_says_that_it_connects(shelf: Shelf) -> None:
    """Blocked would send an operator to the store's disk, when the network or the server is away."""
    faults = [Away("no route"), Away("no route")]
    states = list[str]()

    def fault(_: Turn) -> Exception | None:
        states.append(shelf.turns.publishing.name)
        return faults.pop() if faults else None

    shelf.fault = fault

    await publish(shelf, b"1")

    assert states == ["ready", "connecting", "connecting"]
    assert shelf.turns.publishing.name == "ready"


async def test_posts_share_a_transaction_and_each_ends(shelf: Shelf) -> None:
    """A task and a future for each of a hundred thousand jobs cost more than writing them."""
    posts = [post(shelf, body) for body in (b"1", b"2", b"3")]

    for each in posts:
        await each.wait()

    assert [(each.ended, each.error()) for each in posts] == [(True, None)] * 3
    assert shelf.bodies == [b"1", b"2", b"3"]
    assert shelf.commits == [3]


async def test_more_posts_than_a_transaction_takes_go_into_the_next_in_their_order(shelf: Shelf) -> None:
    """A transaction of all that may be unconfirmed leaves a publisher nothing to do until the commit, and then the store nothing."""
    shelf.most = 2
    posts = [post(shelf, body) for body in (b"1", b"2", b"3", b"4", b"5")]

    for each in posts:
        await each.wait()

    assert shelf.bodies == [b"1", b"2", b"3", b"4", b"5"]
    assert shelf.commits == [2, 2, 1]


async def test_a_post_ends_by_its_deadline_and_is_not_written_later(shelf: Shelf) -> None:
    """A caller that was refused publishes again: a first copy that is written later would run beside the second."""
    shelf.fault = lambda _: Locked("somebody copies it")

    late, later = post(shelf, b"1", soon(0.05)), post(shelf, b"2")
    await late.wait()
    error = late.error()
    shelf.fault = lambda _: None
    await later.wait()

    assert isinstance(error, PublishTimeout)
    assert (error.maybe_published, error.job_id) == (False, "1")
    assert shelf.bodies == [b"2"]


async def test_a_full_window_takes_no_post(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a bound a million jobs would wait in memory for a store that stands still."""
    monkeypatch.setattr("leveret.brokers.turns.turns.WINDOW", 2)
    posts = [post(shelf, b"1"), post(shelf, b"2")]

    refused = shelf.turns.post_publish(QUEUE, timed(make_envelope(QUEUE), soon()))
    for each in posts:
        await each.wait()

    assert refused is None
    assert post(shelf, b"3").ended is False


async def test_a_store_that_fails_refuses_who_waits_and_keeps_what_is_finished(shelf: Shelf) -> None:
    """Who waits can use another way or say so; a finished job that is forgotten would run again."""
    await publish(shelf, b"1")
    _, sink = await consume(shelf)
    delivery = await sink.next()
    shelf.fault = lambda _: Broken("no route")

    delivery.done()
    with pytest.raises(BrokerUnavailable, match="wasn't written to the shelf: no route"):
        await publish(shelf, b"2")
    shelf.fault = lambda _: None
    await until(lambda: not shelf.rows)

    assert delivery.live


async def test_a_commit_in_doubt_says_that_the_job_may_be_published(shelf: Shelf) -> None:
    """The answer of a commit was lost with the connection: neither yes nor no would be true."""
    shelf.fault = lambda _: Doubtful("cut during the commit")

    with pytest.raises(PublishTimeout, match="cut during the commit") as raised:
        await publish(shelf, b"1")

    assert raised.value.maybe_published


def change(delivery: Delivery, state: State, result: bytes | None = None) -> Change:
    envelope = delivery.envelope
    return Change(
        job_id=envelope.job_id,
        publish=1,
        queue=envelope.queue,
        job=envelope.job,
        state=state,
        passes=0,
        attempt=1,
        keep_s=60.0,
        at_ms=1,
        result=result,
    )


async def ending(shelf: Shelf, *states: State) -> list[Claimed]:
    """Return a delivery for each state, which its settlement is to enter."""
    await asyncio.gather(*(publish(shelf, b"%d" % number) for number in range(len(states))))
    _, sink = await consume(shelf)
    deliveries = [each for each in await sink.take(len(states)) if isinstance(each, Claimed)]
    for each, state in zip(deliveries, states, strict=True):
        each.changes = (change(each, state),)
    return deliveries


def heard(changes: Sequence[Change | Progress]) -> list[State]:
    return [each.state for each in changes if isinstance(each, Change)]


async def test_what_a_settlement_enters_is_in_its_transaction(shelf: Shelf) -> None:
    """A worker that dies between the two would leave a dead letter whose job runs, to all who ask; or a job that is done runs again."""
    done, again, buried = await ending(shelf, "done", "retrying", "failed")
    shelf.fault = lambda _: Locked("somebody copies it")
    done.done()
    rest = asyncio.gather(
        again.again(timed(again.envelope, soon())), buried.bury(timed(buried.envelope, soon())), return_exceptions=True
    )
    await until(lambda: shelf.turns.publishing.name == "blocked")
    before = (len(shelf.rows), [*shelf.letters], [*shelf.changes])
    commits = len(shelf.commits)
    shelf.fault = lambda _: None

    assert await rest == [True, True]
    await until(lambda: shelf.commits[commits:])
    assert before == (3, [], [])
    assert (shelf.commits[commits], sorted(heard(shelf.changes)), len(shelf.letters)) == (
        3,
        ["done", "failed", "retrying"],
        1,
    )
    assert shelf.missed == []


async def test_a_settlement_that_enters_nothing_is_no_write(shelf: Shelf) -> None:
    """Each job of a class without `keep` would pay for the results of others."""
    writes: list[int] = []
    deliveries = await ending(shelf, "done", "done", "done")
    shelf.fault = lambda turn: writes.append(len(turn.writes))
    for each in deliveries:
        each.changes = ()
        each.done()
    await until(lambda: not shelf.rows)

    assert (set(writes), shelf.changes) == ({0}, [])


async def test_an_end_that_the_store_refuses_costs_no_other_and_no_acknowledgement(shelf: Shelf) -> None:
    """One bad text in a result would hold up every settlement of its worker, for ever."""

    def bad(turn: Turn) -> Exception | None:
        entered = [each for write in turn.writes if isinstance(write, End) for each in write.changes]
        return ValueError("a bad text") if "aborted" in heard(entered) else None

    deliveries = await ending(shelf, "done", "aborted", "expired")
    shelf.fault = bad
    for each in deliveries:
        each.done()
    await until(lambda: not shelf.rows)

    assert (sorted(heard(shelf.changes)), heard(shelf.missed)) == (["done", "expired"], ["aborted"])


async def test_an_end_whose_lease_was_lost_is_handed_over(shelf: Shelf) -> None:
    """The job is delivered again and acknowledged by the worker that ran it, and would run for ever, to all who ask."""
    before, after = await ending(shelf, "done", "expired")
    shelf.workers.clear()  # what another worker does to one that it takes for dead
    shelf.claims.clear()
    before.done()
    await until(lambda: shelf.missed)
    assert not after.live
    after.done()
    await until(lambda: len(shelf.missed) > 1)

    assert (heard(shelf.missed), shelf.changes) == (["done", "expired"], [])


async def test_an_end_in_doubt_is_handed_over(shelf: Shelf) -> None:
    """Was the transaction rolled back, nobody would hear of the end: the redelivery is only acknowledged."""
    [delivery] = await ending(shelf, "done")
    shelf.fault = lambda _: Doubtful("cut during the commit")
    delivery.done()
    await until(lambda: shelf.missed)
    shelf.fault = lambda _: None
    await until(lambda: not shelf.rows)

    assert (heard(shelf.missed), shelf.changes) == (["done"], [])


async def test_large_results_are_committed_some_at_a_time(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand results of 1 MiB would make a transaction that outlasts the worker's lease."""
    monkeypatch.setattr("leveret.brokers.turns.turns.BATCH_BYTES", 1000)
    deliveries = await ending(shelf, "done", "done", "done")
    commits = len(shelf.commits)
    for each in deliveries:
        each.changes = (change(each, "done", b"x" * 600),)
        each.done()
    await until(lambda: not shelf.rows)

    assert shelf.commits[commits : commits + 3] == [1, 1, 1]


async def test_large_bodies_are_committed_some_at_a_time(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand bodies of 15 MiB in one transaction would be 15 GiB of log; one that is larger than all must still go."""
    monkeypatch.setattr("leveret.brokers.turns.turns.BATCH_BYTES", 1000)
    sizes = [400, 400, 400, 3000, 100]

    await asyncio.gather(*(publish(shelf, b"x" * size) for size in sizes))

    assert [len(body) for body in shelf.bodies] == sizes
    assert shelf.commits == [2, 1, 1, 1]


async def test_a_window_is_never_exceeded_and_filled_again(shelf: Shelf) -> None:
    """Beyond its window a worker would hold what others could run; a place that isn't freed would starve it for good."""
    await asyncio.gather(*(publish(shelf, b"%d" % number) for number in range(6)))
    _, sink = await consume(shelf, prefetch=2)
    done, back = await sink.take(2)
    assert sink.waiting == 0

    done.done()
    back.give_back()
    third, fourth = await sink.take(2)
    assert await third.bury(timed(third.envelope, soon()))
    assert await fourth.again(timed(fourth.envelope, soon()))
    await sink.take(2)

    await asyncio.sleep(0.05)
    assert sink.waiting == 0
    assert (len(shelf.claims), len(shelf.letters), len(shelf.rows)) == (2, 1, 4)


async def test_who_lost_the_lease_settles_nothing(shelf: Shelf) -> None:
    """Another worker runs the job by then: a delete would lose it if that worker dies."""
    await asyncio.gather(publish(shelf, b"1"), publish(shelf, b"2"))
    _, sink = await consume(shelf)
    finished, running = await sink.take(2)
    shelf.workers.clear()  # what another worker does to one that it takes for dead
    shelf.claims.clear()
    finished.done()

    again = await sink.take(2)

    assert not await running.again(timed(running.envelope, soon()))
    assert ([each.live for each in (finished, running, *again)], sink.losses) == ([False, False, True, True], 1)
    assert shelf.bodies == [b"1", b"2"]


async def test_a_store_that_cannot_be_used_fails_everything_once(shelf: Shelf) -> None:
    """A worker must end and say why; a publisher handles the errors of publishes only."""
    consumption, sink = await consume(shelf)
    shelf.fault = lambda _: ConfigurationError("another program's tables")

    with pytest.raises(BrokerUnavailable, match="another program's tables") as refused:
        await publish(shelf, b"1")
    with pytest.raises(ConfigurationError, match="another program's tables"):
        await asyncio.wait_for(consumption.failed(), PATIENCE_S)

    assert isinstance(refused.value.__cause__, ConfigurationError)
    assert (sink.losses, ready(consumption)) == (1, False)


async def test_closing_writes_what_is_left_and_then_refuses(shelf: Shelf) -> None:
    """A finished job that isn't deleted runs again; a publish after the close must not hang."""
    await publish(shelf, b"1")
    _, sink = await consume(shelf)
    delivery = await sink.next()
    delivery.done()

    await shelf.turns.close()
    with pytest.raises(BrokerUnavailable, match="the broker is closed"):
        await publish(shelf, b"2")

    assert (shelf.rows, delivery.live, shelf.turns.publishing.name) == ({}, False, "closed")


async def test_closing_without_work_does_not_wait_for_a_store_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A web service, or a command, would need seconds to end during an outage, for nothing."""
    monkeypatch.setattr(turns, "CLOSE_S", 1000.0)
    shelf = Shelf(
        Runtime(app="unit", clock=ManualClock(), settings=Settings(reconnect_base_s=1e6, reconnect_cap_s=1e6))
    )
    shelf.fault = lambda _: Away("nobody answers")
    with pytest.raises(PublishTimeout, match="nobody answers"):
        await publish(shelf, b"1", time.monotonic() + 0.1)

    await asyncio.wait_for(shelf.turns.close(), PATIENCE_S)


@pytest.mark.parametrize("was_there", [True, False])
async def test_a_worker_without_jobs_does_not_wait_for_a_store_that_is_away(
    monkeypatch: pytest.MonkeyPatch, was_there: bool
) -> None:
    """Each deploy during an outage would take 10 s, and be cut off by whoever gives no more."""
    monkeypatch.setattr(turns, "CLOSE_S", 1000.0)
    shelf = Shelf(
        Runtime(app="unit", clock=ManualClock(), settings=Settings(reconnect_base_s=1e6, reconnect_cap_s=1e6))
    )
    if was_there:
        consumption, _ = await consume(shelf)
        shelf.fault = lambda _: Away("nobody answers")
        with pytest.raises(PublishTimeout, match="nobody answers"):
            await publish(shelf, b"1", time.monotonic() + 0.1)
    else:
        shelf.fault = lambda _: Away("nobody answers")
        consumption, _ = await consume(shelf)

    async with asyncio.timeout(PATIENCE_S):
        await consumption.close()
        await shelf.turns.close()


async def test_a_store_without_work_waits_for_ever(shelf: Shelf) -> None:
    """A web service that publishes now and then would wake up 40 times a second for nothing."""
    await publish(shelf, b"1")
    idle = shelf.turns.patience(0.025)
    consumption, sink = await consume(shelf)
    await sink.next()
    taking = shelf.turns.patience(0.025)
    await consumption.stop_taking()
    stopping = shelf.turns.patience(0.025)

    assert (idle, taking) == (None, 0.025)
    assert stopping is not None  # the next beat: what it holds must stay its own
    assert stopping > 1


async def test_any_statements_of_a_store_run_in_a_turn(shelf: Shelf) -> None:
    """What a store's admin does must see what was published before it."""
    publishing = publish(shelf, b"1")
    await asyncio.sleep(0)

    assert await shelf.turns.run(Run(about="the count", call=lambda store: len(store.rows))) == 1
    await publishing


def test_a_claimed_row_counts_crashes_and_deliveries() -> None:
    """Without them a job that kills its worker kills every worker."""
    envelope = make_envelope(QUEUE, b"1")
    turns = Turns("the shelf", Runtime(app="unit"), log, Shelf(Runtime(app="unit")))
    window = Window(QUEUE, "normal", 1, turns)
    row = pack(QUEUE.name, envelope, None)

    claimed = Claimed(window, Taker([window]).lease, (7, 2, 3, *row[:2], *row[3:]))

    assert (claimed.seq, claimed.redelivered) == (7, True)
    assert claimed.envelope == msgspec.structs.replace(envelope, crashes=3)
