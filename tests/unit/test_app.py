"""The app's arguments."""

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import pytest

from leveret import App
from leveret.errors import ConfigurationError


async def life() -> AsyncGenerator[None, None]:
    """A lifespan without its decorator."""
    yield


def around() -> Generator[None, None, None]:
    """An `around_sync` without its decorator."""
    yield


async def pool() -> None:
    """A coroutine function, which isn't a lifespan at all."""


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lifespan": asynccontextmanager(life)()}, "pass the function without calling it"),
        ({"lifespan": life()}, "pass the function without calling it"),
        ({"lifespan": life}, "decorate life with @asynccontextmanager"),
        ({"lifespan": around}, "decorate around with @asynccontextmanager"),
        ({"lifespan": pool}, "decorate pool with @asynccontextmanager"),
        ({"around_sync": contextmanager(around)()}, "pass the function without calling it"),
        ({"around_sync": around()}, "pass the function without calling it"),
        ({"around_sync": around}, "decorate around with @contextmanager"),
        ({"around_sync": life}, "decorate life with @contextmanager"),
    ],
)
def test_a_lifespan_that_was_called_or_lacks_its_decorator_is_refused_when_the_app_is_made(
    wrong: dict[str, Any], said: str
) -> None:
    """The worker would end with a traceback out of contextlib at its start, or at the first `def` handler of the night."""
    with pytest.raises(ConfigurationError, match=rf"^app 'shop': {next(iter(wrong))} must be .*; {said}$"):
        App("shop", **wrong)


def test_every_function_that_returns_a_context_manager_is_a_lifespan() -> None:
    """The check would refuse classes and their factories, which work."""

    class Life:
        async def __aenter__(self) -> None: ...
        async def __aexit__(self, *error: object) -> None: ...

    decorated = asynccontextmanager(life)
    for lifespan in (decorated, Life, partial(Life)):
        assert App[Any]("shop", lifespan=lifespan, around_sync=contextmanager(around)).lifespan is lifespan
