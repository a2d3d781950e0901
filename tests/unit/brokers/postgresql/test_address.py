"""What a URL says, and which words stand for what is wrong with it."""

import ssl

import asyncpg
import pytest

from leveret.brokers.postgresql.address import Address, address_of, refusal
from leveret.errors import BrokerUnavailable, ConfigurationError


def test_leverets_own_parameters_are_taken_out_of_the_url() -> None:
    """The server refuses a connection with settings that it doesn't know."""
    address = address_of("postgresql://shop:pw@db:5433/shop?schema=jobs-2&sslmode=require&prepared=off")

    assert address == Address("postgresql://shop:pw@db:5433/shop?sslmode=require", "jobs-2", prepared=False)
    assert address_of("postgresql://db/shop") == Address("postgresql://db/shop", "leveret", prepared=True)


def test_both_names_of_the_scheme_are_one_address() -> None:
    """Hosted databases hand out postgres://. A broker and a store of one database would no longer share a transaction."""
    address = address_of("postgres://shop:pw@db/shop?schema=jobs")

    assert address == address_of("postgresql://shop:pw@db/shop?schema=jobs")
    assert str(address) == "postgresql://shop:***@db/shop"


@pytest.mark.parametrize(
    ("url", "attributes"),
    [
        ("postgresql://one,two:5433/shop", "read-write"),
        ("postgresql:///shop?host=one,two", "read-write"),
        ("postgresql://one,two/shop?target_session_attrs=primary", "primary"),
        ("postgresql://one/shop", None),
    ],
)
def test_of_several_hosts_the_one_that_takes_writes_is_used(url: str, attributes: str | None) -> None:
    """After a fail-over the first may be a standby, which refuses every job."""
    _, found, value = address_of(url).dsn.partition("target_session_attrs=")

    assert (value if found else None) == attributes


@pytest.mark.parametrize(
    ("url", "each"),
    [
        ("postgresql://u:p@one:1,two/shop", ["postgresql://u:p@one:1/shop", "postgresql://u:p@two/shop"]),
        ("postgresql://[::1]:1,[::2]/shop", ["postgresql://[::1]:1/shop", "postgresql://[::2]/shop"]),
        ("postgresql://one/shop", ["postgresql://one/shop"]),
        ("postgresql:///shop?host=one", ["postgresql:/shop?host=one"]),
        (
            "postgresql:///shop?host=one,two&port=1",
            ["postgresql:/shop?host=one&port=1", "postgresql:/shop?host=two&port=1"],
        ),
        ("postgresql:///shop?host=a,b&port=1,2", ["postgresql:/shop?host=a&port=1", "postgresql:/shop?host=b&port=2"]),
    ],
)
def test_each_host_is_an_address(url: str, each: list[str]) -> None:
    """A host that is tried at another's port is never found."""
    found = [one.dsn.replace("target_session_attrs=read-write", "").rstrip("?&") for one in address_of(url).each()]

    assert found == each


def test_the_password_is_printed_nowhere() -> None:
    """An address is part of errors and log lines."""
    address = address_of("postgresql://shop:hunter2@db/shop?sslpassword=hunter2")

    assert (str(address), repr(address)) == (
        "postgresql://shop:***@db/shop",
        "Address(postgresql://shop:***@db/shop, schema=leveret)",
    )


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("postgresql://shop:hun@ter2@db/shop", "a password must be written %2F %23 %3F %40 %3A"),
        ("postgresql://shop:hun/ter2@db/shop", "a port must be a number"),
        ("postgresql://shop:hun#ter2@db/shop", "a password must be written %2F %23 %3F %40 %3A"),
        ("postgresql://shop:ter2@db:x/shop", "a port must be a number"),
        ("postgresql://shop:ter2@db:0/shop", "a port must be a number"),
        ("postgresql://shop:ter2@one,/shop", "names no host"),
        ("postgresql://shop:ter2@[x/shop", "percent-encoded"),
        ("postgresql://shop:ter2@db/shop?shema=x", "has the unknown parameter 'shema'; known are application_name,"),
        ("postgresql://shop:ter2@db/shop?prepared=no", "has prepared=no: it must be on or off"),
        (
            "postgresql://shop:ter2@db/shop?target_session_attrs=rw",
            "has target_session_attrs=rw: it must be one of any, primary",
        ),
        ("postgresql://shop:ter2@db/shop?schema=a.b", "the schema 'a.b': its name needs"),
    ],
)
def test_a_url_that_cannot_be_used_says_what_to_change(url: str, why: str) -> None:
    """A part of a password could be taken for a host, and looked up, and printed."""
    with pytest.raises(ConfigurationError) as refused:
        address_of(url)

    assert why in str(refused.value)
    assert "ter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (asyncpg.InvalidPasswordError('password authentication failed for user "shop"'), ConfigurationError),
        (asyncpg.InvalidCatalogNameError('database "shop" does not exist'), ConfigurationError),
        (asyncpg.ProtocolViolationError("no such database: shop"), ConfigurationError),
        (ConnectionError('PostgreSQL server at "db:5432" rejected SSL upgrade'), ConfigurationError),
        (ssl.SSLCertVerificationError("certificate verify failed"), ConfigurationError),
        (FileNotFoundError("a socket of this machine's server"), BrokerUnavailable),
        (ssl.SSLEOFError("EOF occurred in violation of protocol"), BrokerUnavailable),
        (asyncpg.ProtocolViolationError("server login has been failing"), BrokerUnavailable),
        (asyncpg.CannotConnectNowError("the database system is starting up"), BrokerUnavailable),
        (asyncpg.TargetServerAttributeNotMatched("none of the hosts match"), BrokerUnavailable),
        (ConnectionRefusedError("[Errno 111] Connect call failed"), BrokerUnavailable),
        (TimeoutError(), BrokerUnavailable),
    ],
)
def test_only_what_time_mends_is_tried_again(error: Exception, kind: type[Exception]) -> None:
    """A worker would try a wrong password for ever, or give up during a restart of the server."""
    found = refusal(error, Address("postgresql://shop:hunter2@db/shop"))

    assert type(found) is kind
    assert str(found).startswith("postgresql://shop:***@db/shop: ")
    assert len(str(found)) > len("postgresql://shop:***@db/shop: ")
