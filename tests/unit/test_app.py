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


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ({"broker": "amqp://host/"}, {}, None),
        ({"broker": "amqp://host/"}, {"LEVERET_STORE": "sqlite:///env.db"}, "sqlite:///env.db"),
        (
            {"broker": "amqp://host/", "store": "sqlite:///code.db"},
            {"LEVERET_STORE": "sqlite:///env.db"},
            "sqlite:///code.db",
        ),
        ({"broker": "amqp://host/"}, {"LEVERET_STORE": ""}, None),
        ({"broker": "redis://host/0"}, {}, "redis://host/0"),
        ({"broker": "rediss+sentinel://host/main"}, {}, "rediss+sentinel://host/main"),
        ({}, {}, None),
    ],
)
def test_the_store_is_the_one_that_is_named(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], environment: dict[str, str], expected: str | None
) -> None:
    """An operator has the variable; a program that names a store must not have its results elsewhere."""
    for name in ("LEVERET_BROKER", "LEVERET_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert App("shop", **arguments).store_url() == expected


@pytest.mark.parametrize("url", ["amqp://shop:hunter2@host/", "kafka://shop:hunter2@host/"])
def test_a_store_that_keeps_nothing_is_refused_without_its_password(url: str) -> None:
    """The results would be looked for in a database that has none; the log must not show how to get in."""
    app = App("shop", broker="memory://", store=url)

    with pytest.raises(ConfigurationError) as refused:
        app.open_store(app.runtime())

    assert "postgresql://" in str(refused.value)
    assert "hunter2" not in str(refused.value)
