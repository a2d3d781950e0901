"""The public API as both type checkers see it: `programs.py` and the README must pass, each marked line of `wrong.py` must not."""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from textwrap import indent

import pytest

from tests.examples.markdown import PYTHON, Block

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_MARK = re.compile(r"# wrong(?: \((mypy|pyright) only\))?:")

pytestmark = pytest.mark.timeout(300)  # a checker that starts cold on a busy machine


def _module(block: Block) -> str:
    """Return the name of the file that a block is checked as: its own name, or where it stands."""
    _, file, name = block.comment.partition("file: ")
    return name if file else f"{block.page.stem.lower()}_line_{block.line}.py"


def _program(block: Block) -> str:
    """Return a block as a module. The `async with` at the top of a block stands in an `async def` in a program."""
    try:
        ast.parse(block.text)
        compile(block.text, block.name, "exec")
    except SyntaxError:
        return f"async def block() -> None:\n{indent(block.text, '    ')}"
    return block.text


BLOCKS = {_module(block): block for block in PYTHON if not block.comment.startswith("excerpt of: ")}
"""The blocks of the README and of docs/, but for excerpts of examples, which aren't whole."""


def _run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        timeout=280,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode in {0, 1}, f"{command[0]} didn't run: {done.stdout[-800:]}{done.stderr[-800:]}"
    return done.stdout


def _mypy(files: list[str], folder: str) -> dict[tuple[str, int], str]:
    lines = _run(
        "mypy", "--strict", "--no-pretty", "--hide-error-context", "--no-error-summary", *files, MYPYPATH=folder
    ).splitlines()
    seen = [re.match(r"(\S+?):(\d+)(?::\d+)?: error: (.*)", line) for line in lines]
    return {(Path(one[1]).name, int(one[2])): one[3] for one in seen if one}


def _pyright(files: list[str], folder: str) -> dict[tuple[str, int], str]:
    config = Path(folder, "pyrightconfig.json")
    # pyright ignores an absolute path outside of the project
    include = [os.path.relpath(file, folder) for file in files]
    extends = str(_HERE / "pyrightconfig.json")
    config.write_text(json.dumps({"extends": extends, "include": include, "extraPaths": [folder]}), encoding="utf-8")
    report = json.loads(_run("pyright", "--outputjson", "--project", str(config), "--pythonpath", sys.executable))
    assert report["summary"]["filesAnalyzed"] == len(files)
    errors = [one for one in report["generalDiagnostics"] if one["severity"] == "error"]
    return {
        (Path(one["file"]).name, one["range"]["start"]["line"] + 1): one["message"].splitlines()[0] for one in errors
    }


@cache
def found_by(checker: str) -> dict[tuple[str, int], str]:
    """Return what the checker said of the two files and of the blocks, by file and line."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(_HERE / "programs.py"), str(_HERE / "wrong.py")]
        for name, block in BLOCKS.items():
            path = Path(folder, name)
            path.write_text(_program(block), encoding="utf-8")
            files.append(str(path))
        return {"mypy": _mypy, "pyright": _pyright}[checker](files, folder)


def marked_for(checker: str) -> set[tuple[str, int]]:
    """Return the lines of wrong.py that the checker must refuse."""
    lines = enumerate((_HERE / "wrong.py").read_text().splitlines(), 1)
    marks = [(number, mark) for number, line in lines if (mark := _MARK.search(line))]
    return {("wrong.py", number) for number, mark in marks if mark[1] in {None, checker}}


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_right_programs_are_accepted(checker: str) -> None:
    """A user whose correct program is refused adds a type-ignore, and with it loses every other check on the line."""
    surprises = {place: words for place, words in found_by(checker).items() if place not in marked_for(checker)}

    assert not {place: words for place, words in surprises.items() if place[0] not in BLOCKS}


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_every_block_of_the_readme_is_accepted(checker: str) -> None:
    """What is pasted from the README into a project with strict checks must not begin with an error."""
    assert "shop.py" in BLOCKS
    assert len(BLOCKS) > 6
    assert not {place: words for place, words in found_by(checker).items() if place[0] in BLOCKS}


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_every_marked_misuse_is_refused(checker: str) -> None:
    """What a checker lets through shows at run time, in production."""
    missed = marked_for(checker) - set(found_by(checker))

    assert len(marked_for(checker)) > 90, "the marks of wrong.py aren't found"
    assert not missed
