"""URL → the module that serves its scheme: the one table of brokers."""

from __future__ import annotations

import importlib
from typing import Protocol, cast
from urllib.parse import urlsplit

from .admin import Admin
from .broker import Broker
from .errors import ConfigurationError
from .runtime import Runtime
from .settings import redact


class BrokerModule(Protocol):
    """What a module that serves a URL scheme has."""

    def open_broker(self, url: str, runtime: Runtime) -> Broker:
        """Make a broker; ConfigurationError for a URL that can't be. Connects to nothing."""
        ...

    def open_admin(self, url: str, runtime: Runtime) -> Admin:
        """Make an admin; ConfigurationError for a URL that can't be. Connects to nothing."""
        ...


# Strings, so that a broker is imported when used; an entry point only for other schemes, since reading them costs 15 ms.
_SCHEMES = {
    "amqp": "leveret.brokers.rabbitmq",
    "amqps": "leveret.brokers.rabbitmq",
    "sqlite": "leveret.brokers.sqlite",
    "memory": "leveret.brokers.memory",
}


ENTRY_POINTS = "leveret.brokers"


def broker_module(url: str | None) -> BrokerModule:
    """Return the module that serves `url`'s scheme; ConfigurationError with the choices where none does."""
    if not url:
        raise ConfigurationError(NO_BROKER)
    try:
        scheme = urlsplit(url).scheme
    except ValueError:  # its text would show the password
        msg = f"the broker's URL {redact(url)!r} can't be read: is a character of it to be percent-encoded?"
        raise ConfigurationError(msg) from None
    name = _SCHEMES.get(scheme)
    if name is None:
        from importlib.metadata import entry_points

        for point in entry_points(group=ENTRY_POINTS, name=scheme):
            name = point.module
    if name is None:
        msg = f"the broker's URL {redact(url)!r} has no known scheme; it begins with one of {', '.join(f'{known}://' for known in _SCHEMES)}"
        raise ConfigurationError(msg)
    return cast("BrokerModule", importlib.import_module(name))


NO_BROKER = (
    "no broker is set. Set LEVERET_BROKER (or App(broker=…), or App(default_broker=…)) to one of: "
    "amqp://host/vhost (RabbitMQ, for production; user:password@ goes before the host), sqlite:///jobs.db (a local file, nothing to install), "
    "memory:// (inside one process, for tests)"
)
