"""Benches: a queue, an app, and its worker processes."""

import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from tests.fault.bench import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Generator[Callable[..., Bench]]:
    """Make benches at a broker's URL; their workers are killed at the end."""
    made: list[Bench] = []

    def make(url: str, type: str = "quorum", **settings: float) -> Bench:
        folder = tmp_path / f"bench-{len(made)}"
        folder.mkdir()
        made.append(Bench(folder, url, type, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()
        sys.stdout.write(one.logs)  # shown where the test failed


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgresql", marks=pytest.mark.postgres),
        pytest.param("redis", marks=[pytest.mark.redis, pytest.mark.matrix]),
        "quorum",
        "classic",
    ]
)
def any_bench(request: pytest.FixtureRequest, bench: Callable[..., Bench], tmp_path: Path) -> Bench:
    """A bench on each durable broker and kind of queue."""
    if request.param == "sqlite":
        return bench(f"sqlite:///{tmp_path}/jobs.db")
    if request.param == "postgresql":
        return bench(request.getfixturevalue("postgres_url"))
    if request.param == "redis":
        return bench(request.getfixturevalue("redis").url)
    return bench(request.getfixturevalue("rabbit").url, request.param)
