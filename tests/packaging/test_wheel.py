"""What a user installs is what lies in the tree."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import leveret

_ROOT = Path(__file__).parents[2]
_FOLDERS = {"framework": "leveret", "brokers": "leveret/brokers", "middleware": "leveret/middleware"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from an sdist, as a release is: a wheel built in a used tree ships modules that were deleted."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in _FOLDERS:
        shutil.copytree(_ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(_ROOT / name, tree)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tree / "dist"), str(tree)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    [built] = (tree / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    """A folder that pyproject.toml doesn't list is left out of the wheel without a warning; tests must not leak into it."""
    expected = {
        f"{package}/{file.relative_to(_ROOT / folder).as_posix()}"
        for folder, package in _FOLDERS.items()
        for file in (_ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }

    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    assert held == expected


def test_the_wheel_is_imported_without_the_tree(wheel: Path, tmp_path: Path) -> None:
    """Tests run on the editable install; only this one runs what a user gets."""
    program = "import leveret, leveret.brokers, leveret.middleware; print(leveret.__file__, leveret.__version__)"

    said = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(wheel)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout

    assert said.split() == [f"{wheel}/leveret/__init__.py", leveret.__version__]


def test_the_wheel_says_that_it_is_typed(wheel: Path) -> None:
    """Without py.typed a user's type checker takes the whole API for Any."""
    assert "leveret/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_every_entry_point_names_something_that_exists() -> None:
    """A wrong one breaks `leveret`, pytest or `opentelemetry-instrument` for whoever installs us."""
    points = importlib.metadata.distribution("leveret").entry_points

    loaded = {point.group: point.load() for point in points}

    assert set(loaded) == {"console_scripts", "opentelemetry_instrumentor", "pytest11"}


def test_the_three_places_of_the_version_agree() -> None:
    """An operator reads the changelog by the version that `leveret --version` names."""
    declared = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["version"]
    newest = re.search(r"^## \[?(\d[^\s\]]*)", (_ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert newest is not None, "CHANGELOG.md has no entry of the form `## 1.2.3`"
    assert (leveret.__version__, newest[1]) == (declared, declared)
