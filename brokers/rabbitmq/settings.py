"""The operator's settings for RabbitMQ: in code, as `Settings(brokers=[RabbitSettings(…)])`, or in the URL, which wins."""

from __future__ import annotations

from typing import Any

import msgspec

from leveret.settings import Settings, check_seconds


class RabbitSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the RabbitMQ broker; ValueError for an invalid value."""

    heartbeat_s: float = 15.0
    """Heartbeat interval, 1 to 3600 seconds, rounded to whole ones for AMQP. A dead peer is noticed after about three intervals."""
    consumer_timeout_s: float = 1800.0
    """The broker's limit for an unacked delivery (RabbitMQ's `consumer_timeout`); a `Timeout` must stay under 3/4 of it."""
    cluster: bool = False
    """Whether a single address stands for several nodes (a load balancer). Several addresses are a cluster in any case."""

    def __post_init__(self) -> None:
        for name in ("heartbeat_s", "consumer_timeout_s"):
            check_seconds(f"RabbitSettings: {name}", getattr(self, name))
        if not isinstance(self.cluster, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"RabbitSettings: cluster must be True or False, not {self.cluster!r}"
            raise ValueError(msg)
        if not 1 <= self.heartbeat_s <= 3600:
            msg = f"RabbitSettings: heartbeat_s must be 1 to 3600, not {self.heartbeat_s}"
            raise ValueError(msg)


def rabbit_settings(settings: Settings) -> RabbitSettings:
    """Return the `RabbitSettings` in an app's settings; by default, one made of the deprecated keywords of `Settings`."""
    for found in settings.brokers:
        if isinstance(found, RabbitSettings):
            return found
    given: dict[str, Any] = {"heartbeat_s": settings.heartbeat_s, "consumer_timeout_s": settings.consumer_timeout_s}
    return RabbitSettings(**{name: value for name, value in given.items() if value is not None})
