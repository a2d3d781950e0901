"""Connecting to one of several nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import cast

import pytest

from leveret.brokers.rabbitmq import nodes as module
from leveret.brokers.rabbitmq.address import Address, addresses
from leveret.brokers.rabbitmq.connection import Connection
from leveret.brokers.rabbitmq.nodes import Nodes
from leveret.brokers.rabbitmq.session import ConnectionLost
from leveret.brokers.rabbitmq.wire import Closed
from leveret.errors import ConfigurationError


class Opened:
    """A connection to a host."""

    def __init__(self, host: str) -> None:
        self.host = host


async def host_of(connecting: Awaitable[Connection]) -> str:
    """Return the host of the connection that is made."""
    return cast("Opened", await connecting).host


class Net:
    """What each host of `amqp://a/,amqp://b/,amqp://c/` does to those who connect: an error, an answer (None) or silence (...)."""

    def __init__(self, **hosts: object) -> None:
        self.hosts = hosts
        self.tried: list[str] = []
        self.limits_s: list[float] = []
        """How long each that was tried may take."""
        self.nodes = Nodes(addresses(",".join(f"amqp://{host}/" for host in hosts)))

    async def connect(self, address: Address, name: str, timeout_s: float) -> Connection:
        self.tried.append(address.host)
        self.limits_s.append(timeout_s)
        answer = self.hosts[address.host]
        if answer is ...:
            await asyncio.sleep(timeout_s)
            raise TimeoutError
        if isinstance(answer, BaseException):
            raise answer
        return cast("Connection", Opened(address.host))


def net(monkeypatch: pytest.MonkeyPatch, **hosts: object) -> Net:
    """Put `hosts` in the place of the network."""
    made = Net(**hosts)
    monkeypatch.setattr(module, "connect", made.connect)
    return made


DOWN = ConnectionRefusedError(111, "Connection refused")
LOGIN = Closed("connection", 403, "ACCESS_REFUSED - Login was refused")
VHOST = Closed("connection", 530, "NOT_ALLOWED - vhost shop not found")


async def test_a_node_that_answered_is_tried_first_and_one_that_failed_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hung node that each try begins with costs every reconnect its whole patience."""
    there = net(monkeypatch, a=DOWN, b=None, c=None)

    assert await host_of(there.nodes.connect("test", 1)) == "b"
    assert await host_of(there.nodes.connect("test", 1)) == "b"
    there.nodes.leave(there.nodes.addresses[1])
    assert await host_of(there.nodes.connect("test", 1)) == "c"
    there.nodes.leave(there.nodes.addresses[1])  # another of its connections, later
    assert await host_of(there.nodes.connect("test", 1)) == "c"
    assert there.tried == ["a", "b", "b", "c", "c"]


async def test_silent_nodes_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds at each silent address leave nothing for the node that would answer."""
    there = net(monkeypatch, a=..., b=..., c=None)

    assert await host_of(there.nodes.connect("test", 0.3)) == "c"
    assert max(there.limits_s[:2]) < 0.11
    there.hosts["c"] = ...
    with pytest.raises(ConnectionLost, match="a:5672: no answer in time"):
        await there.nodes.connect("test", 0.1)


@pytest.mark.parametrize(
    ("answers", "refuses"),
    [((LOGIN, DOWN), False), ((DOWN, VHOST), False), ((LOGIN, VHOST), True), ((LOGIN, None), None)],
)
async def test_the_refusal_of_one_node_does_not_speak_for_the_others(
    monkeypatch: pytest.MonkeyPatch, answers: Sequence[object], refuses: bool | None
) -> None:
    """A node that was reset, and knows no user yet, would end every worker that meets it first."""
    there = net(monkeypatch, a=answers[0], b=answers[1])

    if refuses is None:
        assert await host_of(there.nodes.connect("test", 1)) == "b"
        return
    with pytest.raises(ConfigurationError if refuses else ConnectionLost) as raised:
        await there.nodes.connect("test", 1)
    assert "a:5672" in str(raised.value)
    assert "b:5672" in str(raised.value)


async def test_another_node_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is asked about itself agrees with itself."""
    there = net(monkeypatch, a=None, b=None)

    assert await host_of(there.nodes.connect("test", 1, besides=there.nodes.addresses[0])) == "b"
