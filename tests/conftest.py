"""Fixtures of all tests: a real RabbitMQ, a real PostgreSQL and a real Redis, shared or private."""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from typing import Protocol, TypeVar

import pytest
import pytest_asyncio
import trustme
from hypothesis import settings

from tests.nodes import Server, Unavailable, absent, ours
from tests.postgres import node as postgresql
from tests.rabbit.cluster import Cluster
from tests.rabbit.network import NoNetwork
from tests.rabbit.node import Installation, Node, Rabbit, choose, find_rabbit
from tests.rabbit.raw import Raw, connect
from tests.redis import node as redises

# a clock says more of the machine's load than of an example: two processes of tests share it, and whatever else runs
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


# a shell without job control lets what it starts in the background ignore ^C, and so would each command of a test
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class StartNode(Protocol):
    """Starts a private node; `conf`, `advanced` (of its advanced.config) and `plugins` are RabbitMQ's own names."""

    def __call__(
        self,
        *,
        conf: Mapping[str, str] | None = None,
        advanced: Mapping[str, int] | None = None,
        plugins: Sequence[str] = (),
    ) -> Awaitable[Node]: ...


class StartPostgres(Protocol):
    """Starts a private server; `conf` are settings of postgresql.conf, `clock` is what `step_clock` needs."""

    def __call__(
        self, *, conf: Mapping[str, str | int] | None = None, clock: bool = False
    ) -> Awaitable[postgresql.Node]: ...


class StartRedis(Protocol):
    """Starts a private server; `conf` are settings of redis.conf, `authority` gives it a port that speaks TLS."""

    def __call__(
        self, *, conf: redises.Conf | None = None, authority: trustme.CA | None = None
    ) -> Awaitable[redises.Node]: ...


def pytest_report_header() -> list[str]:
    """Name the servers of the tests before the first test that downloads or starts one."""
    return [
        *f"RabbitMQ: {choose().what}".splitlines(),
        *f"PostgreSQL: {postgresql.choose().what}".splitlines(),
        *f"Redis: {redises.choose().what}".splitlines(),
    ]


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses a RabbitMQ as `rabbit`, what uses three nodes of it as `cluster`, and what uses the others as `postgres` and `redis`."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        kinds = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "rabbit_found" in item.fixturenames or {"quorum", "classic"} & {kind for kind in kinds if type(kind) is str}:
            item.add_marker("rabbit")
        if "cluster" in item.fixturenames:
            item.add_marker("cluster")
        if "postgres_found" in item.fixturenames:
            item.add_marker("postgres")
        if "redis_found" in item.fixturenames:
            item.add_marker("redis")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep half a surrogate pair, which some tests have logged, out of the report: xdist sends it as UTF-8, or ends."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


class Startable(Protocol):
    """A server, or a cluster of some."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...


_F = TypeVar("_F")
_S = TypeVar("_S", bound=Startable)


def _found(find: Callable[[], _F]) -> _F:
    try:
        return find()
    except Unavailable as error:
        absent(str(error))


@contextmanager
def _running(server: _S) -> Generator[_S]:
    """Start the server, if it is ours, and end it in the end."""
    try:
        if not (isinstance(server, Server) and server.why_no_levers):
            asyncio.run(server.start())
        yield server
    finally:
        asyncio.run(server.close())


async def _start(node: _S, started: AsyncExitStack) -> _S:
    started.push_async_callback(node.close)
    await node.start()
    return node


@pytest.fixture(scope="session")
def rabbit_found() -> Rabbit | Installation:
    """What there is to run on, looked up once; none fails with CI=true, and otherwise skips and says what would help."""
    return _found(find_rabbit)


@pytest.fixture(scope="session")
def rabbit(rabbit_found: Rabbit | Installation) -> Generator[Rabbit]:
    """The session's broker: shared, so use queue names of your own, and leave it running."""
    with _running(Node(rabbit_found) if isinstance(rabbit_found, Installation) else rabbit_found) as shared:
        yield shared


@pytest_asyncio.fixture
async def rabbit_node(rabbit_found: Rabbit | Installation) -> AsyncGenerator[StartNode]:
    """Start nodes of the test's own, to kill, pause and fill; skips where the broker isn't ours to run."""
    async with AsyncExitStack() as started:

        async def start(
            *,
            conf: Mapping[str, str] | None = None,
            advanced: Mapping[str, int] | None = None,
            plugins: Sequence[str] = (),
        ) -> Node:
            return await _start(Node(ours(rabbit_found), conf=conf, advanced=advanced, plugins=plugins), started)

        yield start


@pytest.fixture(scope="session")
def shared_cluster(rabbit_found: Rabbit | Installation) -> Generator[Cluster]:
    """The session's cluster of three nodes; use `cluster`, which mends what a test leaves broken."""
    try:
        with _running(Cluster(ours(rabbit_found))) as shared:
            yield shared
    except NoNetwork as error:
        if os.geteuid() != 0:
            pytest.skip(str(error))
        absent(str(error))


@pytest_asyncio.fixture
async def cluster(shared_cluster: Cluster) -> AsyncGenerator[Cluster]:
    """Three nodes to kill, hang and cut off, all of them members at the start: shared, so use queue names of your own."""
    await shared_cluster.whole()
    yield shared_cluster
    shared_cluster.calm()


@pytest_asyncio.fixture
async def raw(rabbit: Rabbit) -> AsyncGenerator[Raw]:
    """A plain AMQP connection to the session's broker."""
    async with connect(rabbit.url) as opened:
        yield opened


@pytest.fixture(scope="session")
def postgres_found() -> postgresql.Found:
    """What there is to run on, looked up once; none fails with CI=true, and otherwise skips and says what would help."""
    return _found(postgresql.find_postgres)


@pytest.fixture(scope="session")
def postgres(postgres_found: postgresql.Found) -> Generator[postgresql.Postgres]:
    """The session's server: shared, so use a `database` of your own, and leave it running. It syncs nothing to the disk."""
    if isinstance(postgres_found, postgresql.Postgres):
        found = postgres_found
    else:
        found = postgresql.Node(postgres_found, conf={"fsync": "off", "full_page_writes": "off"})
    with _running(found) as shared:
        yield shared


@pytest_asyncio.fixture
async def postgres_url(postgres: postgresql.Postgres) -> AsyncGenerator[str]:
    """The URL of a database of the test's own, with leveret's tables."""
    async with postgres.database() as url:
        await postgresql.migrate(url)
        yield url


@pytest.fixture(scope="session")
def postgres_database(postgres: postgresql.Postgres) -> Generator[str]:
    """The URL of the session's database, which has leveret's schema: shared, so use queue names of your own."""
    with asyncio.Runner() as runner:
        made = postgres.database()
        url = runner.run(made.__aenter__())
        runner.run(postgresql.migrate(url))
        yield url
        runner.run(made.__aexit__(None, None, None))


@pytest_asyncio.fixture
async def postgres_node(
    postgres_found: postgresql.Found,
) -> AsyncGenerator[StartPostgres]:
    """Start servers of the test's own, to kill, pause and copy; skips where the server isn't ours to run."""
    async with AsyncExitStack() as started:

        async def start(*, conf: Mapping[str, str | int] | None = None, clock: bool = False) -> postgresql.Node:
            return await _start(postgresql.Node(ours(postgres_found), conf=conf, clock=clock), started)

        yield start


@pytest.fixture(scope="session")
def redis_found() -> redises.Found:
    """What there is to run on, looked up once; none fails with CI=true, and otherwise skips and says what would help."""
    return _found(redises.find_redis)


@pytest.fixture(scope="session")
def redis(redis_found: redises.Found) -> Generator[redises.Server]:
    """The session's server: shared, so use queue names of your own, and leave it running."""
    with _running(redis_found if isinstance(redis_found, redises.Server) else redises.Node(redis_found)) as shared:
        yield shared


@pytest.fixture(scope="session")
def redis_cluster(redis_found: redises.Found) -> Generator[redises.Cluster]:
    """The session's cluster of three: shared, so use queue names of your own, and leave it running."""
    # a node that a case holds up for some seconds isn't gone
    with _running(redises.Cluster(ours(redis_found), conf={"cluster-node-timeout": 60_000})) as shared:
        yield shared


@pytest_asyncio.fixture
async def redis_node(redis_found: redises.Found) -> AsyncGenerator[StartRedis]:
    """Start servers of the test's own, to kill, pause and copy; skips where the server isn't ours to run."""
    async with AsyncExitStack() as started:

        async def start(*, conf: redises.Conf | None = None, authority: trustme.CA | None = None) -> redises.Node:
            return await _start(redises.Node(ours(redis_found), conf=conf, authority=authority), started)

        yield start
