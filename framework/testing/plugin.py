"""The pytest fixture `leveret_running`: `leveret.testing.running`, with a check that the test has left every lab."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from .lab import Lab


@pytest.fixture
def leveret_running() -> Generator[Callable[..., AbstractAsyncContextManager[Lab, None]], None, None]:
    """Run an app in a test with `async with`, under any plugin for asynchronous tests, as `leveret.testing.running` does.

    A lab that the test doesn't leave would capture the app's publishers in later tests, so the fixture fails the test.
    """
    from .lab import running

    apps: list[Any] = []

    def run(app: Any, **keywords: Any) -> AbstractAsyncContextManager[Lab, None]:
        apps.append(app)
        return running(app, **keywords)

    yield run
    for app in apps:
        if app.is_captured:
            pytest.fail(f"the test entered a lab of app {app.name!r} and didn't leave it; use async with")
