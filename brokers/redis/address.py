"""The address of a Redis or Valkey, read from its URL: one server, a cluster, or a primary that sentinels name."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from typing import Final, Literal, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from leveret.errors import ConfigurationError
from leveret.settings import redact_url

Confirm: TypeAlias = Literal["memory", "fsync", "replica"]
"""What has to happen before a job counts as confirmed: the server has it, has it on its disk, or a replica has it too."""
Node: TypeAlias = tuple[str, int]
"""A host and a port."""

_KINDS: Final[dict[str, Literal["server", "cluster", "sentinel"]]] = {
    "": "server",
    "cluster": "cluster",
    "sentinel": "sentinel",
}
_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
_CONFIRMS: Final[dict[str, Confirm]] = {"memory": "memory", "fsync": "fsync", "replica": "replica"}
_OURS: Final = frozenset({"confirm", "prefix"})
_TLS: Final = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname", "ssl_cert_reqs"})
_SENTINEL: Final = frozenset({"sentinel_username", "sentinel_password"})
_CERT_REQS: Final[dict[str, Literal["required", "optional", "none"]]] = {
    "required": "required",
    "optional": "optional",
    "none": "none",
}
_PREFIX: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}\Z")
_YES_NO: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_ESCAPE: Final = "/ # ? @ : in a password must be written %2F %23 %3F %40 %3A"


class Tls(msgspec.Struct, frozen=True):
    """How the server's certificate is checked, and the client's own; the names are those of redis-py without `ssl_`."""

    ca_certs: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    check_hostname: bool = True
    cert_reqs: Literal["required", "optional", "none"] = "required"

    def context(self) -> ssl.SSLContext:
        """Return the context of a connection; ConfigurationError if a file isn't there, or isn't what it should be."""
        try:
            context = ssl.create_default_context(cafile=self.ca_certs)
            if self.certfile is not None:
                context.load_cert_chain(self.certfile, self.keyfile)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            named = {"ssl_ca_certs": self.ca_certs, "ssl_certfile": self.certfile, "ssl_keyfile": self.keyfile}
            files = ", ".join(f"{name}={value}" for name, value in named.items() if value is not None)
            msg = f"the certificates of the URL can't be used ({files}): {getattr(error, 'strerror', None) or error}"
            raise ConfigurationError(msg) from error
        if self.cert_reqs != "required" or not self.check_hostname:
            context.check_hostname = False
        if self.cert_reqs != "required":
            context.verify_mode = ssl.CERT_NONE if self.cert_reqs == "none" else ssl.CERT_OPTIONAL
        return context


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where the server or the servers are, and the names of the keys on them; printed without user and password."""

    kind: Literal["server", "cluster", "sentinel"] = "server"
    nodes: tuple[Node, ...]
    """The server; some nodes of the cluster; or the sentinels."""
    user: str | None = None
    password: str | None = None
    db: int = 0
    tls: Tls | None = None
    service: str = ""
    """The name under which sentinels know the primary."""
    sentinel_user: str | None = None
    sentinel_password: str | None = None
    confirm: Confirm = "memory"
    prefix: str = "lv"

    def __str__(self) -> str:
        scheme = ("rediss" if self.tls else "redis") + ("" if self.kind == "server" else f"+{self.kind}")
        service = f"/{self.service}" if self.service else ""
        return f"{scheme}://{','.join(map(shown, self.nodes))}{service}" + (f"/{self.db}" if self.db else "")

    def __repr__(self) -> str:
        return f"Address({self}, confirm={self.confirm}, prefix={self.prefix})"


def shown(node: Node) -> str:
    """Return host:port."""
    host, port = node
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_of(url: str) -> Address:
    """Return the address in `url`; ConfigurationError if it can't be read.

    The forms are redis://user:password@host:6379/0, redis+cluster://host1,host2 and redis+sentinel://host1,host2/service/0, each
    also as rediss… with TLS, with ?confirm=memory|fsync|replica&prefix=lv.
    """
    shown_url = redact_url(url)

    def refused(why: str) -> ConfigurationError:
        return ConfigurationError(f"the URL {shown_url!r} {why}")

    try:
        parts = urlsplit(url)
    except ValueError:  # its message could show a part of the password
        raise refused("can't be read: the special characters of a password must be percent-encoded") from None
    scheme, _, kind_name = parts.scheme.partition("+")
    if scheme not in {"redis", "rediss"} or kind_name not in _KINDS:
        raise refused("has an unknown scheme; known are redis, redis+cluster and redis+sentinel, and rediss… with TLS")
    kind = _KINDS[kind_name]
    login, _, hosts = parts.netloc.rpartition("@")
    if "@" in login or parts.fragment:
        raise refused(f"can't be read: {_ESCAPE}")
    nodes = tuple(_node(host, _SENTINEL_PORT if kind == "sentinel" else _PORT) for host in hosts.split(","))
    read = [node for node in nodes if node is not None]
    if len(read) < len(nodes):
        raise refused(f"can't be read: it must name a host, a port must be a number, and {_ESCAPE}")
    if kind == "server" and len(read) > 1:
        raise refused("names several hosts; write redis+cluster:// or redis+sentinel://")
    service, db = _path(parts.path, kind)
    if db is None or (kind == "sentinel" and not service) or (kind == "cluster" and db):
        raise refused(f"has the path {parts.path!r}: {_PATHS[kind]}")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    known = set(_OURS)
    if scheme == "rediss":
        known |= _TLS
    if kind == "sentinel":
        known |= _SENTINEL
    if unknown := query.keys() - known:
        hint = "; ssl_… needs rediss://" if min(unknown) in _TLS else ""
        raise refused(f"has the unknown parameter {min(unknown)!r}; known are {', '.join(sorted(known))}{hint}")
    confirm, prefix = _CONFIRMS.get(query.get("confirm", "memory")), query.get("prefix", "lv")
    if confirm is None:
        raise refused(f"has confirm={query['confirm']}: it must be one of {', '.join(_CONFIRMS)}")
    if not _PREFIX.match(prefix):
        raise refused(f"has prefix={prefix}: it must have 1 to 64 characters of [A-Za-z0-9_.:-]")
    user, colon, password = login.partition(":")
    return Address(
        kind=kind,
        nodes=tuple(read),
        user=unquote(user) or None,
        password=unquote(password) if colon else None,
        db=db,
        tls=_tls(query, refused) if scheme == "rediss" else None,
        service=service,
        sentinel_user=query.get("sentinel_username"),
        sentinel_password=query.get("sentinel_password"),
        confirm=confirm,
        prefix=prefix,
    )


_PATHS: Final = {
    "server": "it must be the number of a database, such as /0",
    "cluster": "a cluster has only the database 0",
    "sentinel": "it must be the name of the service and the number of a database, such as /mymaster/0",
}


def _node(host: str, port: int) -> Node | None:
    name, colon, given = host.rpartition(":")
    if not colon or host.endswith("]"):
        name, given = host, str(port)
    name = name.removeprefix("[").removesuffix("]")
    if not name or not given.isdecimal() or not 0 < int(given) < 65536:
        return None
    return name, int(given)


def _path(path: str, kind: str) -> tuple[str, int | None]:
    """Return the service and the number of the database; None for what can't be read."""
    service, _, db = path.strip("/").rpartition("/")
    if kind == "sentinel" and not service:
        service, db = db, "0"
    if (service and kind != "sentinel") or "/" in service or not (db or "0").isdecimal():
        return service, None
    return unquote(service), int(db or "0")


def _tls(query: dict[str, str], refused: Callable[[str], ConfigurationError]) -> Tls:
    check = _YES_NO.get(query.get("ssl_check_hostname", "true").lower())
    if check is None:
        raise refused(f"has ssl_check_hostname={query['ssl_check_hostname']}: it must be true or false")
    reqs = _CERT_REQS.get(query.get("ssl_cert_reqs", "required"))
    if reqs is None:
        raise refused(f"has ssl_cert_reqs={query['ssl_cert_reqs']}: it must be one of {', '.join(_CERT_REQS)}")
    return Tls(query.get("ssl_ca_certs"), query.get("ssl_certfile"), query.get("ssl_keyfile"), check, reqs)
