"""`amqp://` and `amqps://`: RabbitMQ 3.10 and later, over a connection of our own."""

from __future__ import annotations

from leveret.admin import Admin
from leveret.broker import Broker
from leveret.job import Queue
from leveret.runtime import Runtime

from . import topology
from .address import addresses
from .broker import RabbitBroker

__all__ = ["open_admin", "open_broker", "physical_queues"]


def open_broker(url: str, runtime: Runtime) -> Broker:
    """Return the broker at `url` (several addresses with commas between); ConfigurationError for one that can't be. Connects to nothing."""
    return RabbitBroker(addresses(url, runtime.settings.heartbeat_s), runtime)


def open_admin(url: str, runtime: Runtime) -> Admin:
    """Return the admin of the broker at `url`. Connects to nothing."""
    from .admin import RabbitAdmin

    return RabbitAdmin(addresses(url, runtime.settings.heartbeat_s), runtime)


def physical_queues(queue: Queue) -> list[str]:
    """Return the names that the management page shows for `queue`, dead letters last; for `leveret describe`."""
    return [*topology.physicals(queue), topology.dead_queue(queue.name)]
