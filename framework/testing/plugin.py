"""The fixture `leveret_running`: `leveret.testing.running`, which the test's end checks was left."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from .lab import Lab


@pytest.fixture
def leveret_running() -> Generator[Callable[..., AbstractAsyncContextManager[Lab, None]], None, None]:
    """Run an app in a test, under any asynchronous plugin, with `async with`; the same as `leveret.testing.running`.

    A lab that was entered and not left would capture the app's publishers for the tests after it: that fails the test.
    """
    from .lab import running

    apps: list[Any] = []

    def run(app: Any, **keywords: Any) -> AbstractAsyncContextManager[Lab, None]:
        apps.append(app)
        return running(app, **keywords)

    yield run
    for app in apps:
        if app.is_captured:
            pytest.fail(f"a lab of app {app.name!r} was entered and not left")
