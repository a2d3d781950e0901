"""A RabbitMQ in a container, for the fixture `leveret_rabbitmq` where no URL is given."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Generator
from contextlib import contextmanager

IMAGE = "rabbitmq:4"
_PORT = 5672


class NoContainer(Exception):
    """No container can be started; the text says what to do."""


@contextmanager
def rabbitmq_container() -> Generator[str, None, None]:
    """Run RabbitMQ in a container and yield its URL."""
    try:
        from testcontainers.core.container import DockerContainer
        from testcontainers.core.wait_strategies import LogMessageWaitStrategy
    except ImportError as error:
        msg = "install the extra leveret[test], which brings testcontainers"
        raise NoContainer(msg) from error
    container, why = None, ""
    with warnings.catch_warnings():
        # a Docker client that can't connect leaves its socket to the collector
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            container = DockerContainer(IMAGE).with_exposed_ports(_PORT)
            container.waiting_for(LogMessageWaitStrategy("Server startup complete")).start()
        except Exception as error:  # noqa: BLE001 - each way in which Docker can fail has an error of its own
            why = str(error)
        if why:
            gc.collect()
    if container is None or why:
        msg = f"start Docker, which gave: {why}"
        raise NoContainer(msg)
    try:
        yield f"amqp://guest:guest@{container.get_container_host_ip()}:{container.get_exposed_port(_PORT)}/"
    finally:
        container.stop()
