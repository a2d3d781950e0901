"""What a program says that can't use its Redis: one line, without the password, and it ends."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme

from leveret.brokers.redis import link, open_admin, open_broker
from leveret.brokers.redis.wire import packed_words
from leveret.errors import ConfigurationError
from leveret.job import Queue
from leveret.runtime import Runtime
from tests.cli.command import Project, Ran
from tests.conftest import StartRedis
from tests.contract.harness import make_envelope, soon, timed
from tests.nodes import free_ports
from tests.proxy import FaultProxy
from tests.redis.node import Server


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A folder with an app."""
    return Project(tmp_path)


async def says(project: Project, url: str, *secrets: str) -> Ran:
    """Return what a worker says at this URL."""
    ran = await asyncio.to_thread(project.run, "work", LEVERET_BROKER=url)
    for secret in (str(urlsplit(url).password), *secrets):
        assert secret not in ran.err + ran.out, ran
    return ran


async def test_what_waiting_will_not_mend_ends_a_program_with_one_line(project: Project, redis: Server) -> None:
    """A worker that tried for ever would look healthy, and a publisher would time out without a reason."""
    password = str(urlsplit(redis.url).password)
    host = urlsplit(redis.url).netloc.rpartition("@")[2]
    for url, why in (
        (redis.url.replace(password, password[::-1]), "WRONGPASS"),
        (redis.url.replace(f"default:{password}@", ""), "NOAUTH: the server wants a password"),
        (f"{redis.url}?confrim=fsync", "unknown parameter 'confrim'"),
        (f"{redis.url[:-1]}99", "DB index is out of range"),
        (f"redis+cluster://default:{password}@{host}", "no node of a cluster"),
        (f"redis+sentinel://default:{password}@{host}/mymaster?sentinel_password={password}", f"{host} is no sentinel"),
    ):
        ran = await says(project, url, password)

        assert ran.code == 2, ran
        assert why in ran.line, ran


async def test_a_server_that_is_too_old_for_a_greeting_is_called_too_old() -> None:
    """An unknown command says nothing of the version that is needed."""
    async with answering({"HELLO": b"-ERR unknown command `HELLO`, with args beginning with: `3`, \r\n"}) as port:
        admin = open_admin(f"redis://127.0.0.1:{port}", Runtime(app="tests"))
        with pytest.raises(ConfigurationError, match=r"leveret needs Redis 7\.0 or later"):
            await admin.notes()
        await admin.close()


async def test_a_server_that_greets_in_the_older_protocol_is_called_so() -> None:
    """A proxy between a program and its Redis may know the command and not the protocol: "'list' object has no attribute" helps nobody."""
    async with answering({"HELLO": b"*2\r\n$6\r\nserver\r\n$5\r\nredis\r\n"}) as port:
        admin = open_admin(f"redis://127.0.0.1:{port}", Runtime(app="tests"))
        with pytest.raises(ConfigurationError, match="in an older protocol, as some proxies do"):
            await admin.notes()
        await admin.close()


async def test_a_server_without_tls_is_called_so_at_once(redis: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the rest of a command: a worker with one letter too many in its URL would try for ever."""
    monkeypatch.setattr(link, "_SILENT_S", 0.05)
    password = str(urlsplit(redis.url).password)
    admin = open_admin(redis.url.replace("redis://", "rediss://"), Runtime(app="tests"))
    with pytest.raises(ConfigurationError, match=r"speaks no TLS; begin its URL with redis instead of rediss") as said:
        await admin.notes()
    assert password not in str(said.value)
    await admin.close()


@pytest.mark.fault
async def test_a_server_that_is_slow_with_tls_is_not_taken_for_one_without(
    redis_node: StartRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow link would end workers whose URL is right."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    node = await redis_node(authority=authority)
    monkeypatch.setattr(link, "_SILENT_S", 0.05)
    async with FaultProxy(node.tls_port) as slow:
        slow.latency_s = 0.2
        url = f"{node.tls_url}?ssl_ca_certs={tmp_path}/ca.crt".replace(f":{node.tls_port}", f":{slow.port}")
        admin = open_admin(url, Runtime(app="tests"))
        assert await admin.notes()
        await admin.close()
        assert slow.accepted > 1, "it was asked whether it speaks without"


@pytest.mark.parametrize("lie", ["a dead address", "a replica"])
async def test_one_sentinel_that_is_wrong_holds_nobody_up(lie: str, redis: Server) -> None:
    """A sentinel that the others can't reach names the old primary for hours: who asks it alone stands still as long."""
    host, port = urlsplit(redis.url).hostname, urlsplit(redis.url).port
    assert host is not None
    assert port is not None
    queue = Queue(f"t-{uuid.uuid4().hex[:12]}")
    async with answering({"HELLO": greeting("replica")}) as replica:
        wrong = ("127.0.0.1", free_ports(1)[0] if lie == "a dead address" else replica)
        async with sentinel(*wrong) as one, sentinel(*wrong) as two, sentinel(host, port) as right:
            login = urlsplit(redis.url).netloc.rpartition("@")[0]
            hosts = f"127.0.0.1:{one},127.0.0.1:{two},127.0.0.1:{right}"
            broker = open_broker(f"redis+sentinel://{login}@{hosts}/mymaster", Runtime(app="tests"))
            await broker.publish(queue, timed(make_envelope(queue), soon()))
            await broker.close()


async def test_a_sentinel_at_the_url_of_a_server_is_called_so() -> None:
    """It has no role, and a worker would wait for ever for "a replica" to be promoted."""
    async with answering({"HELLO": greeting("", mode="sentinel")}) as port:
        admin = open_admin(f"redis://127.0.0.1:{port}", Runtime(app="tests"))
        with pytest.raises(ConfigurationError, match=r"is a sentinel; begin its URL with redis\+sentinel://"):
            await admin.notes()
        await admin.close()


def greeting(role: str, mode: str = "standalone") -> bytes:
    """What a server answers to HELLO."""
    said = {"server": "redis", "version": "7.0.0", "mode": mode, "role": role}
    return b"%%%d\r\n" % len(said) + b"".join(packed_words(pair) for pair in said.items())


def sentinel(host: str, port: int) -> AbstractAsyncContextManager[int]:
    """A sentinel that says that this is the primary; its port."""
    return answering({"HELLO": greeting("master"), "SENTINEL": b"*2\r\n" + packed_words((host, port))})


@asynccontextmanager
async def answering(answers: Mapping[str, bytes]) -> AsyncGenerator[int]:
    """A server that answers to commands by their first words; its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while command := await reader.read(4096):
            writer.write(next(text for name, text in answers.items() if name.encode() in command))
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("conf", "query", "why"),
    [
        ({"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}, "", "maxmemory-policy allkeys-lru"),
        ({"appendonly": "no"}, "?confirm=fsync", "writes no append-only file"),
    ],
    ids=["policy", "no file"],
)
async def test_a_server_that_would_lose_jobs_without_a_word_is_refused(
    conf: dict[str, str], query: str, why: str, project: Project, redis_node: StartRedis
) -> None:
    """A cache that drops what it likes looks like a broker until the first busy day."""
    node = await redis_node(conf=conf)

    ran = await says(project, f"{node.url}{query}")

    assert ran.code == 2, ran
    assert why in ran.line, ran


@pytest.mark.fault
async def test_a_certificate_is_checked_and_a_wrong_one_is_one_line(
    project: Project, redis_node: StartRedis, tmp_path: Path
) -> None:
    """Whoever stands between a worker and its server would read all jobs."""
    ours, others = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(tmp_path / "ours.crt")
    others.cert_pem.write_to_path(tmp_path / "others.crt")
    node = await redis_node(authority=ours)

    async def publish(url: str) -> Ran:
        ran = await asyncio.to_thread(project.run, "publish", "shop:Note", "{}", LEVERET_BROKER=url)
        assert node.password not in ran.err
        return ran

    right = await publish(f"{node.tls_url}?ssl_ca_certs={tmp_path}/ours.crt")
    wrong = await publish(f"{node.tls_url}?ssl_ca_certs={tmp_path}/others.crt")
    unnamed = await publish(f"{node.tls_url}?ssl_ca_certs={tmp_path}/nothing.crt")

    assert right.code == 0, right
    assert wrong.code == unnamed.code == 2, (wrong, unnamed)
    assert "certificate verify failed" in wrong.line
    assert "ssl_ca_certs" in unnamed.line
