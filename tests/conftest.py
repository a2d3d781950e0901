"""Fixtures of all tests: a real RabbitMQ, shared or private."""

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Generator, Mapping, Sequence
from typing import NoReturn, Protocol

import pytest
import pytest_asyncio
from hypothesis import settings

from tests.rabbit.cluster import Cluster
from tests.rabbit.network import NoNetwork
from tests.rabbit.node import Installation, Node, Rabbit, Unavailable, choose, find_rabbit
from tests.rabbit.raw import Raw, connect

# a clock says more of the machine's load than of an example: two processes of tests share it, and whatever else runs
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


class StartNode(Protocol):
    """Starts a private node; `conf`, `advanced` (of its advanced.config) and `plugins` are RabbitMQ's own names."""

    def __call__(
        self,
        *,
        conf: Mapping[str, str] | None = None,
        advanced: Mapping[str, int] | None = None,
        plugins: Sequence[str] = (),
    ) -> Awaitable[Node]: ...


def pytest_report_header() -> list[str]:
    """Name the RabbitMQ of the tests before the first test that downloads or starts it."""
    return f"RabbitMQ: {choose().what}".splitlines()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses a RabbitMQ as `rabbit`, and what uses three nodes as `cluster`."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        kinds = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "rabbit_found" in item.fixturenames or {"quorum", "classic"} & {kind for kind in kinds if type(kind) is str}:
            item.add_marker("rabbit")
        if "cluster" in item.fixturenames:
            item.add_marker("cluster")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep half a surrogate pair, which some tests have logged, out of the report: xdist sends it as UTF-8, or ends."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


def _absent(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def rabbit_found() -> Rabbit | Installation:
    """What there is to run on, looked up once; none fails with CI=true, and otherwise skips and says what would help."""
    try:
        return find_rabbit()
    except Unavailable as error:
        _absent(str(error))


@pytest.fixture(scope="session")
def rabbit(rabbit_found: Rabbit | Installation) -> Generator[Rabbit]:
    """The session's broker: shared, so use queue names of your own, and leave it running."""
    shared = Node(rabbit_found) if isinstance(rabbit_found, Installation) else rabbit_found
    try:
        if isinstance(shared, Node):
            asyncio.run(shared.start())
        yield shared
    finally:
        asyncio.run(shared.close())


@pytest_asyncio.fixture
async def rabbit_node(rabbit_found: Rabbit | Installation) -> AsyncGenerator[StartNode]:
    """Start nodes of the test's own, to kill, pause and fill; skips where the broker isn't ours to run."""
    started: list[Node] = []

    async def start(
        *, conf: Mapping[str, str] | None = None, advanced: Mapping[str, int] | None = None, plugins: Sequence[str] = ()
    ) -> Node:
        if not isinstance(rabbit_found, Installation):
            pytest.skip(rabbit_found.why_no_levers)
        node = Node(rabbit_found, conf=conf, advanced=advanced, plugins=plugins)
        started.append(node)
        await node.start()
        return node

    yield start
    for node in started:
        await node.close()


@pytest.fixture(scope="session")
def shared_cluster(rabbit_found: Rabbit | Installation) -> Generator[Cluster]:
    """The session's cluster of three nodes; use `cluster`, which mends what a test leaves broken."""
    if not isinstance(rabbit_found, Installation):
        pytest.skip(rabbit_found.why_no_levers)
    shared = Cluster(rabbit_found)
    try:
        asyncio.run(shared.start())
        yield shared
    except NoNetwork as error:
        if os.geteuid() != 0:
            pytest.skip(str(error))
        _absent(str(error))
    finally:
        asyncio.run(shared.close())


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
