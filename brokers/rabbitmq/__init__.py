"""`amqp://` and `amqps://`: RabbitMQ 3.10 and later, over leveret's own AMQP connection."""

from __future__ import annotations

from leveret.admin import Admin
from leveret.broker import Broker
from leveret.runtime import Runtime

from .address import addresses
from .broker import RabbitBroker
from .nodes import Nodes
from .settings import RabbitSettings, rabbit_settings

__all__ = ["RabbitSettings", "open_admin", "open_broker"]


def open_broker(url: str, runtime: Runtime) -> Broker:
    """Return the broker at `url`, without connecting; several addresses are separated by commas.

    ConfigurationError for a URL that can't be read.
    """
    return RabbitBroker(Nodes.shared(addresses(url, rabbit_settings(runtime.settings))), runtime)


def open_admin(url: str, runtime: Runtime) -> Admin:
    """Return the admin of the broker at `url`, without connecting."""
    from .admin import RabbitAdmin

    return RabbitAdmin(Nodes(addresses(url, rabbit_settings(runtime.settings))), runtime)
