"""Who may import whom: the rule that lets a broker or a layer be read, tested and replaced by itself."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_PACKAGES = {"framework": "leveret", "brokers": "leveret.brokers", "middleware": "leveret.middleware"}
_FILES = sorted(file for folder in _PACKAGES for file in (_ROOT / folder).rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """One imported module: its absolute name, and how and where it is imported."""

    module: str
    relative: bool
    when_used: bool  # inside a function
    line: int


def imports_of(file: Path) -> Iterator[Import]:
    """Yield what the file imports; of `from a import b` both `a` and `a.b`, since `b` may be a module."""
    own = _PACKAGES[file.relative_to(_ROOT).parts[0]]

    def walk(node: ast.AST, when_used: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, relative=False, when_used=when_used, line=child.lineno)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = ".".join(own.split(".")[: len(own.split(".")) + 1 - child.level])
                    base = f"{package}.{base}".rstrip(".")
                for module in (base, *(f"{base}.{alias.name}" for alias in child.names)):
                    yield Import(module, relative=bool(child.level), when_used=when_used, line=child.lineno)
            else:
                yield from walk(
                    child, when_used or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                )

    yield from walk(ast.parse(file.read_text()), when_used=False)


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _refused(folder: str, one: Import) -> str | None:
    """Say which rule the import breaks, or None."""
    if one.module.split(".")[0] in _PACKAGES:
        return "a folder of the repository isn't a package: say leveret"
    outer = [package for package in ("leveret.brokers", "leveret.middleware") if _within(one.module, package)]
    own = _PACKAGES[folder]
    if folder == "framework":
        if outer and not one.when_used:
            return "framework imports neither brokers nor middleware until one is used"
        if _within(one.module, own) and not outer and not one.relative:
            return "relative imports inside a folder: else the checkers know each class twice"
        return None
    if outer and outer != [own]:
        return "brokers and middleware import only framework, never each other"
    if _within(one.module, own) and not one.relative:
        return "relative imports inside a folder: else the checkers know each class twice"
    if one.relative and not _within(one.module, own):
        return "absolute imports across folders: the checkers can't resolve the others"
    return None


@pytest.mark.parametrize("file", _FILES, ids=lambda file: file.relative_to(_ROOT).as_posix())
def test_imports_point_inwards(file: Path) -> None:
    """A cycle between folders would make every worker import every broker, and a change in one break another."""
    folder = file.relative_to(_ROOT).parts[0]

    broken = [f"line {one.line}: {one.module}: {why}" for one in imports_of(file) if (why := _refused(folder, one))]

    assert not broken


@pytest.mark.parametrize(
    "file",
    [file for file in _FILES if not file.name.startswith("rabbitmq")],
    ids=lambda file: file.relative_to(_ROOT).as_posix(),
)
def test_only_the_rabbitmq_broker_knows_its_client(file: Path) -> None:
    """The client is replaced behind the broker's edge; whoever else used it would have to be rewritten then."""
    clients = [one for one in imports_of(file) if one.module.split(".")[0] in {"aio_pika", "aiormq"}]

    assert not clients


@pytest.mark.parametrize(
    ("folder", "source", "refused"),
    [
        ("framework", "from leveret.brokers.memory import MemoryBroker", True),
        ("framework", "def f():\n    from leveret.brokers import memory", False),
        ("framework", "if TYPE_CHECKING:\n    from .middleware import Retries", True),
        ("framework", "from leveret.job import Job", True),
        ("framework", "from . import job", False),
        ("framework", "import brokers", True),
        ("brokers", "from leveret.envelope import Envelope", False),
        ("brokers", "def f():\n    from leveret.middleware import Retries", True),
        ("brokers", "from leveret.brokers.rabbitmq.frames import Frame", True),
        ("brokers", "from .frames import Frame", False),
        ("middleware", "from ..envelope import Envelope", True),
        ("middleware", "from leveret import brokers", True),
    ],
)
def test_the_layering_rule_tells_right_from_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, source: str, refused: bool
) -> None:
    """A rule that accepts everything would pass for ever."""
    monkeypatch.setattr("tests.packaging.test_layering._ROOT", tmp_path)
    file = tmp_path / folder / "x.py"
    file.parent.mkdir()
    file.write_text(source)

    assert any(_refused(folder, one) for one in imports_of(file)) is refused
