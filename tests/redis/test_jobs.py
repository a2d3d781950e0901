"""The job store in a Redis, beyond what every store promises."""

import asyncio
import re
import secrets
import time
from collections.abc import AsyncGenerator
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from leveret import App, Attempt, Job, Keep, Queue
from leveret.brokers.redis import open_store
from leveret.cli.description import describe
from leveret.consuming.worker import working
from leveret.errors import ConfigurationError, StoreUnavailable
from leveret.ids import new_job_id
from leveret.runtime import Runtime
from leveret.settings import Settings
from leveret.store import Record, Store
from tests.cli.command import Project, Ran
from tests.conftest import StartRedis
from tests.contract.store.changes import Publish
from tests.contract.store.ends import PATIENCE_S, Ends, answered
from tests.rabbit.node import Rabbit
from tests.redis.node import Cluster, Server

RUNTIME = Runtime(app="shop")
HURRIED = Runtime(app="shop", settings=Settings(connect_timeout_s=1.0))
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture
def prefix() -> str:
    """What the keys of the test begin with."""
    return f"t{secrets.token_hex(6)}"


@pytest.fixture
def url(redis: Server, prefix: str) -> str:
    """The shared server, and records of the test alone."""
    return f"{redis.url}?prefix={prefix}"


@pytest_asyncio.fixture
async def store(url: str) -> AsyncGenerator[Store]:
    """A store there."""
    opened = open_store(url, RUNTIME)
    yield opened
    await opened.close()


async def calls_of(server: Server, command: str) -> int:
    """Return how often the server has executed a command."""
    counts = (await server.info("commandstats")).get(f"cmdstat_{command}")
    return 0 if counts is None else int(counts["calls"])


async def read(store: Store, publish: Publish) -> Record:
    """Return the record of a publish that has one."""
    (record,) = await store.read([publish.key])
    assert record is not None
    return record


async def test_only_ends_that_somebody_waits_for_are_told(redis: Server, url: str, store: Store) -> None:
    """A notice for each end costs a server that nobody listens to, and on a cluster every node."""
    awaited, others = Publish(), [Publish() for _ in range(50)]
    await store.write([one.is_("running") for one in (awaited, *others)])
    waiter, ends = open_store(url, RUNTIME), Ends()
    waiter.watch(ends)
    await waiter.ended([awaited.key])
    before = await calls_of(redis, "spublish")

    await store.write([one.is_("done") for one in (*others, awaited)])
    await store.write([one.is_("done", passes=1) for one in (*others, awaited)])
    await ends.has({awaited.key})
    await waiter.close()

    assert await calls_of(redis, "spublish") == before + 1
    assert ends.keys == {awaited.key}


async def test_many_ends_at_once_are_told(store: Store, url: str) -> None:
    """A process that awaits a thousand jobs learns of their ends one poll later."""
    publishes = [Publish() for _ in range(2500)]
    await store.write([one.is_("running") for one in publishes])
    waiter, ends = open_store(url, RUNTIME), Ends()
    waiter.watch(ends)
    keys = [one.key for one in publishes]
    await waiter.ended(keys)

    await store.write([one.is_("done") for one in publishes])

    await ends.has(set(keys))
    await waiter.close()


async def test_a_record_keeps_the_last_eight_who_wait(redis: Server, prefix: str, url: str, store: Store) -> None:
    """A status page that each visitor's process polls makes the record grow for ever."""
    publish = Publish()
    await store.write([publish.is_("running", body=b"body")])
    alone = await redis.command("STRLEN", f"{prefix}:{{jobs:0}}:r:{publish.key.job_id}")
    told, waiters = [Ends() for _ in range(10)], [open_store(url, RUNTIME) for _ in range(10)]
    for waiter, ends in zip(waiters, told, strict=True):
        waiter.watch(ends)
        for _ in range(2):
            await waiter.ended([publish.key])
    assert await redis.command("STRLEN", f"{prefix}:{{jobs:0}}:r:{publish.key.job_id}") == alone + 8 * 16

    await store.write([publish.is_("done")])

    for ends in told[2:]:
        await ends.has({publish.key})
    assert (await read(store, publish)).body == b"body"
    assert [ends.keys for ends in told[:2]] == [set(), set()]
    await asyncio.gather(*(waiter.close() for waiter in waiters))


async def test_a_lost_connection_is_replaced_and_ends_are_told_again(redis_node: StartRedis) -> None:
    """A fail-over ends all results until each process is started anew."""
    node = await redis_node()
    publish, ends = Publish(), Ends()
    store, waiter = open_store(node.url, RUNTIME), open_store(node.url, RUNTIME)
    waiter.watch(ends)
    await store.write([publish.is_("running")])
    await waiter.ended([publish.key])

    await node.disconnect()
    await answered(lambda: store.read([publish.key]))
    await answered(lambda: waiter.ended([publish.key]))
    await store.write([publish.is_("done")])

    await ends.has({publish.key})
    await asyncio.gather(store.close(), waiter.close())


async def test_who_may_not_listen_or_tell_finds_ends_by_asking(redis: Server, prefix: str, store: Store) -> None:
    """A hosted server without rights on channels gives no results at all."""
    publish = Publish()
    await store.write([publish.is_("running")])
    async with redis.user("~*", "resetchannels", "+@all") as login:
        waiter = open_store(f"{login}?prefix={prefix}", RUNTIME)
        waiter.watch(Ends())

        assert list(await answered(lambda: waiter.ended([publish.key]))) == []
        store.watch(Ends())
        await store.ended([publish.key])
        await waiter.write([publish.is_("done")])
        assert [record.key for record in await answered(lambda: waiter.ended([publish.key]))] == [publish.key]
        await waiter.close()


async def test_the_rights_that_the_docs_name_suffice(
    redis: Server, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A store with a user for itself refuses some of the calls, or warns of what nobody could check."""
    rules = re.findall(r"ACL SETUSER shop_store on >password (.*)", OPERATIONS.read_text())
    publish, ends = Publish(), Ends()
    async with redis.user(*(rule.replace("lv:", f"{prefix}:") for rule in rules[0].split())) as login:
        store = open_store(f"{login}?prefix={prefix}", RUNTIME)
        store.watch(ends)
        await store.write([publish.is_("queued")])
        await store.begin([publish.is_("running")])
        await store.ended([publish.key])
        assert await store.abort(publish.key) == "asked"
        assert list(await store.asked([publish.key])) == [publish.key]
        await store.write([publish.at(0.5), publish.is_("done")])
        await ends.has({publish.key})
        assert len(await store.list(limit=2)) == len(await store.find(publish.key.job_id)) == 1
        assert (await store.trim(10), await store.drop([publish.key])) == (0, 1)
        await store.close()

    assert caplog.messages == []


async def entries(server: Server, prefix: str) -> int:
    """Return how many entries the store's order has."""
    count: int = await server.command("ZCARD", f"{prefix}:{{jobs:0}}:order")
    return count


async def test_who_writes_deletes_what_points_to_expired_records(redis: Server, prefix: str, store: Store) -> None:
    """Redis deletes records by itself, but not the entries of lists: after a week the server is full of them."""
    for _ in range(40):
        publishes = [Publish(keep_s=0.001) for _ in range(25)]
        await store.write([one.is_("queued") for one in (*publishes, Publish(publishes[0].key.job_id, keep_s=0.001))])
        await asyncio.sleep(0.002)

    assert await entries(redis, prefix) <= 260


async def test_trim_deletes_what_points_to_expired_records(redis: Server, prefix: str, store: Store) -> None:
    """What the last jobs of a day leave stays until the next ones come."""
    stays = Publish()
    gone = [Publish(keep_s=0.001) for _ in range(3000)]
    twins = [Publish(one.key.job_id, keep_s=0.001) for one in gone[:10]]
    await store.write([stays.is_("queued"), *(one.is_("queued") for one in (*gone, *twins))])
    async with asyncio.timeout(PATIENCE_S):
        while await entries(redis, prefix) > 1:
            assert await store.trim(500) == 0

    assert [record.key for record in await store.list(limit=9)] == [stays.key]
    left = await redis.command("KEYS", f"{prefix}:*")
    assert {key.rpartition("}:")[2][:2] for key in left} <= {"r:", "or", "co", "sw"}


async def test_the_publishes_of_an_id_live_and_end_on_their_own(store: Store) -> None:
    """An id that is published again while its first publish is known loses one of the two, or `newest` says the old one."""
    job_id = new_job_id()
    first, second, third = Publish(job_id, keep_s=0.05), Publish(job_id), Publish(job_id)
    await store.write([first.is_("queued"), second.is_("queued", body=b"second")])
    async with asyncio.timeout(PATIENCE_S):
        while (await store.read([first.key]))[0] is not None:
            await asyncio.sleep(0.01)
    assert await store.newest([job_id]) == [second.key]

    await store.write([third.is_("running"), second.is_("running"), second.is_("done", result=b"2")])

    assert await store.newest([job_id]) == [third.key]
    assert [(one.key, one.state) for one in await store.find(job_id)] == [(third.key, "running"), (second.key, "done")]
    record = await read(store, second)
    assert (record.body, record.result) == (b"second", b"2")
    assert await store.drop([third.key]) == 1
    assert await store.newest([job_id]) == [second.key]


async def test_no_answer_is_larger_than_some_megabytes(redis: Server, store: Store) -> None:
    """The answer to who awaits a thousand large results fills the server's memory, and every write is refused."""
    publishes = [Publish() for _ in range(12)]
    for one in publishes:
        await store.write([one.is_("done", result=secrets.token_bytes(1 << 20))])
    before = await calls_of(redis, "evalsha")

    found = await store.read([one.key for one in publishes])

    assert [len(record.result or b"") for record in found if record is not None] == [1 << 20] * 12
    assert await calls_of(redis, "evalsha") >= before + 3


@pytest.mark.parametrize(
    "spoil",
    [("RPUSH", "theirs"), ("SET", "its number"), ("SETRANGE", 82, "theirs")],  # behind the head of 82 bytes
    ids=["another type", "a short text", "a text that is none of ours"],
)
async def test_a_record_that_cannot_be_read_hides_no_other(
    spoil: tuple[str | int, ...], redis: Server, prefix: str, store: Store
) -> None:
    """One key that somebody else wrote would end each wait that is asked for with it, and `leveret jobs list`."""
    spoiled, good = Publish(), Publish()
    await store.write([spoiled.is_("running"), good.is_("running")])
    verb, *rest = spoil
    name = f"{prefix}:{{jobs:0}}:r:{spoiled.key.job_id}"
    if verb != "SETRANGE":
        await redis.command("DEL", name)
    number = spoiled.key.publish.to_bytes(8, "big", signed=True)
    await redis.command(verb, name, *(number if word == "its number" else word for word in rest))

    assert [record and record.key for record in await store.read([spoiled.key, good.key])] == [None, good.key]
    assert [record.key for record in await store.list(limit=9)] == [good.key]
    assert [record.key for record in await store.list(queue=(await read(store, good)).queue, limit=9)] == [good.key]
    assert list(await store.asked([spoiled.key, good.key])) == []
    assert list(await store.begin([good.is_("running"), spoiled.is_("running")])) == ["go", "go"]
    await store.write([spoiled.is_("done", result=b"1"), good.is_("done")])

    assert {record.key for record in await store.ended([spoiled.key, good.key])} == {spoiled.key, good.key}
    assert (await read(store, spoiled)).result == b"1"


async def test_a_full_server_takes_no_states_and_still_answers(redis_node: StartRedis) -> None:
    """A store that is full can't even be emptied, or says nothing of it."""
    node = await redis_node()
    store = open_store(node.url, RUNTIME)
    queued, running, done = Publish(), Publish(), Publish()
    await store.write([queued.is_("queued"), running.is_("running"), done.is_("done", result=b"1")])
    store.watch(Ends())
    await node.configure("maxmemory", 1)

    for call in (store.write([done.is_("done", passes=1)]), store.begin([queued.is_("running")])):
        with pytest.raises(StoreUnavailable, match="OOM"):
            await call
    assert (await read(store, done)).result == b"1"
    assert [record.key for record in await store.ended([done.key, running.key])] == [done.key]
    assert await store.newest([done.key.job_id]) == [done.key]
    assert len(await store.list(limit=9)) == 3
    assert [await store.abort(one.key) for one in (queued, running, done)] == ["aborted", "asked", "finished"]
    assert list(await store.asked([running.key])) == [running.key]
    assert await store.drop([done.key]) == 1
    await node.configure("maxmemory", 0)
    assert list(await store.begin([queued.is_("running"), running.is_("running")])) == ["aborted", "aborted"]
    await store.close()


async def test_a_server_that_hangs_ends_a_call_in_time(redis_node: StartRedis) -> None:
    """A wait for a result outlives its limit, or the store stays away after the trouble is over."""
    node = await redis_node()
    store, hurried, publish = open_store(node.url, RUNTIME), open_store(node.url, HURRIED), Publish()
    await store.write([publish.is_("queued")])
    await answered(lambda: hurried.read([publish.key]))
    node.pause()
    began = time.monotonic()

    with pytest.raises(StoreUnavailable, match="didn't answer within 1 s"):
        await hurried.read([publish.key])

    assert time.monotonic() - began < PATIENCE_S / 2
    node.resume()
    assert (await answered(lambda: hurried.read([publish.key])))[0] is not None
    await asyncio.gather(store.close(), hurried.close())


async def test_what_waiting_will_not_mend_is_said_at_once_without_the_password(redis_node: StartRedis) -> None:
    """A worker tries for ever, records vanish, or a log shows the password."""
    node = await redis_node()
    wrong = node.url.replace(node.password, node.password[::-1])
    for url, why in (
        (wrong, "WRONGPASS"),
        (f"{node.url[:-1]}9999", "DB index"),
        (node.url, "set maxmemory-policy noeviction"),
    ):
        if url == node.url:
            await node.configure("maxmemory-policy", "allkeys-lru")
        store = open_store(url, RUNTIME)
        with pytest.raises(ConfigurationError, match=why) as refused:
            await store.write([Publish().is_("queued")])
        await store.close()
        said = f"{refused.value}{store.what}"
        assert "\n" not in said
        assert node.password not in said
        assert node.password[::-1] not in said


async def test_a_missing_right_is_said_and_is_not_taken_for_a_fault(redis: Server, prefix: str) -> None:
    """A store whose user lacks a right drops one state after the other instead of saying so."""
    async with redis.user("~*", "&*", "+@all", "-zadd") as login:
        store = open_store(f"{login}?prefix={prefix}", RUNTIME)
        with pytest.raises(ConfigurationError, match="job store redis://"):
            await store.write([Publish().is_("queued")])
        await store.close()


async def test_a_server_that_is_killed_is_said_to_be_away_and_keeps_the_records(redis_node: StartRedis) -> None:
    """A result that was acknowledged is gone, or no result comes any more after the server is back."""
    node = await redis_node()
    store, publish = open_store(node.url, RUNTIME), Publish()
    await store.write([publish.is_("done", result=b"1")])
    await node.kill9()
    with pytest.raises(StoreUnavailable):
        await store.read([publish.key])
    await node.start()

    (record,) = await answered(lambda: store.read([publish.key]))

    assert record is not None
    assert record.result == b"1"
    await store.close()


async def test_the_newest_publish_is_known_after_a_fail_over_set_the_count_back(
    redis_cluster: Cluster, prefix: str
) -> None:
    """A handle of an id that was published again shows the publish before, since a promoted replica had counted less."""
    store, job_id = open_store(f"{redis_cluster.url}?prefix={prefix}", RUNTIME), new_job_id()
    first, second = Publish(job_id), Publish(job_id)
    await store.write([first.is_("queued")])
    counter = f"{prefix}:{{jobs:0}}:counted"
    assert int(await (await redis_cluster.owner(counter)).command("GETSET", counter, -1000)) == 1

    await store.write([second.is_("queued")])

    assert await store.newest([job_id]) == [second.key]
    await store.close()


async def test_records_are_found_after_their_slot_has_moved(redis_cluster: Cluster, prefix: str) -> None:
    """A cluster that grows loses the store until each process is started anew."""
    store, waiter, ends = (*(open_store(f"{redis_cluster.url}?prefix={prefix}", RUNTIME) for _ in range(2)), Ends())
    publishes = [Publish() for _ in range(40)]
    await store.write([one.is_("running") for one in publishes])
    waiter.watch(ends)
    await waiter.ended([one.key for one in publishes])
    moved = f"{prefix}:{{jobs:3}}:order"
    there = await redis_cluster.owner(moved)
    await redis_cluster.move(moved, next(node for node in redis_cluster.primaries if node is not there))

    await waiter.ended([one.key for one in publishes])
    await store.write([one.is_("done") for one in publishes])

    assert [record and record.state for record in await store.read([one.key for one in publishes])] == ["done"] * 40
    await ends.has({one.key for one in publishes})
    await redis_cluster.move(moved, there)
    await asyncio.gather(store.close(), waiter.close())


class Add(Job[int], name="redis.add", queue=Queue("sums"), keep=Keep()):
    a: int
    b: int


def app_of(broker: str, store: str | None = None) -> App[None]:
    """Return an app with one handler; its queue is the test's."""
    app: App[None] = App("shop", broker=broker, store=store)

    @app.handler
    async def add(job: Add, attempt: Attempt) -> int:
        attempt.progress(0.5, "half")
        return job.a + job.b

    return app


async def test_a_job_on_rabbitmq_has_its_result_on_redis(rabbit: Rabbit, url: str) -> None:
    """A team with RabbitMQ and Redis, as most have, gets no results."""
    app = app_of(rabbit.url, url)

    async with app.publisher() as publisher, working(app):
        handle = await publisher.publish(Add(a=1, b=2), timeout_s=PATIENCE_S)
        assert await handle.result(timeout_s=PATIENCE_S) == 3
        status = await handle.status()

    assert (status.state, status.progress, status.note) == ("done", 0.5, "half")


async def test_the_store_of_an_app_on_redis_is_its_broker(url: str) -> None:
    """An app with Redis and nothing else has to be told twice where Redis is."""
    app = app_of(url)

    async with app.publisher() as publisher, working(app):
        handle = await publisher.publish(Add(a=2, b=2), timeout_s=PATIENCE_S)
        assert await handle.result(timeout_s=PATIENCE_S) == 4


async def test_the_commands_look_at_a_store_on_redis(tmp_path: Path, redis: Server, url: str, store: Store) -> None:
    """An operator can neither see nor delete what is kept."""
    waits, fails = Publish(queue="emails"), Publish(queue="emails")
    await store.write([waits.is_("queued", body=b'{"order_id":7}'), fails.is_("failed", error="OSError: no paper")])
    project = Project(tmp_path)

    async def leveret(*arguments: str) -> Ran:
        return await asyncio.to_thread(project.run, *arguments, LEVERET_STORE=url)

    listed = await leveret("jobs", "list", "--queue", "emails", "--json")
    shown = await leveret("jobs", "show", fails.key.job_id[:-2])
    aborted = await leveret("jobs", "abort", waits.key.job_id)
    dropped = await leveret("jobs", "drop", "--state", "failed", "--yes")
    described = await describe(app_of("memory://", url), datetime.now(timezone.utc))

    assert [one["id"] for one in listed.json] == [fails.key.job_id, waits.key.job_id]
    assert "OSError: no paper" in shown.out
    assert (aborted.code, (await read(store, waits)).state) == (0, "aborted")
    assert (dropped.code, await store.read([fails.key])) == (0, [None])
    assert described.store == f"redis://127.0.0.1:{urlsplit(redis.url).port}"
    password = urlsplit(redis.url).password
    assert password
    assert password not in "".join(f"{ran}" for ran in (listed, shown, aborted, dropped))
