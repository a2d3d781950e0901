"""The public API as both type checkers see it: `programs.py` must pass, each marked line of `wrong.py` must not."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_MARK = re.compile(r"# wrong(?: \((mypy|pyright) only\))?:")

pytestmark = pytest.mark.timeout(300)  # a checker that starts cold on a busy machine


def _run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, cwd=_ROOT, timeout=280, check=False
    )
    assert done.returncode in {0, 1}, f"{command[0]} didn't run: {done.stdout[-800:]}{done.stderr[-800:]}"
    return done.stdout


def _mypy() -> dict[tuple[str, int], str]:
    files = [str(_HERE / "programs.py"), str(_HERE / "wrong.py")]
    lines = _run("mypy", "--no-pretty", "--hide-error-context", "--no-error-summary", *files).splitlines()
    seen = [re.match(r"(\S+?):(\d+)(?::\d+)?: error: (.*)", line) for line in lines]
    return {(Path(one[1]).name, int(one[2])): one[3] for one in seen if one}


def _pyright() -> dict[tuple[str, int], str]:
    report = json.loads(_run("pyright", "--outputjson", "--project", str(_HERE), "--pythonpath", sys.executable))
    errors = [one for one in report["generalDiagnostics"] if one["severity"] == "error"]
    return {
        (Path(one["file"]).name, one["range"]["start"]["line"] + 1): one["message"].splitlines()[0] for one in errors
    }


@cache
def found_by(checker: str) -> dict[tuple[str, int], str]:
    """Return what the checker said of the two files, by file and line."""
    return {"mypy": _mypy, "pyright": _pyright}[checker]()


def marked_for(checker: str) -> set[tuple[str, int]]:
    """Return the lines of wrong.py that the checker must refuse."""
    lines = enumerate((_HERE / "wrong.py").read_text().splitlines(), 1)
    marks = [(number, mark) for number, line in lines if (mark := _MARK.search(line))]
    return {("wrong.py", number) for number, mark in marks if mark[1] in {None, checker}}


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_right_programs_are_accepted(checker: str) -> None:
    """A user whose correct program is refused adds a type-ignore, and with it loses every other check on the line."""
    surprises = {place: words for place, words in found_by(checker).items() if place not in marked_for(checker)}

    assert not surprises


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_every_marked_misuse_is_refused(checker: str) -> None:
    """What a checker lets through shows at run time, in production."""
    missed = marked_for(checker) - set(found_by(checker))

    assert len(marked_for(checker)) > 90, "the marks of wrong.py aren't found"
    assert not missed
