"""Which broker serves a URL, and what a user reads where none can."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from leveret import schemes
from leveret.errors import ConfigurationError
from leveret.runtime import Runtime
from leveret.schemes import broker_module


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of a broker at trial://; it needs a library of its own."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(schemes._SCHEMES, "trial", "trial_store")
    monkeypatch.delitem(sys.modules, "trial_store", raising=False)
    return tmp_path / "trial_store.py"


def test_a_scheme_that_nobody_serves_is_named_with_those_that_are() -> None:
    """Somebody who read of a broker in a newer release must see that this one doesn't have it, and not look for a typo."""
    with pytest.raises(ConfigurationError) as refused:
        broker_module("kafka://shop:hunter2@db/shop")

    assert str(refused.value) == (
        "the broker's URL 'kafka://shop:***@db/shop' has no known scheme: neither leveret nor an installed package "
        "has a broker for kafka://; a URL begins with one of amqp://, amqps://, postgresql://, postgres://, redis://, rediss://, sqlite://, memory://"
    )


def test_a_store_and_an_outbox_name_the_schemes_that_serve_them() -> None:
    """Somebody with a typo in LEVERET_STORE would read that Redis keeps no results, or look at the URL of the broker."""
    runtime = Runtime(app="shop")
    with pytest.raises(ConfigurationError) as store:
        schemes.open_store("reddis://shop:hunter2@host/0", runtime)
    with pytest.raises(ConfigurationError) as outbox:
        schemes.open_outbox("postgress://shop:hunter2@db/shop", runtime)

    assert str(store.value) == (
        "the store's URL 'reddis://shop:***@host/0' has no known scheme; a URL begins with one of "
        "postgresql://, postgres://, redis://, rediss://, sqlite://, memory://"
    )
    assert str(outbox.value) == (
        "the outbox's URL 'postgress://shop:***@db/shop' has no known scheme; a URL begins with one of postgresql://, postgres://"
    )


async def test_the_short_scheme_of_postgresql_opens_all_that_a_url_is_for() -> None:
    """A program whose host hands out postgres:// would have to rewrite the URL of its broker, store or outbox."""
    url, runtime = "postgres://shop:pw@db.invalid/shop", Runtime(app="shop")
    module = broker_module(url)
    opened = [
        module.open_broker(url, runtime),
        module.open_admin(url, runtime),
        schemes.open_store(url, runtime),
        schemes.open_outbox(url, runtime),
        schemes.open_outbox_admin(url, runtime),
        schemes.open_migrator(url, runtime),
    ]

    assert {type(each).__module__.rpartition(".")[0] for each in opened} == {"leveret.brokers.postgresql"}
    assert schemes.can_store(url)


@pytest.mark.parametrize(("library", "extra"), schemes._EXTRAS.items())
def test_a_missing_library_is_one_line_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, trial: Path, library: str, extra: str
) -> None:
    """A traceback of imports doesn't tell a user what to install."""
    monkeypatch.setitem(sys.modules, library, None)  # as if it weren't installed
    trial.write_text(f"import {library}.exceptions")

    with pytest.raises(ConfigurationError) as refused:
        broker_module("trial://")

    assert str(refused.value) == (
        f"the broker's URL with trial:// needs {library}; install the extra leveret[{extra}], which brings it"
    )


@pytest.mark.parametrize(
    ("scheme", "library", "extra"), [("postgresql", "asyncpg", "postgresql"), ("redis+cluster", "hiredis", "redis")]
)
def test_a_broker_over_a_library_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, scheme: str, library: str, extra: str
) -> None:
    """The plain installation of leveret has no driver for it."""
    for name in [name for name in sys.modules if name.startswith(f"leveret.brokers.{extra}")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)

    with pytest.raises(ConfigurationError) as refused:
        broker_module(f"{scheme}://shop:hunter2@db/shop")

    assert str(refused.value) == (
        f"the broker's URL with {scheme}:// needs {library}; install the extra leveret[{extra}], which brings it"
    )
    with pytest.raises(ConfigurationError, match=f"the store's URL with {re.escape(scheme)}:// needs {library}"):
        schemes.open_store(f"{scheme}://shop:hunter2@db/shop", Runtime(app="shop"))


def test_a_missing_module_of_no_extra_is_not_explained_away(trial: Path) -> None:
    """A broker with a bug would be reported as an installation that lacks something."""
    trial.write_text("import not_there_at_all")

    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        broker_module("trial://")


def test_each_extra_that_an_error_names_brings_its_library() -> None:
    """A user who installs what the error says must not see the same error again."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    assert all(
        any(requirement.startswith(library) for requirement in extras[extra])
        for library, extra in schemes._EXTRAS.items()
    )
