"""Connecting and declaring: the first address that answers, with deadlines, and what each refusal means."""

from __future__ import annotations

import errno
import logging
import os
import re
import ssl
from collections.abc import Iterable
from typing import Any, Literal, cast

from pamqp import commands
from pamqp.base import Frame

from leveret.errors import ConfigurationError, UnsupportedTopology
from leveret.settings import redact

from . import connection as amqp
from .address import Address
from .channel import Channel
from .topology import Binding, Declaration, Exchange
from .wire import Closed

logger = logging.getLogger("leveret.rabbitmq")


class ConnectionLost(Exception):
    """There is no connection, or it is gone; the text says why. Waiting may help."""


Kind = Literal["lost", "refused", "drift"]

FAULTS = (Closed, OSError, TimeoutError)
"""What a connection raises; `ssl.SSLError` is an OSError."""

_DRIFT = re.compile(r"inequivalent arg|invalid arg|invalid property|unknown exchange type")
_LIMIT = re.compile(r"limit \(\d+\) is reached")
"""Of connections, set for a vhost, a user or the node: "refused" stands in the text, but there is room once another one closes."""


_TLS_HINTS = (
    ("WRONG_VERSION_NUMBER", "does that port speak TLS?"),
    ("RECORD_LAYER_FAILURE", "does that port speak TLS?"),  # the same, of OpenSSL 3.2
    ("ALERT_CERTIFICATE_REQUIRED", "the broker asks for a client certificate: certfile and keyfile in the URL"),
    ("ALERT_UNKNOWN_CA", "the broker doesn't trust the client certificate in certfile"),
)


def kind_of(error: BaseException) -> Kind:
    """Return what `error` means: lost (try again), refused (waiting won't help), drift (what exists differs)."""
    if (
        isinstance(error, Closed)
        and isinstance(alert := error.__cause__, ssl.SSLError)
        and "_ALERT_" in (alert.reason or "")
    ):
        return "refused"  # TLS 1.3 refuses a client's certificate after the client's side of the handshake
    if isinstance(error, ssl.SSLError) and not isinstance(
        error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
    ):
        return "refused"
    if not isinstance(error, Closed):
        return "refused" if isinstance(error, FileNotFoundError) else "lost"
    match error.code:
        case 403 | 405:
            return "refused"
        case 501 if "amqps://" in error.text:
            return "refused"
        case 406 if _DRIFT.search(error.text):  # else: a replica that isn't there yet, a delivery tag
            return "drift"
        case 530 if (
            error.scope == "connection"
            and not _LIMIT.search(error.text)
            and re.search(r"vhost .* not found|refused", error.text)
        ):
            return "refused"
        case _:
            return "lost"


def reason_of(error: BaseException) -> str:
    """Return one line for people; never a URL's password."""
    if isinstance(error, Closed) and isinstance(error.__cause__, ssl.SSLError):
        error = error.__cause__
    if isinstance(error, ssl.SSLError):
        hint = next((f" ({hint})" for part, hint in _TLS_HINTS if part in (error.reason or "")), "")
        return f"TLS: {getattr(error, 'verify_message', None) or error.reason or error}{hint}"
    if isinstance(error, TimeoutError) and not error.errno:
        return "no answer in time"
    if isinstance(error, OSError):
        if error.errno is not None and error.errno in errno.errorcode:
            return os.strerror(error.errno)
        refused = re.search(r"Errno (\d+)", str(error))  # asyncio's "Multiple exceptions" of several addresses
        if refused is not None:
            return os.strerror(int(refused[1]))
    return redact(re.sub(r"\s+", " ", str(error) or type(error).__name__))[:300]


async def connect(choices: Iterable[Address], name: str, timeout_s: float) -> amqp.Connection:
    """Return a connection to the first of `choices` that takes it; each has `timeout_s`.

    Raises ConnectionLost where waiting may help, ConfigurationError where it won't.
    """
    failures: list[str] = []
    for address in choices:
        try:
            return await amqp.connect(address, name, timeout_s)
        except UnicodeError as error:  # of the resolver: a label that is empty or too long
            msg = f"RabbitMQ at {address}: {address.host!r} is no host name ({error})"
            raise ConfigurationError(msg) from error
        except FAULTS as error:
            if kind_of(error) == "refused":
                raise ConfigurationError(_refusal(error, address)) from error
            failures.append(f"RabbitMQ at {address}: {reason_of(error)}")
    raise ConnectionLost("; ".join(failures))


def _refusal(error: BaseException, address: Address) -> str:
    text = reason_of(error)
    if isinstance(error, FileNotFoundError):
        missing = [
            file
            for file in (address.cafile, address.certfile, address.keyfile)
            if file and not os.path.exists(file)  # noqa: PTH110
        ]
        return f"RabbitMQ at {address}: a file that the URL names isn't there: {', '.join(missing) or error.filename}"
    if isinstance(error, Closed) and error.code in (0, 501):
        return f"RabbitMQ at {address}: {text}"
    if isinstance(error, Closed) and error.code == 403 and address.external:
        return f"RabbitMQ at {address} refused the login by client certificate (auth_mechanism=external): {text}"
    if isinstance(error, Closed) and error.code == 403:
        return f"RabbitMQ at {address} refused the login of user {address.user!r}: is the password right? ({text})"
    if isinstance(error, Closed) and "not found" in text:
        return f"RabbitMQ at {address} has no vhost {address.vhost!r} ({text})"
    if isinstance(error, Closed):
        return f"RabbitMQ at {address} refuses user {address.user!r} the vhost {address.vhost!r} ({text})"
    return f"RabbitMQ at {address}: {text}"


async def declare(
    connection: amqp.Connection, declarations: Iterable[Declaration], queue: str, timeout_s: float
) -> None:
    """Declare what is missing, on a channel of its own: a 404 or 406 closes its channel.

    Raises UnsupportedTopology where one exists with other arguments, ConfigurationError where the user may not,
    ConnectionLost where waiting may help.
    """
    try:
        channel = await connection.channel(timeout_s)
        try:
            await channel.call_all(map(_declaration, declarations), timeout_s)
            await channel.close(timeout_s)
        except TimeoutError:
            channel.leave()  # or a broker that is slow to declare costs a channel a try, and there are 2047
            raise
    except FAULTS as error:
        text = reason_of(error)
        match kind_of(error):
            case "drift":
                # e.g. inequivalent arg 'x-max-priority' for queue 'emails' in vhost '/': received '6' but current is '10'
                hint = (
                    " (quorum or classic: is it of the other type?)"
                    if re.search(r"x-queue-type|x-dead-letter-strategy|x-max-priority", text)
                    else ""
                )
                msg = f"queue {queue!r}: what RabbitMQ has differs from what leveret declares, and is left as it is{hint}: {text}"
                raise UnsupportedTopology(msg, queue=queue) from error
            case "refused":
                msg = f"RabbitMQ at {connection.address} refuses user {connection.address.user!r} to declare queue {queue!r}: {text}"
                raise ConfigurationError(msg) from error
            case _:
                msg = f"queue {queue!r} could not be declared: {text}"
                raise ConnectionLost(msg) from error


def _declaration(record: Declaration) -> Frame:
    if isinstance(record, Exchange):
        return commands.Exchange.Declare(
            exchange=record.name, exchange_type=record.kind, durable=True, arguments=cast("Any", record.arguments)
        )
    if isinstance(record, Binding):
        if record.to == "queue":
            return commands.Queue.Bind(queue=record.destination, exchange=record.source, routing_key=record.key)
        return commands.Exchange.Bind(destination=record.destination, source=record.source, routing_key=record.key)
    return commands.Queue.Declare(queue=record.name, durable=True, arguments=cast("Any", record.arguments))


async def settled(channel: Channel, queues: Iterable[str], timeout_s: float) -> None:
    """Return once quorum `queues` have all that was settled on `channel` before, which is then to be closed.

    The answer to channel.close doesn't say that. A channel hands a quorum queue 32 settlements; the rest it keeps until
    those are in the queue's log, and forgets when it is closed (`SOFT_LIMIT` in RabbitMQ's rabbit_fifo_client). A
    basic.get is answered out of the same log, after them. What it takes goes back with the close. On a channel that is
    closed already there is nothing to wait for.
    """
    if channel.closed is None:
        for queue in queues:
            await channel.get(queue, timeout_s)
