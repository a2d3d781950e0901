"""The app of the project. Views import the publisher from here; `leveret work shop.jobs:app` runs the jobs."""

from collections.abc import Generator
from contextlib import contextmanager

from django.db import close_old_connections

from leveret import App
from leveret.middleware import Retries


@contextmanager
def connections() -> Generator[None, None, None]:
    """Close old database connections around each job, as Django does around each request."""
    close_old_connections()
    try:
        yield
    finally:
        close_old_connections()


app = App(
    "shop",
    default_broker="sqlite:///jobs.db",
    modules=["shop.worker", "orders.handlers"],  # imported in this order; publishers import none of them
    middleware=[Retries()],
    around_sync=connections,
)
publisher = app.blocking_publisher()  # a module's variable: nothing starts before its first use
