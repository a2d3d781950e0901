"""What the linter can't ask of tests alone."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import pytest_report_header

_TESTS = Path(__file__).parents[1]
_FILES = sorted(_TESTS.rglob("test_*.py"))


@pytest.mark.parametrize("file", _FILES, ids=lambda file: file.relative_to(_TESTS).as_posix())
def test_every_test_says_what_is_lost_if_it_breaks(file: Path) -> None:
    """Whoever meets a red test in two years decides by that line whether the test or the change is wrong."""
    functions = [
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]

    silent = [one.name for one in functions if one.name.startswith("test_") and not ast.get_docstring(one)]

    assert not silent


def test_each_row_of_the_page_of_faults_names_tests_that_exist() -> None:
    """A promise whose test was renamed or deleted looks proved, and nobody notices when it breaks."""
    rows = (_TESTS.parent / "docs" / "faults.md").read_text().partition("|---|---|---|---|\n")[2].splitlines()
    named = {row: re.findall(r"`([^`]+\.py)(?:::(\w+))?`", row.rsplit("|", 2)[1]) for row in rows}

    missing = [
        f"{file}::{name}"
        for tests in named.values()
        for file, name in tests
        if not (path := _TESTS.parent / file).exists() or (name and f"def {name}(" not in path.read_text())
    ]

    assert not missing
    assert [row for row, tests in named.items() if not tests] == []


def test_the_page_of_faults_has_each_number() -> None:
    """A fault that has no row has no promise, and perhaps no test."""
    page = (_TESTS.parent / "docs" / "faults.md").read_text()
    faults = {f"R{number:02}" for number in range(1, 47)} | {f"P{number}" for number in range(1, 29)}

    assert set(re.findall(r"\b[RP]\d+\b", page)) == faults


def test_a_download_is_announced_before_the_first_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody wants hundreds of MB without a word, in a folder that they don't know of."""
    monkeypatch.delenv("LEVERET_TEST_AMQP", raising=False)
    monkeypatch.setenv("LEVERET_TEST_RABBIT", "4.0")
    monkeypatch.setenv("LEVERET_RABBIT_CACHE", f"{tmp_path}/rabbit")
    monkeypatch.delenv("LEVERET_TEST_POSTGRES", raising=False)
    monkeypatch.setenv("LEVERET_POSTGRES_SUITE", "trixie")
    monkeypatch.setenv("LEVERET_POSTGRES_CACHE", f"{tmp_path}/postgres")
    monkeypatch.delenv("LEVERET_TEST_REDIS", raising=False)
    monkeypatch.setenv("LEVERET_REDIS_SUITE", "trixie")
    monkeypatch.setenv("LEVERET_REDIS_CACHE", f"{tmp_path}/redis")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None)
    monkeypatch.setattr("pathlib.Path.exists", lambda path: str(path) == "/etc/debian_version")

    assert pytest_report_header() == [
        "RabbitMQ: 4.0: Debian's package, downloaded by the first test that needs it, in",
        f"{tmp_path}/rabbit/trixie (239 MB; to remove it: rm -r that folder)",
        "PostgreSQL: Debian's packages, downloaded by the first test that needs them, of trixie in",
        f"{tmp_path}/postgres/trixie (450 MB; to remove it: rm -r that folder)",
        "Redis: Debian's package, downloaded by the first test that needs it, of trixie in",
        f"{tmp_path}/redis/trixie (155 MB; to remove it: rm -r that folder)",
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_servers_that_are_named_are_announced_without_their_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who forgot that a variable is set would run the tests on a server of others."""
    monkeypatch.setenv("LEVERET_TEST_AMQP", "amqp://shop:hunter2@rabbit/")
    monkeypatch.setenv("LEVERET_TEST_POSTGRES", "postgresql://shop:hunter2@db/shop")
    monkeypatch.setenv("LEVERET_TEST_REDIS", "redis://shop:hunter2@cache/0")

    assert pytest_report_header() == [
        "RabbitMQ: amqp://shop:***@rabbit/ (LEVERET_TEST_AMQP)",
        "PostgreSQL: postgresql://shop:***@db/shop (LEVERET_TEST_POSTGRES)",
        "Redis: redis://shop:***@cache/0 (LEVERET_TEST_REDIS)",
    ]
