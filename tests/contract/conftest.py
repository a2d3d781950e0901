"""The brokers that the conformance suite runs on, and which cases each of them takes part in."""

from __future__ import annotations

import asyncio
import importlib
import os
import pkgutil
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path

import pytest

from leveret.schemes import can_store
from tests.contract import harness as package
from tests.contract.harness import Harness
from tests.postgres.node import PgBouncer, Postgres


def _brokers() -> dict[str, type[Harness]]:
    """Return the harnesses by name: those of every file in harness/, or the one that LEVERET_TEST_HARNESS names (module:class)."""
    theirs = os.environ.get("LEVERET_TEST_HARNESS")
    if not theirs:
        files = [
            importlib.import_module(f"{package.__name__}.{found.name}")
            for found in pkgutil.iter_modules(package.__path__)
        ]
        return {name: harness for file in files for name, harness in getattr(file, "HARNESSES", {}).items()}
    module, colon, name = theirs.partition(":")
    if not module or not colon or not name:
        msg = f"LEVERET_TEST_HARNESS={theirs!r}: expected module:class, the subclass of tests.contract.harness.Harness to run the suite on"
        raise pytest.UsageError(msg)
    return {module: getattr(importlib.import_module(module), name)}


BROKERS = _brokers()


@pytest.fixture(scope="session")
def postgres_pooled(postgres: Postgres) -> PgBouncer:
    """A PgBouncer before the session's server, in transaction mode."""
    return asyncio.run(postgres.pooler())


@pytest.fixture(params=[pytest.param(name, marks=harness.marks) for name, harness in BROKERS.items()])
def unopened(request: pytest.FixtureRequest, tmp_path: Path) -> Harness:
    """Each broker in turn. No coroutine, since a RabbitMQ is asked for by name, and its fixture runs a loop of its own."""
    return BROKERS[request.param].make(request, tmp_path)


@pytest.fixture
async def harness(unopened: Harness) -> AsyncGenerator[Harness]:
    """Each broker in turn, with queues of its own, which are deleted at the end."""
    await unopened.start()
    yield unopened
    await unopened.close()


_FEW = {"postgresql-pgbouncer": "pooler", "redis-cluster": "matrix"}
"""The brokers and stores on which `make test` runs a few cases; the others have this mark."""
_THE_FEW = {
    "test_a_body_arrives_byte_for_byte",
    "test_two_consumers_share_a_queue_and_no_job_comes_twice",
    "test_a_settlement_that_cannot_be_confirmed_leaves_the_delivery_unsettled",
    "test_a_lost_connection_neither_cancels_a_handler_nor_repeats_it",
    "test_many_letters_are_replayed_at_once_and_each_arrives_once",
    "test_a_life_in_order_is_followed",
    "test_the_last_progress_of_a_job_that_is_done_is_there",
    "test_verdicts_come_in_the_order_of_the_changes",
    "test_thousands_of_publishes_are_asked_for_at_once",
}


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases of features that a broker doesn't promise: `@pytest.mark.features(connected=True)`."""
    left_out = [item for item in items if not _takes_part(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        if isinstance(item, pytest.Function) and item.originalname not in _THE_FEW and (mark := _few(item)):
            item.add_marker(mark)


def _params(item: pytest.Function) -> Mapping[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _few(item: pytest.Function) -> str | None:
    """Return the mark of a broker or store on which `make test` runs a few cases."""
    params = _params(item)
    return _FEW.get(str(params.get("unopened", params.get("kept"))))


def _takes_part(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function):
        return True
    if _few(item) and "kept" in _params(item) and item.get_closest_marker("fault"):
        return False  # ten thousand races take a minute there, and the small ones do the same
    if "beside" in _params(item).values():
        return can_store(BROKERS[str(_params(item)["unopened"])].example)
    wanted: Sequence[pytest.Mark] = list(item.iter_markers("features"))
    if not wanted:
        return True
    features = BROKERS[str(item.callspec.params["unopened"])].features()
    return all(getattr(features, name) == value for mark in wanted for name, value in mark.kwargs.items())
