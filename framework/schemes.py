"""The table of brokers: which module serves which URL scheme."""

from __future__ import annotations

import importlib
from typing import Protocol, cast
from urllib.parse import urlsplit

from .admin import Admin
from .broker import Broker
from .errors import ConfigurationError
from .runtime import Runtime
from .settings import redact_url


class BrokerModule(Protocol):
    """The functions of a module that serves a URL scheme."""

    def open_broker(self, url: str, runtime: Runtime) -> Broker:
        """Return a broker, without connecting; ConfigurationError for a wrong URL."""
        ...

    def open_admin(self, url: str, runtime: Runtime) -> Admin:
        """Return an admin, without connecting; ConfigurationError for a wrong URL."""
        ...


# Strings, so that a broker is imported only when used. Other schemes come from entry points, which take 15 ms to read.
_SCHEMES = {
    "amqp": "leveret.brokers.rabbitmq",
    "amqps": "leveret.brokers.rabbitmq",
    "sqlite": "leveret.brokers.sqlite",
    "memory": "leveret.brokers.memory",
}


ENTRY_POINTS = "leveret.brokers"


def broker_module(url: str | None) -> BrokerModule:
    """Return the module that serves the scheme of `url`; ConfigurationError, with the known schemes, if no module does."""
    if not url:
        raise ConfigurationError(NO_BROKER)
    try:
        scheme = urlsplit(url).scheme
    except ValueError:  # its message would show the password
        msg = f"the broker's URL {redact_url(url)!r} can't be parsed; percent-encode the special characters in it"
        raise ConfigurationError(msg) from None
    name = _SCHEMES.get(scheme)
    if name is None:
        from importlib.metadata import entry_points

        for point in entry_points(group=ENTRY_POINTS, name=scheme):
            name = point.module
    if name is None:
        msg = f"the broker's URL {redact_url(url)!r} has no known scheme; a URL begins with one of {', '.join(f'{known}://' for known in _SCHEMES)}"
        raise ConfigurationError(msg)
    return cast("BrokerModule", importlib.import_module(name))


NO_BROKER = (
    "no broker is set; set LEVERET_BROKER (or App(broker=…), or App(default_broker=…)) to one of: "
    "amqp://host/vhost (RabbitMQ, for production; user:password@ goes before the host), sqlite:///jobs.db (a local file, nothing to install), "
    "memory:// (inside one process, for tests)"
)
