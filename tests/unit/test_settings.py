"""What an operator may set: of all brokers, and of one."""

import pytest

from leveret import App, Settings
from leveret.brokers.rabbitmq import RabbitSettings
from leveret.brokers.rabbitmq.address import addresses
from leveret.brokers.rabbitmq.nodes import Nodes
from leveret.brokers.rabbitmq.settings import rabbit_settings
from leveret.errors import ConfigurationError
from leveret.schemes import broker_module


def test_a_broker_takes_its_own_settings_and_the_others_ignore_them() -> None:
    """The same program runs on SQLite in a test and on RabbitMQ in production: neither may stumble over the other's settings."""
    settings = Settings(brokers=[object(), RabbitSettings(heartbeat_s=30, consumer_timeout_s=600)])

    assert rabbit_settings(settings) == RabbitSettings(heartbeat_s=30, consumer_timeout_s=600)
    assert rabbit_settings(Settings()) == RabbitSettings(heartbeat_s=15, consumer_timeout_s=1800)
    app = App("shop", broker="sqlite:///jobs.db", settings=settings)
    assert app.open_broker(app.runtime()).features().held_at_most_s is None


def test_the_url_beats_the_code() -> None:
    """An operator has the URL, and no way to change the code at night."""
    in_code = RabbitSettings(heartbeat_s=30, consumer_timeout_s=600)

    [address] = addresses("amqp://host/?heartbeat_s=7&consumer_timeout_s=90.5", in_code)
    [usual] = addresses("amqp://host/?heartbeat=8", in_code)
    [neither] = addresses("amqp://host/", in_code)

    assert (address.heartbeat_s, address.consumer_timeout_s) == (7, 90.5)
    assert (usual.heartbeat_s, usual.consumer_timeout_s) == (8, 600)
    assert (neither.heartbeat_s, neither.consumer_timeout_s) == (30, 600)


@pytest.mark.parametrize(
    ("url", "cluster"),
    [
        ("amqp://a/", False),
        ("amqp://a/?cluster=true", True),
        ("amqp://a/,amqp://b/", True),
        ("amqp://a/?cluster=false,amqp://b/", True),
    ],
)
def test_one_address_is_a_single_node_unless_the_url_says_otherwise(url: str, cluster: bool) -> None:
    """On a cluster another node may have the queue that one node doesn't know: declared again at once, it would be there twice."""
    assert Nodes(addresses(url)).cluster is cluster
    assert Nodes(addresses("amqp://a/", RabbitSettings(cluster=True))).cluster


def test_of_several_addresses_the_shortest_time_counts() -> None:
    """A worker may be connected to any of them: the node that takes a job away first sets the limit."""
    app = App("shop", broker="amqp://a/?consumer_timeout_s=90,amqp://b/")

    assert app.open_broker(app.runtime()).features().held_at_most_s == 90


@pytest.mark.parametrize(
    "query",
    [
        "heartbeat_s=never",
        "heartbeat_s=0",
        "heartbeat_s=1.5",
        "consumer_timeout_s=0",
        "consumer_timeout_s=-1",
        "consumer_timeout_s=nan",
        "consumer_timeout_s=inf",
        "consumer_timeout_s=1e3",
        "consumer_timeout_s=",
        "cluster=yes",
    ],
)
def test_a_wrong_value_in_the_url_is_one_clear_line(query: str) -> None:
    """The operator who mistyped it at night needs the name of the parameter, not a traceback."""
    name = query.partition("=")[0]

    with pytest.raises(ConfigurationError, match=rf"^the broker's URL 'amqp://host/\?.*': {name} must be"):
        addresses(f"amqp://host/?{query}")


@pytest.mark.parametrize(
    "wrong",
    [
        {"heartbeat_s": 0},
        {"heartbeat_s": "15"},
        {"heartbeat_s": 4000},
        {"consumer_timeout_s": float("inf")},
        {"consumer_timeout_s": True},
        {"cluster": "true"},
    ],
)
def test_wrong_settings_of_the_broker_are_refused_where_they_are_written(wrong: dict[str, object]) -> None:
    """Found only when the broker hangs up, they would be looked for in the network."""
    with pytest.raises(ValueError, match=f"RabbitSettings: {next(iter(wrong))} must be"):
        RabbitSettings(**wrong)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


SECONDS: list[object] = ["3", None, True, float("nan"), float("inf"), 0]
BYTES: list[object] = ["2000", None, True, float("nan"), float("inf"), 2000.0]
WRONG: list[tuple[str, list[object], str]] = [
    *[
        (name, SECONDS, "a number of seconds above 0")
        for name in ("unknown_grace_s", "connect_timeout_s", "reconnect_base_s", "reconnect_cap_s")
    ],
    *[(name, BYTES, "a whole number of bytes") for name in ("warn_body_bytes", "max_body_bytes", "max_header_bytes")],
    ("validate", [1, "no", None], "True or False"),
    ("encoding", ["xml", None, []], "json or msgpack"),
    ("brokers", [None, "amqp"], "a list"),
]


@pytest.mark.parametrize(
    ("setting", "wrong", "said"), [(name, wrong, said) for name, values, said in WRONG for wrong in values]
)
def test_a_setting_of_a_wrong_type_is_one_line_that_names_the_setting(setting: str, wrong: object, said: str) -> None:
    """A TypeError out of a comparison names no setting, and `validate="no"` would switch the validation on."""
    with pytest.raises(ValueError, match=f"^settings: {setting} must be {said}.*, not .*$"):
        Settings(**{setting: wrong})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["heartbeat_s", "consumer_timeout_s"])
def test_the_keywords_of_the_version_before_still_work_and_warn(name: str) -> None:
    """An upgrade must neither end start-up with a TypeError nor drop the setting without a word."""
    with pytest.warns(DeprecationWarning, match=rf"Settings\(brokers=\[RabbitSettings\({name}=120\)\]\)"):
        settings = Settings(**{name: 120.0})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    assert getattr(rabbit_settings(settings), name) == 120


@pytest.mark.parametrize("brokers", [RabbitSettings(), "amqp", {"heartbeat_s": 3}])
def test_settings_of_brokers_are_a_list(brokers: object) -> None:
    """`brokers=RabbitSettings(…)` would otherwise be ignored, and the broker's defaults used."""
    with pytest.raises(ValueError, match=r"settings: brokers must be a list, such as \[RabbitSettings\(…\)\]"):
        Settings(brokers=brokers)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_an_unknown_parameter_of_the_url_is_refused() -> None:
    """Ignored, a mistyped `hearbeat_s` would look set."""
    with pytest.raises(
        ConfigurationError, match="unknown parameter 'hearbeat_s'; known are heartbeat_s, heartbeat, consumer_timeout_s"
    ):
        broker_module("amqp://host/").open_broker("amqp://host/?hearbeat_s=3", App("shop").runtime())
