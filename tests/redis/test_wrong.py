"""What a program says that can't use its Redis: one line, without the password, and it ends."""

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme

from leveret.brokers.redis import open_admin
from leveret.errors import ConfigurationError
from leveret.runtime import Runtime
from tests.cli.command import Project, Ran
from tests.conftest import StartRedis
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
    ):
        ran = await says(project, url, password)

        assert ran.code == 2, ran
        assert why in ran.line, ran


async def test_a_server_that_is_too_old_for_a_greeting_is_called_too_old() -> None:
    """An unknown command says nothing of the version that is needed."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            writer.write(b"-ERR unknown command `HELLO`, with args beginning with: `3`, \r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as old:
        admin = open_admin(f"redis://127.0.0.1:{old.sockets[0].getsockname()[1]}", Runtime(app="tests"))
        with pytest.raises(ConfigurationError, match=r"leveret needs Redis 7\.0 or later"):
            await admin.notes()
        await admin.close()


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
