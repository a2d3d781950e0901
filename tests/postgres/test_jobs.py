"""The job store in a PostgreSQL, beyond what every store promises."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
import pytest_asyncio

from leveret.brokers.postgresql import open_store
from leveret.errors import ConfigurationError, StoreUnavailable
from leveret.runtime import Runtime
from leveret.settings import Settings
from leveret.store import Change, Progress, Store
from tests.cli.command import Project
from tests.conftest import StartPostgres
from tests.contract.store.changes import Publish
from tests.contract.store.ends import PATIENCE_S, Ends, answered
from tests.postgres.node import Postgres, migrate

RUNTIME = Runtime(app="shop")


@pytest_asyncio.fixture
async def url(postgres: Postgres) -> AsyncGenerator[str]:
    """A database with leveret's schema."""
    async with postgres.database() as made:
        await migrate(made)
        yield made


@pytest_asyncio.fixture
async def store(url: str) -> AsyncGenerator[Store]:
    """A store in that database."""
    opened = open_store(url, RUNTIME)
    yield opened
    await opened.close()


async def test_only_ends_that_somebody_waits_for_are_told(postgres: Postgres, url: str, store: Store) -> None:
    """Each commit that tells takes a lock of the whole cluster: a store of a thousand ends a second would stop all else."""
    spy = (
        "CREATE OR REPLACE FUNCTION leveret.tell_ended(channel text, publishes bigint[]) RETURNS void LANGUAGE sql"
        " AS 'INSERT INTO public.told VALUES (channel, publishes)'"
    )
    await postgres.query("CREATE TABLE told (channel text, publishes bigint[])", url=url)
    await postgres.query(spy, url=url)
    awaited, others = Publish(), [Publish() for _ in range(50)]
    await store.write([one.is_("running") for one in (awaited, *others)])
    waiter = open_store(url, RUNTIME)
    waiter.watch(lambda _: None)
    await waiter.ended([awaited.key])

    await store.write([one.is_("done") for one in (*others, awaited)])
    await store.write([one.is_("running", passes=1) for one in others])
    await waiter.close()

    told = await postgres.query("SELECT publishes FROM told", url=url)
    assert [list(row[0]) for row in told] == [[awaited.key.publish]]


async def test_ids_come_back_whatever_is_in_them(store: Store) -> None:
    """Another program chooses them: one with a quotation mark would keep a whole batch of states from the store."""
    ids = ['"', "\\", '\\"', "{a,b}", "NULL", "a b\n", "ü", '","']
    changes = [Publish(job_id).is_("done", result=job_id.encode()) for job_id in ids]

    await store.write(changes)
    await store.write([Publish('"\\').is_("queued")])
    found = await store.read([change.key for change in changes])

    assert [record and (record.job_id, record.result) for record in found] == [(each, each.encode()) for each in ids]


async def test_many_ends_at_once_are_told_too(store: Store, url: str) -> None:
    """A notice holds 8000 bytes: the transaction that ends more jobs would fail, and with it each later one."""
    publishes = [Publish() for _ in range(1000)]
    await store.write([one.is_("running") for one in publishes])
    waiter, ends = open_store(url, RUNTIME), Ends()
    waiter.watch(ends)
    keys = [one.key for one in publishes]
    await waiter.ended(keys)

    await store.write([one.is_("done") for one in publishes])

    await ends.has(set(keys))
    await waiter.close()


async def test_a_lost_connection_is_replaced_and_ends_are_told_again(
    postgres: Postgres, url: str, store: Store
) -> None:
    """A fail-over ends all results until each process is started anew."""
    publish, ends = Publish(), Ends()
    waiter = open_store(url, RUNTIME)
    waiter.watch(ends)
    await store.write([publish.is_("running")])
    await waiter.ended([publish.key])

    await postgres.query(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
        url=url,
    )
    await answered(lambda: store.read([publish.key]))
    await answered(lambda: waiter.ended([publish.key]))
    await store.write([publish.is_("done")])

    await ends.has({publish.key})
    await waiter.close()


async def test_no_call_of_a_worker_or_waiter_reads_the_whole_table(postgres: Postgres, url: str, store: Store) -> None:
    """The statistics of such a table are always wrong: one plan that scans it, and each start takes a second."""
    publishes = [Publish() for _ in range(3000)]
    keys = [one.key for one in publishes]
    await store.write([one.is_("queued") for one in publishes])
    store.watch(lambda _: None)
    for _ in range(8):  # from the sixth call on a plan may be kept
        await store.begin([one.is_("running") for one in publishes[:200]])
        await store.write([one.at(0.5) for one in publishes[:200]])
        await store.ended(keys)
        await store.asked(keys[:200])
        await store.abort(keys[0])
        await store.newest([keys[0].job_id, "unknown"])
        await store.trim(100)
        await store.drop(keys[-1:])
    await store.close()

    scans = "SELECT seq_scan, idx_scan, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'records'"
    async with asyncio.timeout(PATIENCE_S):  # a backend that ends has its counts counted
        while not (row := (await postgres.query(scans, url=url))[0])["idx_scan"]:
            await asyncio.sleep(0.02)
    assert row["seq_scan"] <= 3  # one for each index that the migration made
    by_age = "SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = 'records_seq'"
    assert (await postgres.query(by_age, url=url))[0]["idx_tup_read"] == 0  # it has every record


def ends_after_progress(publishes: Sequence[Publish]) -> list[Change | Progress]:
    """Return ends, of which some bring their last progress, as in a worker's turn."""
    ends = [((one.at(1.0),) if place % 2 == 0 else ()) + (one.is_("done"),) for place, one in enumerate(publishes)]
    return [each for end in reversed(ends) for each in end]


def ends_beside_progress(publishes: Sequence[Publish]) -> list[Change | Progress]:
    """Return ends, and progress of other jobs, as a worker writes them twice a second."""
    return [one.at(0.5) if place % 2 == 0 else one.is_("done") for place, one in enumerate(publishes)]


def progress_beside_ends(publishes: Sequence[Publish]) -> list[Change | Progress]:
    """Return the same with an end as the first."""
    return [one.at(0.5) if place % 2 else one.is_("done") for place, one in enumerate(publishes)]


@pytest.mark.parametrize("changes_of", [ends_after_progress, ends_beside_progress, progress_beside_ends])
async def test_records_are_locked_in_the_order_of_their_keys(
    changes_of: Callable[[Sequence[Publish]], list[Change | Progress]], postgres: Postgres, url: str, store: Store
) -> None:
    """A worker's turn and a publisher's late `queued` would each wait for a record of the other's, until the server ends one of them."""
    publishes = sorted((Publish() for _ in range(8)), key=lambda one: one.key)
    await store.write([one.is_("running") for one in publishes])
    holder = await asyncpg.connect(url)
    async with holder.transaction():
        await holder.execute("SELECT 1 FROM leveret.records WHERE job_id = $1 FOR UPDATE", publishes[0].key.job_id)

        writing = asyncio.create_task(store.write(changes_of(publishes)))
        waits = f"SELECT 1 FROM pg_stat_activity WHERE {holder.get_server_pid()} = ANY (pg_blocking_pids(pid))"
        async with asyncio.timeout(PATIENCE_S):
            while not await postgres.query(waits, url=url):
                await asyncio.sleep(0.005)
        free = await postgres.query("SELECT job_id FROM leveret.records FOR UPDATE SKIP LOCKED", url=url)
    await writing
    await holder.close()

    assert {row[0] for row in free} == {one.key.job_id for one in publishes[1:]}


async def test_an_end_with_progress_is_entered_without_an_earlier_record(store: Store) -> None:
    """A job whose start the store missed would stay at the change that only locks its record, and its result would be lost."""
    first, other = Publish(), Publish()
    end = first.is_("done", passes=2, attempt=3, result=b"7", body=b"{}")

    await store.write([other.is_("running"), first.at(1.0, passes=2, attempt=3), end])
    found = await store.read([first.key, other.key])

    record, beside = found
    assert record is not None
    assert (record.state, record.passes, record.attempt, record.result, record.body) == ("done", 2, 3, b"7", b"{}")
    assert (record.created_ms, record.started_ms, record.progress) == (end.at_ms, None, None)
    assert beside is not None
    assert beside.state == "running"


async def test_a_start_touches_no_index(postgres: Postgres, url: str, store: Store) -> None:
    """Each state of a job would write to three indexes, and leave entries there that a vacuum must find."""
    publishes = [Publish() for _ in range(300)]
    await store.write([one.is_("queued") for one in publishes])
    await store.begin([one.is_("running") for one in publishes])
    await store.close()

    counts = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'records'"
    async with asyncio.timeout(PATIENCE_S):
        while (row := (await postgres.query(counts, url=url))[0])["n_tup_upd"] < len(publishes):
            await asyncio.sleep(0.02)
    assert row["n_tup_hot_upd"] >= 0.8 * row["n_tup_upd"]


async def test_migrate_covers_the_store(tmp_path: Path, postgres: Postgres) -> None:
    """A deployment would go through, and the first job with a result would wait for its store."""
    project = Project(tmp_path)

    async def leveret(*arguments: str, url: str) -> tuple[int, str]:
        ran = await asyncio.to_thread(project.run, *arguments, LEVERET_STORE=url)
        return ran.code, ran.out + ran.err

    async with postgres.database() as url:
        listed = await leveret("jobs", "list", url=url)
        behind = await leveret("migrate", "--check", url=url)
        done = await leveret("migrate", url=url)
        again = await leveret("migrate", "--check", url=url)
        empty = await leveret("jobs", "list", url=url)

    assert listed[0] == 2
    assert "run `leveret migrate`" in listed[1]
    assert behind[0] == 2
    assert "the store" in behind[1]
    assert "0003_records" in behind[1]
    assert done[0] == 0
    assert "applied 0003_records" in done[1]
    assert again[0] == 0
    assert empty[0] == 0
    assert "no jobs in postgresql://" in empty[1]


async def test_what_waiting_will_not_mend_is_said_at_once_without_the_password(postgres: Postgres, url: str) -> None:
    """A worker tries for ever, or its log shows the password."""
    password = str(urlsplit(url).password)
    for case, why in (
        (url.replace(password, password[::-1]), "password authentication failed"),
        (f"{url}?schema=elsewhere", "run `leveret migrate`"),
    ):
        store = open_store(case, RUNTIME)
        with pytest.raises(ConfigurationError, match=why) as refused:
            await store.write([Publish().is_("queued")])
        await store.close()
        assert password not in f"{refused.value}{store.what}"
        assert password[::-1] not in f"{refused.value}{store.what}"


@pytest.mark.fault
@pytest.mark.timeout(120)
async def test_a_server_that_is_killed_is_said_to_be_away_and_keeps_the_records(
    postgres_node: StartPostgres,
) -> None:
    """A result that was acknowledged is gone, or no result comes any more after the server is back."""
    node = await postgres_node()
    async with node.database() as url:
        await migrate(url)
        store = open_store(url, Runtime(app="shop", settings=Settings(connect_timeout_s=5.0)))
        publish = Publish()
        await store.write([publish.is_("done", result=b"1")])

        await node.kill9()
        with pytest.raises(StoreUnavailable):
            await store.read([publish.key])
        await node.start()

        (record,) = await answered(lambda: store.read([publish.key]))
        assert record is not None
        assert record.result == b"1"
        await store.close()
