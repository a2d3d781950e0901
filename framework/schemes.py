"""The table of brokers: which module serves which URL scheme."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast
from urllib.parse import urlsplit

from .admin import Admin, OutboxAdmin
from .broker import Broker
from .errors import ConfigurationError
from .migrator import Migrator
from .outbox import Outbox
from .runtime import Runtime
from .settings import redact_url

if TYPE_CHECKING:
    from .store import Store


class BrokerModule(Protocol):
    """The functions of a module that serves a URL scheme.

    A broker on a database that it doesn't change by itself also has `open_migrator(url, runtime)`. One whose database may have an
    outbox has `open_outbox(url, runtime)` and `open_outbox_admin(url, runtime)`. One beside which a job store may be has
    `open_store(url, runtime)`.
    """

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
    "postgresql": "leveret.brokers.postgresql",
    "postgres": "leveret.brokers.postgresql",
    "redis": "leveret.brokers.redis",
    "rediss": "leveret.brokers.redis",
    "redis+cluster": "leveret.brokers.redis",
    "rediss+cluster": "leveret.brokers.redis",
    "redis+sentinel": "leveret.brokers.redis",
    "rediss+sentinel": "leveret.brokers.redis",
    "sqlite": "leveret.brokers.sqlite",
    "memory": "leveret.brokers.memory",
}

_EXTRAS = {"asyncpg": "postgresql", "hiredis": "redis"}
"""By library: the extra of leveret that brings it."""
ENTRY_POINTS = "leveret.brokers"


def broker_module(url: str | None, of: str = "broker") -> BrokerModule:
    """Return the module that serves the scheme of `url`, the URL of a broker, a store or an outbox (`of`).

    Raises ConfigurationError if no module does, or if a library of an extra is missing.
    """
    if not url:
        raise ConfigurationError(NO_BROKER)
    try:
        scheme = urlsplit(url).scheme
    except ValueError:  # its message would show the password
        msg = f"the {of}'s URL {redact_url(url)!r} can't be parsed; percent-encode the special characters in it"
        raise ConfigurationError(msg) from None
    name = _SCHEMES.get(scheme)
    if name is None:
        from importlib.metadata import entry_points

        for point in entry_points(group=ENTRY_POINTS, name=scheme):
            name = point.module
    if name is None:
        known = ", ".join(f"{scheme}://" for scheme in _SCHEMES if "+" not in scheme)
        none = f": neither leveret nor an installed package has a broker for {scheme}://" if "://" in url else ""
        if of == "outbox":
            none, known = "", "postgresql://, postgres://"
        elif of == "store":
            none, known = "", "postgresql://, postgres://, redis://, rediss://, sqlite://, memory://"
        msg = f"the {of}'s URL {redact_url(url)!r} has no known scheme{none}; a URL begins with one of {known}"
        raise ConfigurationError(msg)
    try:
        return cast("BrokerModule", importlib.import_module(name))
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _EXTRAS:
            raise
        msg = f"the {of}'s URL with {scheme}:// needs {library}; install the extra leveret[{_EXTRAS[library]}], which brings it"
        raise ConfigurationError(msg) from error


def open_migrator(url: str | None, runtime: Runtime) -> Migrator | None:
    """Return the migrator of the broker at `url`, without connecting; None for a broker that needs none."""
    module = broker_module(url)
    make: Callable[[str | None, Runtime], Migrator] | None = getattr(module, "open_migrator", None)
    return None if make is None else make(url, runtime)


def open_outbox(url: str, runtime: Runtime) -> Outbox:
    """Return the outbox at `url`, without connecting; ConfigurationError if that is no database for one."""
    make: Callable[[str, Runtime], Outbox] | None = getattr(broker_module(url, "outbox"), "open_outbox", None)
    if make is None:
        msg = f"the outbox {redact_url(url)!r} must be in the user's database; its URL begins with postgresql://"
        raise ConfigurationError(msg)
    return make(url, runtime)


def open_outbox_admin(url: str, runtime: Runtime) -> OutboxAdmin:
    """Return the admin of the outbox at `url`, which `open_outbox` takes, without connecting."""
    open_outbox(url, runtime)
    make = cast("Callable[[str, Runtime], OutboxAdmin]", getattr(broker_module(url), "open_outbox_admin"))  # noqa: B009
    return make(url, runtime)


def can_store(url: str | None) -> bool:
    """Return whether the database of the broker at `url` may also be a job store."""
    return url is not None and getattr(broker_module(url), "open_store", None) is not None


def open_store(url: str, runtime: Runtime) -> Store:
    """Return the job store at `url`, without connecting; ConfigurationError if that can't be one."""
    make: Callable[[str, Runtime], Store] | None = getattr(broker_module(url, "store"), "open_store", None)
    if make is None:
        msg = f"the store {redact_url(url)!r} keeps no results; its URL begins with postgresql://, redis://, sqlite:// or memory://"
        raise ConfigurationError(msg)
    return make(url, runtime)


NO_STORE = (
    "nothing keeps the results of jobs: this app has no job store. Give App(store=…) or LEVERET_STORE the URL of one: "
    "postgresql://host/database, redis://host/0, or sqlite:///jobs.db for one host"
)
NO_BROKER = (
    "no broker is set; set LEVERET_BROKER (or App(broker=…), or App(default_broker=…)) to one of: "
    "amqp://host/vhost (RabbitMQ, for production; user:password@ goes before the host), "
    "postgresql://host/database (the database that is already there; needs leveret[postgresql]), "
    "redis://host (Redis or Valkey; needs leveret[redis]), sqlite:///jobs.db (a local file, nothing to install), "
    "memory:// (inside one process, for tests)"
)
