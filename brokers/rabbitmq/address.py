"""The address of a RabbitMQ, read from its URL."""

from __future__ import annotations

import re
import ssl
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from leveret.errors import ConfigurationError
from leveret.settings import redact_url

from .settings import RabbitSettings

_KNOWN = (
    "heartbeat_s",
    "heartbeat",
    "consumer_timeout_s",
    "cluster",
    "cafile",
    "certfile",
    "keyfile",
    "auth_mechanism",
)


class Address(msgspec.Struct, frozen=True):
    """Host, port, vhost and login; printed without the password."""

    host: str
    port: int
    vhost: str
    user: str
    password: str
    secure: bool
    heartbeat_s: int
    consumer_timeout_s: float
    cluster: bool = False
    """The address stands for several nodes, as a load balancer's does."""
    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    external: bool = False
    """The client certificate is the login (SASL EXTERNAL)."""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def __repr__(self) -> str:
        return f"Address({self})"

    def login(self) -> tuple[str, str]:
        """Return the SASL mechanism and its response."""
        return ("EXTERNAL", "") if self.external else ("PLAIN", f"\0{self.user}\0{self.password}")

    def tls(self) -> ssl.SSLContext | None:
        """Return the TLS context; None for amqp://. FileNotFoundError or SSLError if a file can't be used."""
        if not self.secure:
            return None
        context = ssl.create_default_context(cafile=self.cafile)
        if self.certfile is not None:
            context.load_cert_chain(self.certfile, self.keyfile)
        return context


_DEFAULTS = RabbitSettings()


def addresses(text: str, settings: RabbitSettings = _DEFAULTS) -> tuple[Address, ...]:
    """Return the addresses in `text`: one URL, or several separated by commas. ConfigurationError for an invalid URL.

    The form is amqp(s)://user:password@host:port/vhost?heartbeat_s=…&consumer_timeout_s=…&cluster=… with times in seconds. The
    URL wins over `settings`; AMQP's usual `heartbeat` is read too. For TLS there are cafile, certfile, keyfile, and
    auth_mechanism=external, which logs in with the certificate. The vhost may be empty or / (both mean /), or percent-encoded.
    """
    return tuple(_address(part.strip(), settings) for part in re.split(r",(?=\s*amqps?://)", text))


def _address(text: str, settings: RabbitSettings) -> Address:
    shown = redact_url(text)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
        query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    except ValueError:  # the error's text could show the part of the password before a # or /
        msg = f"the broker's URL {shown!r} can't be read: the port must be a number, and / # ? @ : in a password must be written %2F %23 %3F %40 %3A"
        raise ConfigurationError(msg) from None
    if parts.scheme not in ("amqp", "amqps") or not host:
        msg = f"the broker's URL {shown!r} names no host: write amqp://host/vhost, with user:password@ before the host"
        raise ConfigurationError(msg)
    if port == 0:
        msg = f"the broker's URL {shown!r}: nothing listens on port 0; leave the port out for {5671 if parts.scheme == 'amqps' else 5672}"
        raise ConfigurationError(msg)
    vhost = "/" if parts.path in ("", "/") else unquote(parts.path[1:])
    if len(vhost.encode()) > 255:
        msg = f"the broker's URL {shown!r}: a vhost has at most 255 bytes, not {len(vhost.encode())}"
        raise ConfigurationError(msg)
    for name in query:
        if name not in _KNOWN:
            msg = f"the broker's URL {shown!r}: unknown parameter {name!r}; known are {', '.join(_KNOWN)}"
            raise ConfigurationError(msg)
    heartbeat = query.get("heartbeat_s") or query.get("heartbeat") or str(max(1, round(settings.heartbeat_s)))
    if not heartbeat.isdecimal() or not 1 <= int(heartbeat) <= 3600:
        msg = f"the broker's URL {shown!r}: heartbeat_s must be 1 to 3600 whole seconds, not {heartbeat!r}"
        raise ConfigurationError(msg)
    held = query.get("consumer_timeout_s", f"{settings.consumer_timeout_s}")
    if not re.fullmatch(r"\d{1,9}(\.\d*)?", held, re.ASCII) or float(held) <= 0:
        msg = f"the broker's URL {shown!r}: consumer_timeout_s must be a number of seconds above 0, not {held!r}"
        raise ConfigurationError(msg)
    cluster = query.get("cluster", f"{settings.cluster}".lower())
    if cluster not in ("true", "false"):
        msg = f"the broker's URL {shown!r}: cluster must be true or false, not {cluster!r}"
        raise ConfigurationError(msg)
    if query.get("auth_mechanism", "plain").lower() not in ("plain", "external"):
        msg = f"the broker's URL {shown!r}: auth_mechanism must be plain or external, not {query['auth_mechanism']!r}"
        raise ConfigurationError(msg)
    secure = parts.scheme == "amqps"
    return Address(
        host=host,
        port=port or (5671 if secure else 5672),
        vhost=vhost,
        user=unquote(parts.username) if parts.username is not None else "guest",
        password=unquote(parts.password) if parts.password is not None else "guest",
        secure=secure,
        heartbeat_s=int(heartbeat),
        consumer_timeout_s=float(held),
        cluster=cluster == "true",
        cafile=query.get("cafile"),
        certfile=query.get("certfile"),
        keyfile=query.get("keyfile"),
        external=query.get("auth_mechanism", "").lower() == "external",
    )
