"""The job stores that the conformance suite runs on. Each test has records of its own, by its ids and queues."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from leveret.store import Store
from tests.contract.store.harness import (
    MemoryStoreHarness,
    PooledStoreHarness,
    PostgresStoreHarness,
    RedisClusterStoreHarness,
    RedisStoreHarness,
    SqliteStoreHarness,
    StoreHarness,
)

OpenStore: TypeAlias = Callable[[], Store]


def _harnesses() -> dict[str, type[StoreHarness]]:
    """Return the harnesses by name, or the one that LEVERET_TEST_STORE names (module:class)."""
    theirs = os.environ.get("LEVERET_TEST_STORE")
    if theirs:
        module, _, name = theirs.partition(":")
        return {module: getattr(importlib.import_module(module), name)}
    return {
        "memory": MemoryStoreHarness,
        "sqlite": SqliteStoreHarness,
        "postgresql": PostgresStoreHarness,
        "postgresql-pgbouncer": PooledStoreHarness,
        "redis": RedisStoreHarness,
        "redis-cluster": RedisClusterStoreHarness,
    }


HARNESSES = _harnesses()

if os.environ.get("LEVERET_TEST_HARNESS") and not os.environ.get("LEVERET_TEST_STORE"):
    collect_ignore_glob = ["test_*.py"]  # somebody's broker without a store


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases of stores that tell of ends where a store is polled: `@pytest.mark.tells`."""
    left_out = [
        item
        for item in items
        if item.get_closest_marker("tells")
        and isinstance(item, pytest.Function)
        and not HARNESSES[str(item.callspec.params["kept"])].tells
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(params=[pytest.param(name, marks=harness.marks) for name, harness in HARNESSES.items()])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> StoreHarness:
    """Each store in turn. No coroutine, since its fixtures may run a loop of their own."""
    return HARNESSES[request.param].make(request, tmp_path)


@pytest.fixture
async def open_store(kept: StoreHarness) -> AsyncGenerator[OpenStore]:
    """Opens stores on the records of the test, each as another process does."""
    await kept.start()
    yield kept.open
    await asyncio.gather(*(store.close() for store in kept.opened))
    await kept.close()


@pytest.fixture
def store(open_store: OpenStore) -> Store:
    """A store."""
    return open_store()
