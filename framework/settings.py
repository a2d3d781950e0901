"""What an operator may set, the environment read in one function, and the one redactor of URLs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec


def check_seconds(name: str, value: object) -> None:
    """Raise a ValueError, which names the setting, for what isn't a finite number of seconds above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        msg = f"{name} must be a number of seconds above 0 and finite, not {value!r}"
        raise ValueError(msg)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator may set; relations are checked when it is made (ValueError)."""

    validate: bool = True
    """Decode what was encoded before it is sent, so that a job of wrong types is refused at its publisher."""
    encoding: Literal["json", "msgpack"] = "json"
    """How this app encodes what it publishes; both are always read."""
    unknown_grace_s: float = 300.0
    """How long a job that no handler here knows waits in the broker before it is buried; a deploy may be rolling."""
    connect_timeout_s: float = 10.0
    """Deadline of one try to connect, handshake included."""
    reconnect_base_s: float = 0.5
    """Ceiling of the first wait before a connection is tried again; it doubles, with full jitter."""
    reconnect_cap_s: float = 5.0
    """Ceiling of any such wait."""
    warn_body_bytes: int = 1 << 20
    """A larger body is published with a warning."""
    max_body_bytes: int = 15 << 20
    """A larger body is refused before a byte is sent: brokers of 4.x close the channel at 16 MiB."""
    max_header_bytes: int = 32 << 10
    """All headers of one job together; more is refused, since a frame that is too large ends the connection."""

    brokers: Sequence[object] = ()
    """Settings of single brokers, such as `RabbitSettings`; each broker takes its own, and the others ignore them."""
    heartbeat_s: float | None = None
    """Deprecated: `brokers=[RabbitSettings(heartbeat_s=…)]`."""
    consumer_timeout_s: float | None = None
    """Deprecated: `brokers=[RabbitSettings(consumer_timeout_s=…)]`."""

    def __post_init__(self) -> None:
        for name in ("unknown_grace_s", "connect_timeout_s", "reconnect_base_s", "reconnect_cap_s"):
            check_seconds(f"settings: {name}", getattr(self, name))
        for name in ("heartbeat_s", "consumer_timeout_s"):
            if (given := getattr(self, name)) is not None:
                check_seconds(f"settings: {name}", given)
                msg = f"Settings({name}=…) is deprecated and goes with the next version: Settings(brokers=[RabbitSettings({name}={given:g})])"
                warnings.warn(msg, DeprecationWarning, stacklevel=2)
        if not isinstance(self.brokers, (list, tuple)):
            msg = f"settings: brokers is a list, such as [RabbitSettings(…)], not {self.brokers!r:.80}"
            raise ValueError(msg)  # as for every other setting
        if self.encoding not in ("json", "msgpack"):
            msg = f"settings: encoding must be json or msgpack, not {self.encoding!r}"
            raise ValueError(msg)
        if self.reconnect_cap_s < self.reconnect_base_s:
            msg = f"settings: reconnect_cap_s ({self.reconnect_cap_s}) is below reconnect_base_s ({self.reconnect_base_s})"
            raise ValueError(msg)
        if not 0 < self.warn_body_bytes <= self.max_body_bytes:
            msg = f"settings: warn_body_bytes ({self.warn_body_bytes}) must be between 1 and max_body_bytes ({self.max_body_bytes})"
            raise ValueError(msg)
        if self.max_header_bytes < 1024:
            msg = f"settings: max_header_bytes must be at least 1024, not {self.max_header_bytes}"
            raise ValueError(msg)


class Environment(msgspec.Struct, frozen=True):
    """What leveret reads from the environment; nothing else does."""

    broker: str | None
    """LEVERET_BROKER: the broker's URL; "" where it is set and empty, which is a setting that was lost."""
    app: str | None
    """LEVERET_APP: module:attribute of the app, for commands that aren't given one."""
    log_level: str
    """LEVERET_LOG: debug, info (the default), warning or error."""


def environment(mapping: Mapping[str, str]) -> Environment:
    """Read leveret's variables."""
    return Environment(
        broker=mapping.get("LEVERET_BROKER"),
        app=mapping.get("LEVERET_APP") or None,
        log_level=mapping.get("LEVERET_LOG") or "info",
    )


_PASSWORD = re.compile(r"(?<=://)([^/@\s:]*):(\S*)@")  # up to the last @: a password may hold one that wasn't escaped
_IN_QUERY = re.compile(r"([?&][^=&\s'\"]*(?:pass|secret|token)[^=&\s'\"]*=)[^&\s'\"]*", re.IGNORECASE)


def redact(text: str) -> str:
    """Return `text` with the passwords of every URL in it replaced, in a query too; whatever prints a URL goes through here."""
    return _IN_QUERY.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text))
