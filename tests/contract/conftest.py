"""The brokers that the conformance suite runs on, and which cases each of them takes part in."""

from __future__ import annotations

import importlib
import os
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.contract.harness import Harness
from tests.contract.harness.memory import MemoryHarness
from tests.contract.harness.rabbitmq import ClassicHarness, RabbitHarness
from tests.contract.harness.sqlite import SqliteHarness

BROKERS: dict[str, type[Harness]] = {
    "memory": MemoryHarness,
    "sqlite": SqliteHarness,
    "rabbitmq-quorum": RabbitHarness,
    "rabbitmq-classic": ClassicHarness,
}
if theirs := os.environ.get(
    "LEVERET_TEST_HARNESS"
):  # module:class, of a broker that lives elsewhere: the suite runs on that one
    module, _, name = theirs.partition(":")
    BROKERS = {module: getattr(importlib.import_module(module), name)}


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.rabbit if issubclass(harness, RabbitHarness) else ())
        for name, harness in BROKERS.items()
    ]
)
def unopened(request: pytest.FixtureRequest, tmp_path: Path) -> Harness:
    """Each broker in turn. No coroutine, since a RabbitMQ is asked for by name, and its fixture runs a loop of its own."""
    harness: Any = BROKERS[request.param]
    if issubclass(harness, RabbitHarness):
        return harness(request.getfixturevalue("rabbit").url)
    return harness(tmp_path / "jobs.db") if issubclass(harness, SqliteHarness) else harness()


@pytest.fixture
async def harness(unopened: Harness) -> AsyncGenerator[Harness]:
    """Each broker in turn, with queues of its own, which are deleted at the end."""
    await unopened.start()
    yield unopened
    await unopened.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases of features that a broker doesn't promise: `@pytest.mark.features(connected=True)`."""
    left_out = [item for item in items if not _takes_part(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _takes_part(item: pytest.Item) -> bool:
    wanted: Sequence[pytest.Mark] = list(item.iter_markers("features"))
    if not wanted or not isinstance(item, pytest.Function):
        return True
    features = BROKERS[str(item.callspec.params["unopened"])].features()
    return all(getattr(features, name) == value for mark in wanted for name, value in mark.kwargs.items())
