"""The job stores that the conformance suite runs on. Each test has records of its own, by its ids and queues."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from leveret.store import Store
from tests.contract.store.harness import HARNESSES, StoreHarness

OpenStore: TypeAlias = Callable[[], Store]


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
