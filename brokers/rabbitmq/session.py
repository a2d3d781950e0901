"""Declare a topology, wait for settlements, and say what each error of a connection means."""

from __future__ import annotations

import errno
import logging
import os
import re
import ssl
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

from pamqp import commands
from pamqp.base import Frame

from leveret.errors import ConfigurationError, UnsupportedTopology
from leveret.settings import redact

from .channel import Channel, Got
from .connection import Connection
from .topology import Binding, Declaration, Exchange, PhysicalQueue
from .wire import Closed

logger = logging.getLogger("leveret.rabbitmq")


class ConnectionLost(Exception):
    """The connection is lost, or could not be opened; the text says why. Waiting may help."""


class Sick(Exception):
    """A physical queue can't be consumed: its consume isn't answered, or ends the connection. Other queues aren't concerned."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name} can't be consumed: {why}")
        self.name = name


Kind = Literal["lost", "refused", "drift"]

FAULTS = (Closed, OSError, TimeoutError)
"""The exceptions that a connection raises; `ssl.SSLError` is an OSError."""

_DRIFT = re.compile(r"inequivalent arg|invalid arg|invalid property|unknown exchange type")
_MISSING = re.compile(r"no (?:exchange|queue) '([^']*)'")
_TOO_LARGE = re.compile(r"message size \d+ .*larger than .*?(\d+)")
_LIMIT = re.compile(r"limit \(\d+\) is reached")
"""A limit on connections, of a vhost, a user or the node. The text says "refused", but there is room once another connection closes."""


_TLS_HINTS = (
    ("WRONG_VERSION_NUMBER", "does that port speak TLS?"),
    ("RECORD_LAYER_FAILURE", "does that port speak TLS?"),  # the same error, in OpenSSL 3.2
    ("ALERT_CERTIFICATE_REQUIRED", "the broker asks for a client certificate: set certfile and keyfile in the URL"),
    ("ALERT_UNKNOWN_CA", "the broker doesn't trust the client certificate in certfile"),
)


def kind_of(error: BaseException) -> Kind:
    """Return what `error` means: "lost" (try again), "refused" (waiting won't help), "drift" (the broker's object differs)."""
    if (
        isinstance(error, Closed)
        and isinstance(alert := error.__cause__, ssl.SSLError)
        and "_ALERT_" in (alert.reason or "")
    ):
        return "refused"  # in TLS 1.3 the server refuses a client's certificate after the client has finished its handshake
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
        case 406 if _DRIFT.search(error.text):  # other 406s: a replica that isn't ready yet, an unknown delivery tag
            return "drift"
        case 530 if (
            error.scope == "connection"
            and not _LIMIT.search(error.text)
            and re.search(r"vhost .* not found|refused", error.text)
        ):
            return "refused"
        case _:
            return "lost"


def size_limit(why: Closed) -> int | None:
    """Return the largest body that the broker takes, if it closed a channel because of a larger one."""
    found = _TOO_LARGE.search(why.text) if why.code == 406 else None
    return None if found is None else int(found[1])


def reason_of(error: BaseException) -> str:
    """Return `error` as one line for people, without any password of a URL."""
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


async def declare(connection: Connection, declarations: Sequence[Declaration], queue: str, timeout_s: float) -> None:
    """Declare `declarations` on a new channel, since a 404 or 406 closes the channel.

    Raises UnsupportedTopology if one exists with other arguments, ConfigurationError if the user isn't permitted,
    ConnectionLost if waiting may help.
    """
    try:
        channel = await connection.channel(timeout_s)
        try:
            await channel.call_all(map(_declaration, declarations), timeout_s)
            await channel.close(timeout_s)
        except TimeoutError:
            channel.leave()  # otherwise each attempt on a slow broker would leave a channel open, and a connection has 2047
            raise
    except FAULTS as error:
        text = reason_of(error)
        match kind_of(error):
            case "drift":
                msg = f"queue {queue!r}: {difference(queue, declarations, text)}. RabbitMQ says: {text}"
                raise UnsupportedTopology(msg, queue=queue) from error
            case "refused":
                msg = f"RabbitMQ at {connection.address} doesn't let user {connection.address.user!r} declare queue {queue!r}: {text}"
                raise ConfigurationError(msg) from error
            case _:
                msg = f"queue {queue!r} could not be declared: {text}"
                raise ConnectionLost(msg) from error


def difference(queue: str, declarations: Sequence[Declaration], text: str) -> str:
    """Return what differs between the app's queue and the broker's, as far as RabbitMQ's `text` tells, and what to do.

    RabbitMQ names one argument, the first that differs: inequivalent arg 'x-max-priority' for queue 'emails' in vhost '/':
    received none but current is the value '6' of type 'byte'. Only quorum queues have a strategy and an overflow, and only
    classic ones a priority.
    """
    declared = [one for one in declarations if isinstance(one, PhysicalQueue) and one.name == queue]
    kind = declared[0].arguments["x-queue-type"] if declared else None
    differs = "its topology on RabbitMQ differs from what leveret declares"
    if kind == "classic" and "x-max-priority" in text:
        priorities = "x-max-priority" in declared[0].arguments
        differs = f"the app declares Queue({priorities=}), the broker has a queue with other priorities"
    elif kind is not None and re.search("x-queue-type|x-dead-letter-strategy|x-overflow|x-max-priority", text):
        other = "classic" if kind == "quorum" else "quorum"
        differs = f"the app declares Queue(type={kind!r}), the broker has a {other} queue"
    return f"{differs}. Nothing was changed: correct the Queue in code, or let workers empty the queue on the broker and delete it"


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


async def counts(connection: Connection, names: Iterable[str], timeout_s: float) -> dict[str, tuple[int, int] | None]:
    """Return how many messages and how many consumers each physical queue has; None for a queue that doesn't exist.

    Costs the broker next to nothing, and harms no queue. A quorum queue without a leader has "0 messages, 0 consumers".
    """
    found: dict[str, tuple[int, int] | None] = {}
    channel: Channel | None = None
    try:
        for name in names:
            if channel is None or channel.closed is not None:
                channel = await connection.channel(timeout_s)
            try:
                answer = await channel.call(commands.Queue.Declare(queue=name, passive=True), timeout_s)
            except Closed as closed:
                if closed.scope != "channel" or closed.code != 404:
                    raise
                found[name] = None
            else:
                found[name] = (int(getattr(answer, "message_count", 0)), int(getattr(answer, "consumer_count", 0)))
    finally:
        if channel is not None and channel.closed is None:
            channel.leave()
    return found


async def missing(connection: Connection, exchanges: Iterable[str], queue: str, timeout_s: float) -> str | None:
    """Return the name of the first of `exchanges` and `queue` that doesn't exist; None if all exist. Declares nothing."""
    channel = await connection.channel(timeout_s)
    asked: list[Frame] = [commands.Exchange.Declare(exchange=name, passive=True) for name in exchanges]
    try:
        await channel.call_all([*asked, commands.Queue.Declare(queue=queue, passive=True)], timeout_s)
    except Closed as closed:
        if closed.scope == "channel" and closed.code == 404 and (found := _MISSING.search(closed.text)):
            return found[1]
        raise
    finally:
        if channel.closed is None:
            channel.leave()
    return None


async def settled(channel: Channel, queue: str, timeout_s: float) -> Got | None:
    """Return once quorum queue `queue` has received every settlement written to `channel`; the caller then closes the channel.

    The answer to channel.close doesn't prove this. A channel hands at most 32 settlements to a quorum queue and keeps the
    rest until those are in the queue's log; when the channel is closed, it forgets the rest (`SOFT_LIMIT` in RabbitMQ's
    rabbit_fifo_client). A basic.get is answered out of the same log, after the settlements. Returns the message that it takes,
    if any, which goes back to the queue, as redelivered, when the channel closes. On a closed channel there is nothing to wait for.
    """
    return await channel.get(queue, timeout_s) if channel.closed is None else None
