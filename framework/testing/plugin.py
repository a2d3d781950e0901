"""The pytest fixtures `leveret_running` and `leveret_rabbitmq`: an app in a lab, with a check that the test has left every lab."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from .lab import Lab, LeveretRunning

_URL_OPTION = "--leveret-amqp"
_URL_VARIABLE = "LEVERET_TEST_AMQP"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option for the URL of a RabbitMQ."""
    parser.getgroup("leveret").addoption(
        _URL_OPTION,
        metavar="URL",
        help=f"the RabbitMQ of the fixture leveret_rabbitmq (default: ${_URL_VARIABLE}, else a container)",
    )


@pytest.fixture
def leveret_running() -> Generator[LeveretRunning, None, None]:
    """Run an app in a test with `async with`, under any plugin for asynchronous tests, as `leveret.testing.running` does.

    A lab that the test doesn't leave would capture the app's publishers in later tests, so the fixture fails the test.
    """
    from . import running

    yield from _checked(running)


@pytest.fixture(scope="session")
def leveret_rabbitmq_url(request: pytest.FixtureRequest) -> Generator[str, None, None]:
    """Return the URL of a RabbitMQ: of `--leveret-amqp`, of LEVERET_TEST_AMQP, or of a container that runs for the session.

    Without any, the test is skipped; with CI in the environment, it fails. A project may define this fixture itself.
    """
    url: str | None = request.config.getoption(_URL_OPTION) or os.environ.get(_URL_VARIABLE)
    if url:
        yield url
        return
    from .container import NoContainer, rabbitmq_container

    try:
        with rabbitmq_container() as started:
            yield started
    except NoContainer as error:
        reason = f"no RabbitMQ for leveret_rabbitmq: give {_URL_OPTION} or {_URL_VARIABLE} a broker's URL, or {error}"
        if os.environ.get("CI", "").lower() in {"", "0", "false"}:
            pytest.skip(reason)
        pytest.fail(reason, pytrace=False)


@pytest.fixture
def leveret_rabbitmq(leveret_rabbitmq_url: str) -> Generator[LeveretRunning, None, None]:
    """Run an app in a test on a real RabbitMQ; otherwise as `leveret_running`.

    Each lab has its own queues, and deletes them at the end. `advance` raises, because a real broker's time can't be moved.
    """
    from .real import running_on_rabbitmq

    def run(app: Any, **keywords: Any) -> AbstractAsyncContextManager[Lab, None]:
        return running_on_rabbitmq(leveret_rabbitmq_url, app, **keywords)

    yield from _checked(run)


def _checked(
    running: Callable[..., AbstractAsyncContextManager[Lab, None]],
) -> Generator[LeveretRunning, None, None]:
    """Yield `running`, and fail the test if it is still in a lab at its end."""
    apps: list[Any] = []

    def run(app: Any, **keywords: Any) -> AbstractAsyncContextManager[Lab, None]:
        apps.append(app)
        return running(app, **keywords)

    yield run
    for app in apps:
        if app.is_captured:
            pytest.fail(f"the test entered a lab of app {app.name!r} and didn't leave it; use async with")
