"""Settings, environment variables, and the function that hides passwords in URLs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec


def check_seconds(name: str, value: object) -> None:
    """Raise a ValueError that names the setting, unless `value` is a finite number of seconds above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        msg = f"{name} must be a number of seconds above 0 and finite, not {value!r}"
        raise ValueError(msg)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of an app; ValueError for a value out of range or values that contradict each other."""

    validate: bool = True
    """Decode each encoded job before it is sent, so that a job with fields of a wrong type is refused at its publisher."""
    encoding: Literal["json", "msgpack"] = "json"
    """How this app encodes the jobs that it publishes. Workers decode both encodings."""
    unknown_grace_s: float = 300.0
    """How long a job that no handler knows waits in the broker before it is buried, in case of a rolling deploy."""
    crash_limit: int = 5
    """A job is buried as `worker_lost` once so many workers died while they ran it."""
    connect_timeout_s: float = 10.0
    """Time limit of one attempt to connect, handshake included."""
    reconnect_base_s: float = 0.5
    """Ceiling of the first wait before connecting again. The ceiling doubles with each attempt; the waits have full jitter."""
    reconnect_cap_s: float = 5.0
    """Ceiling of every wait before connecting again."""
    warn_body_bytes: int = 1 << 20
    """A larger body is published with a warning."""
    max_body_bytes: int = 15 << 20
    """A larger body is refused before a byte is sent, because RabbitMQ 4 closes the channel at 16 MiB."""
    max_header_bytes: int = 32 << 10
    """Largest total size of a job's headers. Larger headers are refused, since a frame that is too large ends the connection."""
    inbox_s: float = 7 * 86_400.0
    """How long `Attempt.once` remembers that the effect of a job is committed. A copy of the job that comes later has its effect again."""

    brokers: Sequence[object] = ()
    """Settings of single brokers, such as `RabbitSettings`; a broker takes its own settings and ignores the others."""
    heartbeat_s: float | None = None
    """Deprecated; use `brokers=[RabbitSettings(heartbeat_s=…)]`."""
    consumer_timeout_s: float | None = None
    """Deprecated; use `brokers=[RabbitSettings(consumer_timeout_s=…)]`."""

    def __post_init__(self) -> None:
        for name in ("unknown_grace_s", "connect_timeout_s", "reconnect_base_s", "reconnect_cap_s", "inbox_s"):
            check_seconds(f"settings: {name}", getattr(self, name))
        for name in ("warn_body_bytes", "max_body_bytes", "max_header_bytes"):
            if type(given := getattr(self, name)) is not int:  # a bool is an int
                msg = f"settings: {name} must be a whole number of bytes, not {given!r}"
                raise ValueError(msg)
        if type(self.crash_limit) is not int or self.crash_limit < 2:
            msg = f"settings: crash_limit must be a whole number of at least 2, not {self.crash_limit!r}"
            raise ValueError(msg)
        if not isinstance(self.validate, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"settings: validate must be True or False, not {self.validate!r}"
            raise ValueError(msg)  # not a TypeError, as for every other setting
        for name in ("heartbeat_s", "consumer_timeout_s"):
            if (given := getattr(self, name)) is not None:
                check_seconds(f"settings: {name}", given)
                msg = f"Settings({name}=…) is deprecated and will be removed in the next version; use Settings(brokers=[RabbitSettings({name}={given:g})])"
                warnings.warn(msg, DeprecationWarning, stacklevel=2)
        if not isinstance(self.brokers, (list, tuple)):
            msg = f"settings: brokers must be a list, such as [RabbitSettings(…)], not {self.brokers!r:.80}"
            raise ValueError(msg)
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
    """leveret's environment variables; no other code reads them."""

    broker: str | None
    """LEVERET_BROKER: the broker's URL; "" if the variable is set but empty, which is most likely a lost setting."""
    outbox: str | None
    """LEVERET_OUTBOX: the URL of the database with the app's outbox and inbox."""
    store: str | None
    """LEVERET_STORE: the URL of the app's job store."""
    app: str | None
    """LEVERET_APP: module:attribute of the app, for commands that get neither APP nor --app."""
    concurrency: str | None
    """LEVERET_CONCURRENCY: jobs at once per worker process, and per queue in it: 100,emails=50."""
    log_level: str
    """LEVERET_LOG: debug, info (the default), warning or error."""


def environment(mapping: Mapping[str, str]) -> Environment:
    """Read leveret's environment variables from `mapping`."""
    return Environment(
        broker=mapping.get("LEVERET_BROKER"),
        outbox=mapping.get("LEVERET_OUTBOX") or None,
        store=mapping.get("LEVERET_STORE") or None,
        app=mapping.get("LEVERET_APP") or None,
        concurrency=mapping.get("LEVERET_CONCURRENCY") or None,
        log_level=mapping.get("LEVERET_LOG") or "info",
    )


# Up to the last @, since a password may contain an unescaped one. Without a limit, a long line with many URLs would take minutes.
_PASSWORD = re.compile(r"(?<=://)([^/@\s:]*):(\S{0,500})@")
_OF_URL = re.compile(r"\A(\s*(?:[a-z+]+:/+|(?![a-z+]+:/))[^@:]*):.*@", re.DOTALL)
_IN_QUERY = re.compile(r"([?&][^=&\s'\"]*(?:pass|secret|token)[^=&\s'\"]*=)[^&\s'\"]*", re.IGNORECASE)

# libpq's form, password=… or password='…'; unquoted, the value ends at the next space, whatever else is in it
_KEYWORD = re.compile(r"((?<![\w?&])(?:pg|ssl)?password[ \t]*=[ \t]*)(?:'(?:[^'\\]|\\.)*'?|\S+)", re.IGNORECASE)


def redact(text: str) -> str:
    """Return `text` with `***` for each password: of every URL, in queries too, and after libpq's `password=`.

    All text that may contain a URL passes here.
    """
    return _KEYWORD.sub(r"\1***", _IN_QUERY.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text)))


def redact_url(url: str) -> str:
    """Return `url`, one or several, as `redact` does. Here a mistyped URL, and a password with blanks, are hidden too."""
    return ",".join(redact(_OF_URL.sub(r"\1:***@", one)) for one in re.split(r",(?=\s*[a-z+]+://)", url))
