"""TLS against real nodes: what is trusted, who logs in by certificate, and what a wrong port or file says."""

from __future__ import annotations

import asyncio
import gc
import ssl
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Protocol

import pytest
import pytest_asyncio
import trustme
from pamqp import commands

from leveret.brokers.rabbitmq import RabbitSettings
from leveret.brokers.rabbitmq.address import addresses
from leveret.brokers.rabbitmq.nodes import Nodes
from leveret.errors import ConfigurationError
from tests.nodes import free_ports
from tests.rabbit.node import Installation, Node, Rabbit

pytestmark = [pytest.mark.rabbit, pytest.mark.fault, pytest.mark.timeout(180)]

PASSWORD = "s3cret-pa55"


@dataclass(frozen=True)
class Secured:
    """A node with a TLS port, and the folder with the files of its authorities."""

    node: Node
    port: int
    folder: Path

    def url(
        self,
        query: str = "cafile={ca}",
        *,
        host: str = "localhost",
        login: str = "guest:guest",
        scheme: str = "amqps",
        port: int = 0,
    ) -> str:
        """Return a URL of the TLS port, or of `port`; {ca}, {other}, {client} … in `query` are replaced by the paths of files."""
        named = {file.stem: str(file) for file in self.folder.iterdir()}
        return f"{scheme}://{login}@{host}:{port or self.port}/?{query.format_map(named)}"


async def accepts(port: int) -> bool:
    """Return whether something listens on `port` of 127.0.0.1."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.transport.abort()
    return True


class Secure(Protocol):
    """Starts a node with a certificate for localhost by the authority in ca.pem; other.pem is another authority."""

    def __call__(
        self, *, conf: Mapping[str, str] | None = None, expired: bool = False, plugins: Sequence[str] = ()
    ) -> Awaitable[Secured]: ...


@pytest_asyncio.fixture
async def secured(rabbit_found: Rabbit | Installation, tmp_path: Path) -> AsyncGenerator[Secure]:
    """Start nodes with TLS; skip if the tests can't run a node."""
    started: list[Node] = []

    async def start(
        *, conf: Mapping[str, str] | None = None, expired: bool = False, plugins: Sequence[str] = ()
    ) -> Secured:
        if not isinstance(rabbit_found, Installation):
            pytest.skip(rabbit_found.why_no_levers)
        authority, other = trustme.CA(), trustme.CA()
        yesterday = datetime.now(tz=timezone.utc) - timedelta(days=1)
        server = authority.issue_cert("localhost", not_after=yesterday if expired else None)
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        other.cert_pem.write_to_path(tmp_path / "other.pem")
        for name, issuer, common_name in (
            ("client", authority, "guest"),
            ("stranger", authority, "stranger"),
            ("forged", other, "guest"),
        ):
            # RabbitMQ reads the login out of the common name
            issued = issuer.issue_cert("a@example.org", common_name=common_name)
            issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / f"{name}.pem")
        [port] = free_ports(1)
        node = Node(
            rabbit_found,
            conf={"listeners.ssl.default": f"127.0.0.1:{port}", "ssl_options.verify": "verify_none", **(conf or {})},
            plugins=plugins,
        )
        started.append(node)
        with (node.folder / "rabbitmq.conf").open("a") as config:  # the files must be in a folder that the node sees
            for option, pem in (
                ("cacertfile", authority.cert_pem),
                ("certfile", server.cert_chain_pems[0]),
                ("keyfile", server.private_key_pem),
            ):
                pem.write_to_path(node.folder / option)
                config.write(f"ssl_options.{option} = {rabbit_found.inside(node.folder)}/{option}\n")
        await node.start()
        async with asyncio.timeout(30):
            while not await accepts(port):  # RabbitMQ 4 opens the TLS port after the plain port
                await asyncio.sleep(0.05)
        return Secured(node, port, tmp_path)

    yield start
    for node in started:
        await node.close()


async def works(url: str) -> None:
    """Connect to `url` and make a call."""
    connection = await Nodes(addresses(url, RabbitSettings(heartbeat_s=60))).connect("test", 10)
    try:
        channel = await connection.channel(10)
        await channel.call(commands.Queue.Declare(queue="tls", exclusive=True), 10)
        assert (vars(connection)["_transport"].get_extra_info("ssl_object") is not None) is url.startswith("amqps")
    finally:
        await connection.close()


async def refusal(url: str) -> str:
    """Return the text of the ConfigurationError for `url`, which must be one line without the password."""
    with pytest.raises(ConfigurationError) as refused:
        await Nodes(addresses(url, RabbitSettings(heartbeat_s=60))).connect("test", 10)
    text = str(refused.value)
    assert "\n" not in text
    assert PASSWORD not in text
    return text


async def test_only_a_certificate_of_the_right_authority_and_name_is_trusted(secured: Secure, tmp_path: Path) -> None:
    """Whoever sits between could read every job and its password; and a wrong file must be told from an outage."""
    server = await secured()
    await works(server.url())
    login = f"guest:{PASSWORD}"
    assert "refused the login of user 'guest'" in await refusal(server.url(login=login))
    assert "self-signed certificate in certificate chain" in await refusal(server.url("", login=login))
    assert "certificate" in await refusal(server.url("cafile={other}", login=login))
    assert "IP address mismatch" in await refusal(server.url(host="127.0.0.1", login=login))
    missing = await refusal(server.url(f"cafile={tmp_path}/gone.pem", login=login))
    assert f"{tmp_path}/gone.pem" in missing
    (tmp_path / "empty.pem").write_text("")
    assert "TLS: " in await refusal(server.url("cafile={empty}", login=login))

    # a wrong scheme: never a fall back to plain, in either direction
    assert "amqps://" in await refusal(server.url("", scheme="amqp", login=login))
    assert "does that port speak TLS?" in await refusal(server.url(port=server.node.port, login=login))
    await asyncio.sleep(0)
    gc.collect()  # an unclosed socket is a ResourceWarning, which is an error here


async def test_an_expired_certificate_is_refused(secured: Secure) -> None:
    """The commonest fault of TLS in production: the operator has to read that word."""
    server = await secured(expired=True)
    assert "certificate has expired" in await refusal(server.url(login=f"guest:{PASSWORD}"))


async def test_a_client_certificate_is_asked_for_and_logs_in(secured: Secure) -> None:
    """A node that takes clients by certificate: the missing one must be named, not tried for ever."""
    server = await secured(
        conf={
            "ssl_options.verify": "verify_peer",
            "ssl_options.fail_if_no_peer_cert": "true",
            "auth_mechanisms.1": "EXTERNAL",
            "auth_mechanisms.2": "PLAIN",
            "ssl_cert_login_from": "common_name",
        },
        plugins=["rabbitmq_auth_mechanism_ssl"],
    )
    await works(server.url("cafile={ca}&certfile={client}"))
    await works(server.url("cafile={ca}&certfile={client}&auth_mechanism=external", login=f"ignored:{PASSWORD}"))
    assert "asks for a client certificate" in await refusal(server.url(login=f"guest:{PASSWORD}"))
    assert "doesn't trust the client certificate" in await refusal(server.url("cafile={ca}&certfile={forged}"))
    strange = await refusal(
        server.url("cafile={ca}&certfile={stranger}&auth_mechanism=external", login=f"ignored:{PASSWORD}")
    )
    assert "by client certificate" in strange
    assert "ignored" not in strange


def test_a_key_that_isnt_the_certificates_is_an_error_of_tls(tmp_path: Path) -> None:
    """It must be told as a wrong file before anything is sent."""
    authority = trustme.CA()
    one, two = authority.issue_cert("a.example"), authority.issue_cert("b.example")
    one.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    two.private_key_pem.write_to_path(tmp_path / "key.pem")
    [address] = addresses(
        f"amqps://localhost/?certfile={tmp_path}/cert.pem&keyfile={tmp_path}/key.pem", RabbitSettings(heartbeat_s=60)
    )
    with pytest.raises(ssl.SSLError, match="KEY_VALUES_MISMATCH"):
        address.tls()
