"""The ports of the tests' servers."""

import pytest

from tests import nodes


def test_no_port_is_given_to_two_servers_that_start_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of six chooses all its ports before it starts a server: in 2 of 100, two had the same, and the second one ended at once."""
    monkeypatch.setattr(nodes, "_given", set[int]())

    ports = [port for _ in range(50) for port in nodes.free_ports(3)]

    assert len(set(ports)) == len(ports)
