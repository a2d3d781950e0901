"""What a URL says of a Redis, a cluster or sentinels, and which words stand for what is wrong with it."""

import ssl
from contextlib import suppress
from pathlib import Path

import pytest

from leveret.brokers.redis.address import Address, Tls, address_of
from leveret.errors import ConfigurationError


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://cache", Address(nodes=(("cache", 6379),))),
        ("redis://cache:7000/3", Address(nodes=(("cache", 7000),), db=3)),
        (
            "redis://shop:p%40ss@[::1]:7000/?confirm=fsync&prefix=shop:jobs",
            Address(nodes=(("::1", 7000),), user="shop", password="p@ss", confirm="fsync", prefix="shop:jobs"),
        ),
        ("redis://:secret@cache", Address(nodes=(("cache", 6379),), password="secret")),
        (
            "redis+cluster://one,two:7001?confirm=replica",
            Address(kind="cluster", nodes=(("one", 6379), ("two", 7001)), confirm="replica"),
        ),
        (
            "redis+sentinel://:pw@one,two:26380/mymaster/2?sentinel_password=other",
            Address(
                kind="sentinel",
                nodes=(("one", 26379), ("two", 26380)),
                password="pw",
                db=2,
                service="mymaster",
                sentinel_password="other",
            ),
        ),
        ("redis+sentinel://one/mymaster", Address(kind="sentinel", nodes=(("one", 26379),), service="mymaster")),
        (
            "rediss+cluster://one?ssl_ca_certs=ca.pem&ssl_check_hostname=false",
            Address(kind="cluster", nodes=(("one", 6379),), tls=Tls(ca_certs="ca.pem", check_hostname=False)),
        ),
    ],
)
def test_a_url_says_where_the_servers_are(url: str, address: Address) -> None:
    """A part that is read wrongly connects to another server, or to another database of it."""
    assert address_of(url) == address


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://one,two", "several hosts"),
        ("redis://cache/jobs", "the number of a database"),
        ("redis+cluster://one/1", "only the database 0"),
        ("redis+sentinel://one", "the name of the service"),
        ("redis+sentinel://one/0/x", "the name of the service"),
        ("redis://", "must name a host"),
        ("redis+cluster://one,,two", "must name a host"),
        ("redis://cache:0", "a port must be a number"),
        ("redis://u:p/w@cache", "%2F"),
        ("redis://u:p@w@cache", "%40"),
        ("redis://cache#1", "%23"),
        ("redis+socket://cache", "unknown scheme"),
        ("redis://cache?confirm=always", "memory, fsync, replica"),
        ("redis://cache?prefix={x}", "prefix={x}"),
        ("redis://cache?timeout=3", "known are confirm, prefix"),
        ("redis://cache?sentinel_password=x", "unknown parameter 'sentinel_password'"),
        ("redis://cache?ssl_ca_certs=ca.pem", "needs rediss://"),
        ("rediss://cache?ssl_check_hostname=perhaps", "true or false"),
        ("rediss://cache?ssl_cert_reqs=never", "required, optional, none"),
    ],
)
def test_a_wrong_url_is_one_line_that_says_what_is_wrong(url: str, said: str) -> None:
    """A parameter that is taken for another one is found only in production."""
    with pytest.raises(ConfigurationError) as raised:
        address_of(url)

    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://shop:hunter2@cache/0",
        "redis+cluster://shop:hunter2@one,two?confirm=always",
        "rediss+sentinel://shop:hunter2@one/mymaster?sentinel_password=hunter2",
        "redis://shop:hun@hunter2@cache",
        "redis://:hunter2@cache?confirm=x",
    ],
)
def test_the_password_is_printed_nowhere(url: str) -> None:
    """An address is part of errors and log lines."""
    with suppress(ConfigurationError):
        address = address_of(url)
        assert "hunter2" not in f"{address} {address!r}"
        return

    with pytest.raises(ConfigurationError) as raised:
        address_of(url)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "printed"),
    [
        ("redis://u:p@cache", "redis://cache:6379"),
        ("rediss://[::1]/2?prefix=x", "rediss://[::1]:6379/2"),
        ("redis+cluster://one,two:1", "redis+cluster://one:6379,two:1"),
        ("redis+sentinel://u:p@one/mymaster/1", "redis+sentinel://one:26379/mymaster/1"),
    ],
)
def test_an_address_is_printed_as_its_url(url: str, printed: str) -> None:
    """Whoever reads a log line looks for the server in it."""
    assert str(address_of(url)) == printed


def test_a_certificate_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The words "No such file" don't say which of three."""
    missing = tmp_path / "ca.pem"

    with pytest.raises(ConfigurationError, match=r"ssl_ca_certs=.*No such file"):
        Tls(ca_certs=str(missing)).context()


@pytest.mark.parametrize(
    ("tls", "mode", "hostname"),
    [
        (Tls(), ssl.CERT_REQUIRED, True),
        (Tls(check_hostname=False), ssl.CERT_REQUIRED, False),
        (Tls(cert_reqs="optional"), ssl.CERT_OPTIONAL, False),
        (Tls(cert_reqs="none"), ssl.CERT_NONE, False),
    ],
)
def test_certificates_are_checked_unless_the_url_says_otherwise(tls: Tls, mode: ssl.VerifyMode, hostname: bool) -> None:
    """A check that is left out by mistake lets anybody read the jobs."""
    context = tls.context()

    assert (context.verify_mode, context.check_hostname) == (mode, hostname)
