"""The brokers that the conformance suite runs on."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from tests.contract.harness import Harness, MemoryHarness, RabbitHarness, SqliteHarness


@pytest.fixture(
    params=[
        "memory",
        "sqlite",
        pytest.param("rabbitmq-quorum", marks=pytest.mark.rabbit),
        pytest.param("rabbitmq-classic", marks=pytest.mark.rabbit),
    ]
)
def unopened(request: pytest.FixtureRequest, tmp_path: Path) -> Harness:
    """Each broker in turn. No coroutine, since a RabbitMQ is asked for by name, and its fixture runs a loop of its own."""
    match request.param:
        case "memory":
            return MemoryHarness()
        case "sqlite":
            return SqliteHarness(tmp_path / "jobs.db")
        case "rabbitmq-quorum":
            return RabbitHarness(request.getfixturevalue("rabbit").url, "quorum")
        case _:
            return RabbitHarness(request.getfixturevalue("rabbit").url, "classic")


@pytest.fixture
async def harness(unopened: Harness) -> AsyncGenerator[Harness]:
    """Each broker in turn, with queues of its own, which are deleted at the end."""
    await unopened.start()
    yield unopened
    await unopened.close()
