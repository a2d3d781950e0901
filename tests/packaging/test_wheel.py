"""What a user installs is what lies in the tree."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import leveret

_ROOT = Path(__file__).parents[2]
_FOLDERS = {"framework": "leveret", "brokers": "leveret/brokers", "middleware": "leveret/middleware"}


_BESIDE = ("benchmarks", "docs", "examples", "tests")
_FILES = ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml", "setup.py")
_MADE = shutil.ignore_patterns("__pycache__", "node_modules", "*.db", "*.db-shm", "*.db-wal")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with an sdist, and a wheel that was built from it: in a used tree it would hold modules that were deleted."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in (*_FOLDERS, *_BESIDE):
        shutil.copytree(_ROOT / folder, tree / folder, ignore=_MADE)
    for name in _FILES:
        shutil.copy(_ROOT / name, tree)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tree / "dist"), str(tree)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """The wheel."""
    [built] = (tree / "dist").glob("*.whl")
    return built


def test_the_sdist_holds_what_a_reader_and_a_packager_need(tree: Path) -> None:
    """A distribution runs the tests of the sdist; a reader without a clone looks for the docs and examples."""
    expected = set(_FILES) | {
        file.relative_to(tree).as_posix()
        for folder in (*_FOLDERS, *_BESIDE)
        for file in (tree / folder).rglob("*")
        if file.is_file()
    }
    [sdist] = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}

    assert {name for name in held if not name.startswith("leveret.egg-info/")} == expected | {"PKG-INFO", "setup.cfg"}


def test_the_links_of_the_readme_work_on_a_package_index(wheel: Path) -> None:
    """An index shows the README without the files beside it: each relative link would lead nowhere."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(archive.read(name).decode())
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    source = f"{project['urls']['Source']}/blob/v{project['version']}/"
    shown, readme = str(metadata.get_payload()), (_ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", shown)

    assert metadata["Description-Content-Type"] == "text/markdown"
    assert all(link.startswith("https://") for link in links)
    own = [link.removeprefix(source) for link in links if link.startswith(source)]
    assert {"README.md#install", "docs/operations.md"} <= set(own)
    assert all((_ROOT / link.partition("#")[0]).exists() for link in own)
    code = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    assert code.findall(shown) == code.findall(readme)


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


def test_the_wheel_has_its_migrations(wheel: Path, tmp_path: Path) -> None:
    """Without them `leveret migrate` would find nothing to do, and every worker an empty database."""
    program = "from leveret.brokers.postgresql.schema import shipped; print(*(one.name for one in shipped()))"

    said = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(wheel)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout

    files = sorted(file.stem for file in (_ROOT / "brokers/postgresql/migrations").glob("*.sql"))
    assert files
    assert said.split() == files


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
