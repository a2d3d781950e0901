"""Who may import whom: the rules that let a broker, a middleware or a command be read, tested and replaced by itself."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_PACKAGES = {"framework": "leveret", "brokers": "leveret.brokers", "middleware": "leveret.middleware"}
_FILES = sorted(file for folder in _PACKAGES for file in (_ROOT / folder).rglob("*.py"))

# Each may import what stands in its own line and in those that its line names: cli → process → app → consuming, cron → publishing → the
# shared nouns. `testing` stands beside `process`.
_NOUNS = "the shared nouns"
# What the brokers that keep rows in a store share.
_OF_BROKERS = {f"leveret.brokers.{noun}" for noun in ("leases", "letters", "records", "rows", "turns")}
_BELOW = {
    "cli": {"process", "app", "consuming", "cron", "publishing", "results", _NOUNS},
    "process": {"app", "consuming", "cron", "publishing", "results", _NOUNS},
    "testing": {"app", "consuming", "cron", "publishing", "results", _NOUNS},
    "app": {"consuming", "cron", "publishing", "results", _NOUNS},
    "consuming": {"publishing", "results", _NOUNS},
    "cron": {"publishing", "results", _NOUNS},
    "publishing": {"results", _NOUNS},
    "results": {_NOUNS},
    _NOUNS: set[str](),
}


@dataclass(frozen=True)
class Import:
    """One imported module: its absolute name, and how and where it is imported."""

    module: str
    relative: bool
    for_checkers: bool  # below `if TYPE_CHECKING`
    line: int


def module_of(file: Path, root: Path = _ROOT) -> str:
    """Return the module that the file is; a package for an `__init__`."""
    folder, *rest = file.relative_to(root).with_suffix("").parts
    return ".".join([_PACKAGES[folder], *(rest[:-1] if rest[-1] == "__init__" else rest)])


def imports_of(file: Path, root: Path = _ROOT) -> Iterator[Import]:
    """Yield what the file imports, inside functions too; of `from a import b` both `a` and `a.b`, since `b` may be a module."""
    own = module_of(file, root)
    package = own if file.name == "__init__.py" else own.rpartition(".")[0]

    def walk(node: ast.AST, for_checkers: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, relative=False, for_checkers=for_checkers, line=child.lineno)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parts = package.split(".")
                    base = ".".join([*parts[: len(parts) + 1 - child.level], *([base] if base else [])])
                for module in (base, *(f"{base}.{alias.name}" for alias in child.names)):
                    yield Import(module, relative=bool(child.level), for_checkers=for_checkers, line=child.lineno)
            elif isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
                for part in child.body:
                    yield from walk(ast.Module([part], []), for_checkers=True)
                for part in child.orelse:
                    yield from walk(ast.Module([part], []), for_checkers)
            else:
                yield from walk(child, for_checkers)

    yield from walk(ast.parse(file.read_text()), for_checkers=False)


def _root_of(module: str) -> str | None:
    """Return the folder at the repository's root that `module` lies in; None for what isn't leveret."""
    for folder, package in (
        ("brokers", "leveret.brokers"),
        ("middleware", "leveret.middleware"),
        ("framework", "leveret"),
    ):
        if module == package or module.startswith(f"{package}."):
            return folder
    return None


def _room(module: str) -> str:
    """Return which line of `_BELOW` a module of framework/ stands in."""
    first = module.removeprefix("leveret").lstrip(".").partition(".")[0]
    return first if first in _BELOW else _NOUNS


def _refused(file: Path, one: Import, root: Path = _ROOT) -> str | None:
    """Say which rule the import breaks, or None."""
    own = module_of(file, root)
    folder, other = _root_of(own), _root_of(one.module)
    if one.module.split(".")[0] in _PACKAGES:
        return "a folder of the repository isn't a package: say leveret"
    if other is None:
        return None
    if folder == other and not one.relative:
        return "relative imports inside a tree: else the checkers know each class twice"
    if folder != other and one.relative:
        return "absolute imports across trees: the checkers can't resolve the others"
    if folder == "framework" and other != "framework":
        return "framework imports neither brokers nor middleware: schemes.py looks a broker up by its name"
    if folder != "framework" and other == "framework":
        room = _room(one.module)
        return None if room == _NOUNS else f"{folder} imports shared nouns only, not {room}"
    if folder not in {"framework", other}:
        return f"{folder} doesn't import {other}"
    if folder == "brokers":
        here, there = (".".join(module.split(".")[:3]) for module in (own, one.module))
        return None if there in {here, "leveret.brokers", *_OF_BROKERS} else "no broker imports another"
    if folder == "framework" and file.name != "__init__.py" and own != "leveret.__main__":
        here, there = _room(own), _room(one.module)
        if here != there and there not in _BELOW[here]:
            return f"{here} doesn't import {there}"
    return None


@pytest.mark.parametrize("file", _FILES, ids=lambda file: file.relative_to(_ROOT).as_posix())
def test_imports_point_one_way(file: Path) -> None:
    """An arrow upwards makes every worker import every broker, and a change in one command break another."""
    broken = [f"line {one.line}: {one.module}: {why}" for one in imports_of(file) if (why := _refused(file, one))]

    assert not broken


def _at_run_time(files: Mapping[str, Path], root: Path = _ROOT) -> dict[str, set[str]]:
    """Return which modules each module imports when it runs; packages' `__init__` don't count."""
    return {
        module: {
            one.module
            for one in imports_of(file, root)
            if not one.for_checkers and one.module in files and one.module != module
        }
        for module, file in files.items()
    }


def test_no_modules_import_each_other() -> None:
    """Two modules in a circle are one module in two files: neither can be understood, tested or moved without the other."""
    files = {module_of(file): file for file in _FILES if file.name != "__init__.py"}

    circle: list[str] = []
    try:
        TopologicalSorter(_at_run_time(files)).prepare()
    except CycleError as error:
        circle = error.args[1]

    assert not circle


def test_a_circle_through_a_function_is_found(tmp_path: Path) -> None:
    """A rule that sees only the top of a file is met by moving the import into a function."""
    (tmp_path / "framework").mkdir()
    one, two = tmp_path / "framework/one.py", tmp_path / "framework/two.py"
    one.write_text("from .two import x")
    two.write_text("def f():\n    from . import one\nif TYPE_CHECKING:\n    from .three import y\n")
    files = {module_of(file, tmp_path): file for file in (one, two)}

    with pytest.raises(CycleError):
        TopologicalSorter(_at_run_time(files, tmp_path)).prepare()


@pytest.mark.parametrize("file", _FILES, ids=lambda file: file.relative_to(_ROOT).as_posix())
def test_nobody_knows_a_client_library_of_rabbitmq(file: Path) -> None:
    """The connection is our own; a client library beside it would be a second set of time-outs, errors and reconnects."""
    clients = [one for one in imports_of(file) if one.module.split(".")[0] in {"aio_pika", "aiormq"}]

    assert not clients


@pytest.mark.parametrize(
    ("file", "source", "refused"),
    [
        ("framework/x.py", "from leveret.brokers.memory import MemoryBroker", True),
        ("framework/x.py", "def f():\n    from leveret.brokers import memory", True),
        ("framework/x.py", "if TYPE_CHECKING:\n    from leveret.middleware import Retries", True),
        ("framework/x.py", "from leveret.job import Job", True),
        ("framework/x.py", "from . import job", False),
        ("framework/x.py", "from .app import App", True),
        ("framework/x.py", "def f():\n    from .publishing.sender import Sender", True),
        ("framework/x.py", "import brokers", True),
        ("framework/consuming/x.py", "from ..publishing.sender import Sender", False),
        ("framework/publishing/x.py", "from ..consuming.worker import working", True),
        ("framework/consuming/x.py", "from ..app import App", True),
        ("framework/cron/x.py", "from ..consuming.slots import Limits", True),
        ("framework/process/x.py", "from ..cli.output import ask", True),
        ("framework/cli/x.py", "from ..process.loading import load_app", False),
        ("framework/app.py", "def f():\n    from .process.loading import load_app", True),
        ("brokers/x/y.py", "from leveret.envelope import Envelope", False),
        ("brokers/x/y.py", "from leveret.publishing.sender import Sender", True),
        ("brokers/x/y.py", "def f():\n    from leveret.middleware import Retries", True),
        ("brokers/x/y.py", "from leveret.brokers.x.frames import Frame", True),
        ("brokers/x/y.py", "from .frames import Frame", False),
        ("brokers/x/y.py", "from ..sqlite.file import File", True),
        ("brokers/x/y.py", "from .. import sqlite", True),
        ("brokers/x/y.py", "from ..rows import Row", False),
        ("brokers/x/y.py", "from leveret.brokers.rows import Row", True),
        ("brokers/x/y.py", "from ..shared import Row", True),
        ("brokers/rows.py", "from .sqlite.file import File", True),
        ("middleware/x.py", "from ..envelope import Envelope", True),
        ("middleware/x.py", "from leveret import brokers", True),
        ("middleware/x.py", "from leveret.app import App", True),
    ],
)
def test_the_layering_rule_tells_right_from_wrong(tmp_path: Path, file: str, source: str, refused: bool) -> None:
    """A rule that accepts everything would pass for ever."""
    written = tmp_path / file
    written.parent.mkdir(parents=True)
    written.write_text(source)

    assert any(_refused(written, one, tmp_path) for one in imports_of(written, tmp_path)) is refused
