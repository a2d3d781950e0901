"""The address of a PostgreSQL, read from its URL; connecting to it, and the words for what stands in the way."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias
from urllib.parse import parse_qsl, urlencode, urlsplit

import asyncpg
import msgspec

from leveret.errors import BrokerUnavailable, ConfigurationError, LeveretError
from leveret.settings import redact, redact_url

from .schema import check_name

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

_OURS: Final = {"schema", "prepared"}
# Of libpq's parameters those that asyncpg knows: it sends any other to the server as a setting.
_LIBPQ: Final = {
    "application_name",
    "database",
    "dbname",
    "gsslib",
    "host",
    "krbsrvname",
    "passfile",
    "password",
    "port",
    "service",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
    "sslcert",
    "sslcrl",
    "sslkey",
    "sslmode",
    "sslnegotiation",
    "sslpassword",
    "sslrootcert",
    "target_session_attrs",
    "user",
}
_SESSIONS: Final = ("any", "primary", "standby", "prefer-standby", "read-write", "read-only")
_FILES: Final = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
_MIN_SERVER: Final = 14


class Address(msgspec.Struct, frozen=True):
    """A database and a schema in it; printed without the password."""

    dsn: str
    """The URL as asyncpg takes it."""
    schema: str = "leveret"
    prepared: bool = True
    """Whether statements may stay prepared on a connection; not behind a pooler that forgets them."""

    def each(self) -> list[Address]:
        """Return an address for each host of the URL."""
        parts = urlsplit(self.dsn)
        login, at, hosts = parts.netloc.rpartition("@")
        query = dict(parse_qsl(parts.query))
        names = query.get("host", "").split(",")
        if len(names) > 1:
            ports = query.get("port", "").split(",")
            ports *= len(names) if len(ports) == 1 else 1
            queries = [urlencode({**query, "host": one, "port": port}) for one, port in zip(names, ports, strict=False)]
            found = [parts._replace(query=one) for one in queries]
        else:
            found = [parts._replace(netloc=f"{login}{at}{host}") for host in hosts.split(",")]
        return [msgspec.structs.replace(self, dsn=one.geturl()) for one in found]

    def missing_files(self) -> list[str]:
        """Return the parameters that name a file of a certificate which isn't there."""
        files = parse_qsl(urlsplit(self.dsn).query)
        return [f"{name}={value}" for name, value in files if name in _FILES and not Path(value).exists()]

    def __str__(self) -> str:
        return redact_url(self.dsn.partition("?")[0])

    def __repr__(self) -> str:
        return f"Address({self}, schema={self.schema})"


def address_of(url: str) -> Address:
    """Return the address in `url`; ConfigurationError if it can't be read.

    The form is postgresql://user:password@host1:5432,host2/db?schema=leveret&prepared=on, with libpq's parameters; postgres:// is
    the same. What is left out comes from libpq's environment variables, such as PGPASSWORD.
    """
    shown = redact_url(url)

    def refused(why: str) -> ConfigurationError:
        return ConfigurationError(f"the URL {shown!r} {why}")

    try:
        parts = urlsplit(url)
    except ValueError:  # its message could show a part of the password
        raise refused("can't be read: the special characters of a password must be percent-encoded") from None
    login, _, hosts = parts.netloc.rpartition("@")
    if "@" in login or parts.fragment:
        raise refused("can't be read: / # ? @ : in a password must be written %2F %23 %3F %40 %3A")
    for host in hosts.split(","):
        name, colon, port = host.rpartition(":")
        if colon and not host.endswith("]") and not (port.isdecimal() and 0 < int(port) < 65536):
            raise refused(
                "can't be read: a port must be a number, and / # ? @ : in a password must be written %2F %23 %3F %40 %3A"
            )
        if hosts and not (name if colon else host):
            raise refused("names no host before a port or a comma; write postgresql://host1,host2/database")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := query.keys() - _OURS - _LIBPQ:
        raise refused(f"has the unknown parameter {min(unknown)!r}; known are {', '.join(sorted(_OURS | _LIBPQ))}")
    schema, prepared = query.pop("schema", "leveret"), query.pop("prepared", "on")
    check_name(schema)
    if prepared not in {"on", "off"}:
        raise refused(f"has prepared={prepared}: it must be on or off")
    if (session := query.get("target_session_attrs", "any")) not in _SESSIONS:
        raise refused(f"has target_session_attrs={session}: it must be one of {', '.join(_SESSIONS)}")
    if "," in f"{hosts}{query.get('host', '')}":
        query.setdefault("target_session_attrs", "read-write")
    dsn = parts._replace(scheme="postgresql", query=urlencode(query)).geturl()
    return Address(dsn, schema, prepared == "on")


async def connect(address: Address, timeout_s: float, *, prepared: bool, name: str) -> Connection:
    """Return a new connection; ConfigurationError where waiting won't help, else BrokerUnavailable.

    Of several hosts each is tried twice: a host that is gone gives no answer, and mustn't use up the time of the next one.
    """
    hosts = address.each()
    if len(hosts) == 1:
        return await _connect(hosts[0], timeout_s, prepared=prepared, name=name)
    refused: dict[str, str] = {}
    for share in (1 / 3, 2 / 3):
        for host in hosts:
            try:
                return await _connect(host, timeout_s * share / len(hosts), prepared=prepared, name=name)
            except BrokerUnavailable as error:
                refused[host.dsn] = str(error)
    raise BrokerUnavailable("; ".join(refused.values()))


async def _connect(address: Address, timeout_s: float, *, prepared: bool, name: str) -> Connection:
    try:
        connection = await asyncpg.connect(
            address.dsn,
            timeout=timeout_s,
            statement_cache_size=100 if prepared else 0,
            server_settings={"application_name": name},
        )
    except Exception as error:
        raise refusal(error, address) from error
    if (version := connection.get_server_version().major) < _MIN_SERVER:
        connection.terminate()
        msg = f"the server of {address} is PostgreSQL {version}; leveret needs {_MIN_SERVER} or later"
        raise ConfigurationError(msg)
    return connection


_WRONG: Final = (
    asyncpg.InvalidAuthorizationSpecificationError,  # and InvalidPasswordError, a subclass
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
    ssl.SSLError,
    ValueError,  # what asyncpg can't read, as its ClientConfigurationError
)
_BY_WORDS: Final = ("no such database", "no such user", "rejected SSL upgrade")
"""What a pooler says under a code that it also has for other errors, and asyncpg of a server without TLS."""


def refusal(error: Exception, address: Address) -> LeveretError:
    """Return what stands in the way of a connection, as one line: ConfigurationError where waiting won't help."""
    said = " ".join(str(error).split()) or type(error).__name__
    wrong = isinstance(error, _WRONG) and not isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError))
    if isinstance(error, TimeoutError):
        said = "no answer in time"
    elif isinstance(error, FileNotFoundError) and (missing := address.missing_files()):
        said, wrong = f"no such file: {', '.join(missing)}", True
    msg = f"{address}: {redact(said)}"
    if wrong or any(words in said for words in _BY_WORDS):
        return ConfigurationError(msg)
    return BrokerUnavailable(msg)
