"""What the linter can't ask of tests alone."""

import ast
from pathlib import Path

import pytest

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
