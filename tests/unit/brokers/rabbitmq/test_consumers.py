"""One consuming connection: when a queue that a node doesn't know is declared again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from leveret.broker import Subscription
from leveret.brokers.rabbitmq import consumers as module
from leveret.brokers.rabbitmq import topology
from leveret.brokers.rabbitmq.address import addresses
from leveret.brokers.rabbitmq.connection import Connection
from leveret.brokers.rabbitmq.consumers import Consumers, Home, Wanted
from leveret.brokers.rabbitmq.nodes import Nodes
from leveret.brokers.rabbitmq.session import ConnectionLost
from leveret.errors import ConfigurationError
from leveret.job import Queue
from leveret.runtime import Runtime

QUEUE = Queue("emails")
HERE, GONE = (0, 1), None


class Other:
    """A connection to another node."""

    closed = False

    async def close(self) -> None:
        self.closed = True


async def declared(
    monkeypatch: pytest.MonkeyPatch, url: str, here: object, there: object, *, known: bool = True
) -> tuple[bool, list[str]]:
    """Declare QUEUE on the first node of `url`, which knows it or not, as another does; return whether it was, and who was asked."""
    nodes, other, asked, done = Nodes(addresses(url)), Other(), list[str](), list[str]()
    main = SimpleNamespace(address=nodes.addresses[0], usable=True)

    async def connect(name: str, timeout_s: float, *, besides: Any = None) -> Any:
        asked.append(next(str(address) for address in nodes.addresses if address != besides))
        if isinstance(there, Exception):
            raise there
        return other

    async def counts(connection: Any, names: Iterable[str], timeout_s: float) -> dict[str, object]:
        return dict.fromkeys(names, here if connection is main else there)

    async def declare(connection: Any, declarations: Any, queue: str, timeout_s: float) -> None:
        done.append(queue)

    monkeypatch.setattr(nodes, "connect", connect)
    monkeypatch.setattr(module, "counts", counts)
    monkeypatch.setattr(module, "declare", declare)
    known_names = {QUEUE.name} if known else set[str]()
    nobody = cast("Any", None)
    home = Home(nodes, Runtime(app="test"), nobody, nobody, lambda: None, known_names, failed=nobody)
    consumers = Consumers(home, cast("Connection", main))
    with contextlib.suppress(ConnectionLost):
        await consumers._declare(Wanted(Subscription(QUEUE, 1), topology.physicals(QUEUE)))
    if asked and not isinstance(there, Exception):
        assert other.closed
    return bool(done), asked


@pytest.mark.parametrize(
    ("url", "here", "there", "expected"),
    [
        ("amqp://a/", GONE, HERE, (True, [])),
        ("amqp://a/,amqp://b/", HERE, HERE, (True, [])),
        ("amqp://a/,amqp://b/", GONE, GONE, (True, ["b:5672"])),
        ("amqp://a/,amqp://b/", GONE, HERE, (False, ["b:5672"])),
        ("amqp://a/,amqp://b/", GONE, ConnectionLost("down"), (False, ["b:5672"])),
        ("amqp://a/,amqp://b/", GONE, ConfigurationError("refused"), (False, ["b:5672"])),
        ("amqp://a/?cluster=true", GONE, HERE, (False, ["a:5672"])),
        ("amqp://a/?cluster=true", GONE, GONE, (True, ["a:5672"])),
    ],
)
async def test_a_vanished_queue_is_declared_again_only_if_another_node_agrees(
    monkeypatch: pytest.MonkeyPatch, url: str, here: object, there: object, expected: tuple[bool, list[str]]
) -> None:
    """A node that was reset knows no queue: one that is declared there is empty, and hides the jobs that the others have."""
    assert await declared(monkeypatch, url, here, there) == expected


async def test_a_queue_that_was_never_consumed_is_declared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first worker of a new queue would wait for nodes that are down."""
    assert await declared(monkeypatch, "amqp://a/,amqp://b/", GONE, HERE, known=False) == (True, [])
