"""The levers that other tests pull do what they say."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import pytest
import trustme
from redis.exceptions import AuthenticationError, NoPermissionError, ReadOnlyError, ResponseError
from redis.exceptions import ConnectionError as Away

from tests.conftest import StartRedis
from tests.nodes import ours
from tests.proxy import FaultProxy
from tests.redis.node import Cluster, Connection, Found, Node, Sentinels, Server, ask

T = TypeVar("T")
_SOON_S, _SILENCE_S = 30.0, 0.2


async def waits(answer: "asyncio.Future[T]") -> bool:
    """Say whether no answer comes."""
    done, _ = await asyncio.wait([answer], timeout=_SILENCE_S)
    return not done


async def test_a_user_has_the_rights_that_the_test_gave_and_no_more(redis: Server) -> None:
    """Tests of rights and of wrong passwords would pass for the wrong reason."""
    async with redis.user() as url:
        await ask(url, "SET", "lever", "1")
        with pytest.raises(NoPermissionError):
            await ask(url, "CONFIG", "GET", "maxmemory")
        with pytest.raises(AuthenticationError):
            await ask(url.replace("@", "x@"), "PING")

    with pytest.raises(AuthenticationError):
        await ask(url, "PING")
    await redis.command("DEL", "lever")


async def test_a_frozen_link_passes_nothing_until_it_thaws(redis: Server) -> None:
    """Half-open links are tested through this proxy."""
    async with FaultProxy(urlsplit(redis.url).port or 0) as link, Connection(link.url_of(redis.url)) as one:
        await one.command("PING")
        link.freeze("down")
        answer = asyncio.ensure_future(one.command("PING"))
        assert await waits(answer)

        link.thaw()

        assert await answer


async def test_writes_wait_while_they_are_held_and_run_afterwards(redis: Server) -> None:
    """A server that answers reads and no writes is what a publish must be refused by in time."""
    await redis.hold("WRITE")
    write = asyncio.ensure_future(redis.command("SET", "lever", "1"))
    assert await waits(write)
    assert await redis.command("GET", "lever") is None

    await redis.release()

    await write
    assert await redis.command("DEL", "lever") == 1


@pytest.mark.fault
async def test_disconnected_clients_lose_their_connections_and_come_back(redis_node: StartRedis) -> None:
    """What a worker does on a new connection is judged by this: a lever that ended none would prove nothing."""
    node = await redis_node()
    async with Connection(node.url) as one:
        await one.command("PING")
        listener = one.listener()
        await listener.subscribe("news")
        await listener.get_message(timeout=_SOON_S)

        await node.disconnect()

        with pytest.raises(Away):
            await one.command("PING")
        with pytest.raises(Away):
            await listener.get_message(timeout=_SOON_S)
        await listener.aclose()
        await node.command("PING")


@pytest.mark.fault
async def test_a_killed_server_keeps_what_it_answered(redis_node: StartRedis) -> None:
    """Fault tests count what a server owes after kill -9."""
    node = await redis_node(conf={"appendfsync": "always"})
    await node.command("SET", "one", "1")

    await node.kill9()

    assert node.pid is None
    with pytest.raises(Away):
        await node.command("GET", "one")
    await node.start()
    assert await node.command("GET", "one") == "1"


@pytest.mark.fault
async def test_a_server_without_a_file_forgets_all_when_it_stops(redis_node: StartRedis) -> None:
    """Its settings are what the test asked for: a file that was written all the same would hide a loss."""
    node = await redis_node(conf={"appendonly": "no"})
    await node.command("SET", "one", "1")

    await node.stop()
    await node.start()

    assert await node.command("GET", "one") is None


@pytest.mark.fault
async def test_a_paused_server_answers_nobody_until_resumed(redis_node: StartRedis) -> None:
    """A hang is the fault that deadlines are for."""
    node = await redis_node()
    async with Connection(node.url) as one:
        await one.command("PING")
        node.pause()
        answers = [asyncio.ensure_future(one.command("PING")), asyncio.ensure_future(node.command("PING"))]
        for answer in answers:
            assert await waits(answer)

        node.resume()

        await asyncio.gather(*answers)


@pytest.mark.fault
async def test_a_full_server_refuses_writes_until_it_may_have_more(redis_node: StartRedis) -> None:
    """Out of memory is what publishes must be refused by, and settling must survive."""
    node = await redis_node()
    await node.configure("maxmemory", 1)
    with pytest.raises(ResponseError, match="maxmemory"):
        await node.command("SET", "one", "1")

    await node.configure("maxmemory", 0)

    await node.command("SET", "one", "1")


@pytest.mark.fault
async def test_a_replica_refuses_writes_until_it_is_promoted(redis_node: StartRedis) -> None:
    """A fail-over is tested on it: one that took writes before would be two servers, and one that lags must lag."""
    primary = await redis_node()
    await primary.command("SET", "one", "1")
    replica = await primary.replica()
    with pytest.raises(ReadOnlyError):
        await replica.command("SET", "one", "2")
    await replica.detach()
    await primary.command("SET", "other", "1")

    await primary.kill9()
    await replica.promote()

    assert await replica.command("MGET", "one", "other") == ["1", None]
    await replica.command("SET", "one", "2")


@pytest.mark.fault
async def test_only_who_trusts_the_authority_speaks_tls(redis_node: StartRedis, tmp_path: Path) -> None:
    """A port that took anybody's certificate would prove nothing of a client that checks it."""
    ours, others = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(tmp_path / "ours.crt")
    others.cert_pem.write_to_path(tmp_path / "others.crt")
    node = await redis_node(authority=ours)

    await ask(f"{node.tls_url}?ssl_ca_certs={tmp_path}/ours.crt", "PING")

    with pytest.raises(Away, match="certificate verify failed"):
        await ask(f"{node.tls_url}?ssl_ca_certs={tmp_path}/others.crt", "PING")


@pytest.mark.fault
@pytest.mark.parametrize("why", ["the primary is killed", "an administrator says so"])
async def test_sentinels_promote_a_replica(why: str, redis_found: Found) -> None:
    """Teams that have no cluster fail over by sentinels: these must do it without a hand."""
    sentinels = Sentinels(ours(redis_found))
    try:
        await sentinels.start()
        primary = await sentinels.primary()
        await primary.command("SET", "one", "1")
        assert await primary.command("WAIT", 2, 10_000) == 2

        if why == "the primary is killed":
            await primary.kill9()
            replica = await sentinels.promoted(primary)
        else:
            replica = await sentinels.fail_over()

        assert await replica.command("GET", "one") == "1"
        await replica.command("SET", "one", "2")
        assert await sentinels.primary() is replica is not primary
    finally:
        await sentinels.close()


@pytest.mark.fault
async def test_a_clusters_replica_takes_over_and_slots_move(redis_found: Found) -> None:
    """What a client does at MOVED and at a fail-over is tested on it."""
    cluster = Cluster(ours(redis_found), replicas=True)
    try:
        await cluster.start()
        first = await cluster.owner("{emails}")
        await first.command("SET", "{emails}:one", "1")
        second = next(node for node in cluster.primaries if node is not first)
        with pytest.raises(ResponseError, match=str(first.port)):
            await second.command("GET", "{emails}:one")

        await cluster.move("{emails}", second)

        assert await cluster.owner("{emails}") is second
        assert await second.command("GET", "{emails}:one") == "1"
        assert await second.command("WAIT", 1, 10_000) == 1
        await second.kill9()
        await cluster.taken_over(second)
        assert await cluster.replica_of(second).command("GET", "{emails}:one") == "1"
    finally:
        await cluster.close()


_TESTS_THAT_ARE_KILLED = """
import asyncio, sys, time
from tests.redis.node import Node, find_redis
node = Node(find_redis())
asyncio.run(node.start())
if sys.argv[1] == "paused":
    node.pause()
print(node.pid, node.folder, flush=True)
time.sleep(600)
"""


@pytest.mark.fault
@pytest.mark.parametrize("state", ["running", "paused"])
async def test_a_server_ends_with_the_tests_that_are_killed(state: str, redis_found: Found) -> None:
    """A server that nobody ends keeps its memory, its port and its folder until the machine is started again."""
    ours(redis_found)
    tests = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _TESTS_THAT_ARE_KILLED, state, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE
    )
    assert tests.stdout is not None
    pid, folder = (await tests.stdout.readline()).decode().split()

    tests.kill()
    await tests.wait()

    ends = time.monotonic() + _SOON_S
    while _runs(int(pid)):
        assert time.monotonic() < ends
        await asyncio.sleep(0.02)
    shutil.rmtree(folder)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


@pytest.mark.skipif(os.geteuid() != 0, reason="who isn't root starts it as himself")
def test_root_runs_it_as_nobody(redis: Server) -> None:
    """A server that runs scripts as root on a developer's machine is more than a test needs."""
    if not isinstance(redis, Node):
        pytest.skip(redis.why_no_levers)
    assert redis.pid is not None
    assert Path(f"/proc/{redis.pid}").stat().st_uid == 65534
