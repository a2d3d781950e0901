"""The nodes of one RabbitMQ: connecting to one of them, and which of them to try first."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import ClassVar, Protocol
from weakref import WeakSet, WeakValueDictionary

from leveret.errors import ConfigurationError

from .address import Address
from .connection import Connection, connect
from .session import FAULTS, ConnectionLost, kind_of, reason_of
from .wire import Closed


class Watcher(Protocol):
    """Watches nodes for as long as a connection to them is open."""

    def wake(self) -> None:
        """Begin to watch, since a connection was opened."""
        ...

    async def close(self) -> None:
        """Stop, since no connection is open any more."""
        ...


class Nodes:
    """The addresses of one RabbitMQ. All connections to them share what one of them has learnt."""

    _shared: ClassVar[WeakValueDictionary[object, Nodes]] = WeakValueDictionary()

    @classmethod
    def shared(cls, addresses: Sequence[Address]) -> Nodes:
        """Return the nodes that all brokers with these addresses in this event loop share, such as a worker's and a publisher's."""
        key = (asyncio._get_running_loop(), *addresses)
        return cls._shared.setdefault(key, cls(addresses))

    def __init__(self, addresses: Sequence[Address]) -> None:
        self.addresses = tuple(addresses)
        self.cluster = len(self.addresses) > 1 or any(address.cluster for address in self.addresses)
        """Whether other nodes may have what one node lacks."""
        self._first = 0
        """The address to try first: the one that answered last, or the one after the last that failed."""
        self.shunned: set[Address] = set()
        """Nodes that answer, but are cut off from their cluster; they aren't tried while another is left."""
        self.open: WeakSet[Connection] = WeakSet()
        """The connections that `connect` made."""
        self.watcher: Watcher | None = None

    def __str__(self) -> str:
        return ", ".join(map(str, self.addresses))

    def used(self) -> set[Address]:
        """Return the addresses to which a connection is open."""
        return {connection.address for connection in self.open if connection.usable}

    def leave(self, address: Address) -> None:
        """Try another address first from now on, since a connection to `address` was lost."""
        if self.addresses[self._first] == address:
            self._first = (self._first + 1) % len(self.addresses)

    async def connect(self, name: str, timeout_s: float, *, besides: Address | None = None) -> Connection:
        """Return a connection to the first address that accepts one, the address `besides` left out.

        All tries together take at most `timeout_s`, and each has its share of what is left, so that a silent node doesn't use
        up the time of the others. Raises ConnectionLost if waiting may help. Raises ConfigurationError if every address refuses:
        the refusal of one node says nothing about the others.
        """
        count = len(self.addresses)
        order = [number % count for number in range(self._first, self._first + count)]
        order = [number for number in order if self.addresses[number] != besides]
        order = [number for number in order if self.addresses[number] not in self.shunned] or order
        loop = asyncio.get_running_loop()
        ends = loop.time() + timeout_s
        reasons: list[str] = []
        refusal: BaseException | None = None
        refused = 0
        for tried, number in enumerate(order):
            address = self.addresses[number]
            try:
                connection = await connect(address, name, (ends - loop.time()) / (len(order) - tried))
            except (UnicodeError, *FAULTS) as error:
                self._first = (number + 1) % count
                if _refuses(error):
                    refused += 1
                    refusal = refusal or error
                    reasons.append(_refusal(error, address))
                else:
                    reasons.append(f"RabbitMQ at {address}: {reason_of(error)}")
            else:
                self._first = number
                self.open.add(connection)
                if self.watcher is not None:
                    self.watcher.wake()
                return connection
        if refused == len(order) and refusal is not None:
            raise ConfigurationError("; ".join(reasons)) from refusal
        raise ConnectionLost("; ".join(reasons))


def _refuses(error: BaseException) -> bool:
    # UnicodeError is the resolver's: a label of the name is empty or too long
    return isinstance(error, UnicodeError) or kind_of(error) == "refused"


def _refusal(error: BaseException, address: Address) -> str:
    if isinstance(error, UnicodeError):
        return f"RabbitMQ at {address}: {address.host!r} isn't a host name ({error})"
    text = reason_of(error)
    if isinstance(error, FileNotFoundError):
        missing = [
            file
            for file in (address.cafile, address.certfile, address.keyfile)
            if file and not os.path.exists(file)  # noqa: PTH110
        ]
        return f"RabbitMQ at {address}: a file named in the URL doesn't exist: {', '.join(missing) or error.filename}"
    if isinstance(error, Closed) and error.code in (0, 501):
        return f"RabbitMQ at {address}: {text}"
    if isinstance(error, Closed) and error.code == 403 and address.external:
        return f"RabbitMQ at {address} refused the login by client certificate (auth_mechanism=external): {text}"
    if isinstance(error, Closed) and error.code == 403:
        return f"RabbitMQ at {address} refused the login of user {address.user!r}: is the password right? ({text})"
    if isinstance(error, Closed) and "not found" in text:
        return f"RabbitMQ at {address} has no vhost {address.vhost!r} ({text})"
    if isinstance(error, Closed):
        return f"RabbitMQ at {address} doesn't let user {address.user!r} use vhost {address.vhost!r} ({text})"
    return f"RabbitMQ at {address}: {text}"
