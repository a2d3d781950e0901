"""examples/: the showpiece runs here, on each broker; the short ones by `make examples`, each in seconds."""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.examples.markdown import ROOT
from tests.rabbit.node import Rabbit
from tests.redis.node import Server

INDEX_FILES = ROOT / "examples" / "index_files"
PROGRAM = "examples/index_files/try_out.py"
LEVERET = str(Path(sysconfig.get_path("scripts"), "leveret"))
APP = "examples.index_files:app"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the example alone, so that .demo is the test's own."""
    shutil.copytree(
        INDEX_FILES, tmp_path / "checkout" / "examples" / "index_files", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path / "checkout"


def fails_at_first(path: Path) -> bool:
    """The example's own rule."""
    return sum(str(path).encode()) % 50 == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three texts, one of which fails at its first attempt; a binary file, and one that can't be read at all."""
    folder = tmp_path / "texts"
    (folder / "deeper" / "__pycache__").mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [folder / f"{a}{b}.txt" for a in letters for b in letters]  # their sums cover all remainders of 50
    calm, flaky = [[path for path in texts if fails_at_first(path) is wanted] for wanted in (False, True)]
    calm[0].write_text("the hare and the tortoise\n", encoding="utf-8")
    flaky[0].write_text("one two three\n", encoding="utf-8")
    (folder / "deeper" / "größe.txt").write_text("große und kleine Hasen\n" * 5000, encoding="utf-8")
    (folder / "deeper" / "__pycache__" / "x.pyc").write_bytes(b"\xff")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    return folder


def run(checkout: Path, *command: str, broker: str | None) -> str:
    """Type `command` there; it must end with 0."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LEVERET_")}
    environment = kept if broker is None else kept | {"LEVERET_BROKER": broker}
    ended = subprocess.run(
        command, check=False, cwd=checkout, env=environment, capture_output=True, text=True, timeout=90
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def index(checkout: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program on `folder`, with these variables, to its end."""
    return subprocess.run(
        [sys.executable, PROGRAM, str(folder)],
        check=False,
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def row(output: str) -> list[int]:
    """Published, done, retried and dead, of the table at the end."""
    [line] = re.findall(r"file\.index\s*│(.*)", output)
    return [int(cell) for cell in line.split("│")[:4]]


SERVERS = [
    pytest.param("rabbitmq", marks=pytest.mark.rabbit),
    pytest.param("postgresql", marks=pytest.mark.postgres),
    pytest.param("redis", marks=pytest.mark.redis),
]


@pytest.fixture(params=["sqlite", *SERVERS])
def broker(request: pytest.FixtureRequest) -> str | None:
    """None: the example's own default."""
    match request.param:
        case "rabbitmq":
            rabbit: Rabbit = request.getfixturevalue("rabbit")
            return rabbit.url
        case "redis":
            redis: Server = request.getfixturevalue("redis")
            return redis.url
        case "postgresql":
            url: str = request.getfixturevalue("postgres_database")
            return url
        case _:
            return None


def test_the_demo_ends_with_the_right_totals_and_two_commands_that_work(
    checkout: Path, folder: Path, broker: str | None
) -> None:
    """`make demo` is the first thing that anybody sees, and the second run is the second."""
    flaky = sum(fails_at_first(path) for path in folder.rglob("*") if path.suffix in {".txt", ".png"})
    for _ in range(2):
        output = run(checkout, sys.executable, str(checkout / PROGRAM), str(folder), broker=broker)
        assert row(output) == [5, 3, flaky, 2]
        assert flaky >= 1

        assert max(map(len, output.splitlines()[2:-2])) <= 80  # the folder and the commands have this test's long paths
        assert all(f"\n{word}: " in output for word in ("retried", "dead"))
        listing, queues = [shlex.split(line) for line in output.splitlines()[-2:]]
        letters = json.loads(run(checkout, *listing, "--json", broker=broker))
        reasons = sorted(letter["reason"] for letter in letters)
        assert len(reasons) == 2, reasons
        assert all(text in reasons[0] for text in ("FileNotFoundError", "gone.txt is no readable text"))
        assert all(text in reasons[1] for text in ("can't decode byte 0x89", "picture.png is no readable text"))
        assert "demo.files" in run(checkout, *queues, broker=broker)


def test_what_was_indexed_can_be_looked_up(checkout: Path, folder: Path) -> None:
    """Jobs that ran but left nothing behind would give the same table."""
    run(checkout, sys.executable, PROGRAM, str(folder), broker=None)
    index = sqlite3.connect(checkout / ".demo" / "1" / "index.db")
    words = dict(
        index.execute(
            "SELECT key, sum(value) FROM files, json_each(words) WHERE words IS NOT NULL GROUP BY key"
        ).fetchall()
    )
    index.close()
    assert words["the"] == 2
    assert words["große"] == words["hasen"] == 5000
    assert words["three"] == 1


def test_a_limit_indexes_so_many_files(checkout: Path, folder: Path) -> None:
    """For a look at a large folder."""
    output = run(checkout, sys.executable, PROGRAM, str(folder), "--limit", "2", broker=None)
    assert row(output)[0] == 2


def test_the_demo_is_an_app_for_the_command_line_too(checkout: Path, folder: Path) -> None:
    """What is shown in one process must be what is run in several."""
    assert "→ note → Timeout(60) → examples.index_files.index_file" in run(
        checkout, LEVERET, "describe", APP, broker=None
    )
    worker = subprocess.Popen([LEVERET, "work", APP], cwd=checkout, stderr=subprocess.PIPE, text=True)
    try:
        assert worker.stderr is not None
        assert "takes jobs from demo.files" in worker.stderr.readline()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
    finally:
        worker.kill()
        worker.communicate()


def test_two_runs_beside_each_other_end_with_their_own_totals(checkout: Path, folder: Path) -> None:
    """They emptied each other's index, so that neither ever ended."""
    runs = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(folder), "--limit", limit],
            cwd=checkout,
            env={name: value for name, value in os.environ.items() if not name.startswith("LEVERET_")},
            stdout=subprocess.PIPE,
            text=True,
        )
        for limit in ("5", "4")
    ]
    try:
        outputs = [run.communicate(timeout=90)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [row(output)[0] for output in outputs] == [5, 4]
    assert {path.name for path in (checkout / ".demo").iterdir()} == {"1", "2"}


def test_the_folder_is_named_before_anything_is_imported_that_takes_long(checkout: Path, folder: Path) -> None:
    """A program that says nothing for seconds is stopped by whoever tries it."""
    for package in ("leveret", "rich", "asyncio"):
        (checkout / f"{package}.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    ended = index(checkout, folder, PYTHONPATH=str(checkout))

    assert ended.stdout == f"indexing this folder through a queue:\n  {folder}\n"
    assert ended.stderr == "imported\n"


def test_no_broker_is_one_line(checkout: Path, folder: Path) -> None:
    """A traceback would be a stranger's first impression."""
    ended = index(checkout, folder, LEVERET_BROKER="amqq://guest:guest@localhost/")

    assert ended.returncode == 1
    assert "Error: the broker's URL 'amqq://guest:***@localhost/' has no known scheme" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


def test_the_demo_is_short() -> None:
    """It is read before it is run."""
    assert len((INDEX_FILES / "__init__.py").read_text(encoding="utf-8").splitlines()) < 80
    assert len((ROOT / PROGRAM).read_text(encoding="utf-8").splitlines()) < 110


def test_make_examples_runs_every_example() -> None:
    """An example that nobody runs is wrong within a month."""
    listed = set(runpy.run_path(str(ROOT / "examples" / "run_all.py"))["EXAMPLES"])
    programs = {path.name for path in (ROOT / "examples").glob("*.py")} - {"run_all.py"}
    folders = {f"{path.parent.name}/{path.name}" for path in (ROOT / "examples").glob("*/try_out.py")}
    assert listed == programs | folders
    assert {path.name for path in (ROOT / "examples").iterdir() if path.is_dir() and path.name[0] not in "._"} == {
        name.split("/")[0] for name in folders
    }
