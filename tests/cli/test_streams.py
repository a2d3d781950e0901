"""`leveret` whose standard streams or working directory are broken."""

import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.cli.command import LEVERET, PATIENCE_S, Project, Ran

NOTE = ("publish", "shop:Note", "{}")
COMMANDS = [("queues",), ("dead", "list", "plain"), ("describe",), NOTE, ("--help",)]


def shell(project: Project, arguments: tuple[str, ...], redirections: str, **environment: str) -> Ran:
    """Run `leveret` as a shell does with these redirections."""
    return Ran(
        subprocess.run(
            ["sh", "-c", f"exec {shlex.join([LEVERET, *arguments])} {redirections}"],
            cwd=project.folder,
            env=project.environment(environment),
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )
    )


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_a_command_whose_streams_are_closed_does_its_work(project: Project, arguments: tuple[str, ...]) -> None:
    """Under cron or an init system a stream may be closed; the command would end in an AttributeError after, or before, its work."""
    ran = [shell(project, arguments, redirections) for redirections in (">&-", "2>&-", "<&- >&- 2>&-")]

    assert [(one.code, one.err) for one in ran] == [(0, "")] * 3


@pytest.mark.parametrize("redirections", [">&-", "<&-", "<&- >&-"])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_worker_whose_streams_are_closed_runs_jobs_and_stops(
    project: Project, redirections: str, processes: str
) -> None:
    """The loop's own pipes got the numbers of the closed streams, and the worker died by SIGABRT: at its stop, or at every start."""
    project.publish("SendInvoice", {"order_id": 1})
    wait = "while ! grep -sq end said; do sleep 0.1; done; kill -TERM $pid; wait $pid"

    ran = shell(project, ("work", "--processes", processes), f"{redirections} & pid=$!; {wait}")

    assert ran.code == 0, ran
    assert len(project.said) == 2, project.said
    assert "died" not in ran.err


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
def test_output_that_cannot_be_written_is_one_line_and_exit_1(
    project: Project, arguments: tuple[str, ...], environment: Mapping[str, str]
) -> None:
    """On a full disk a script's log would hold forty lines of traceback."""
    ran = shell(project, arguments, ">/dev/full", **environment)

    assert ran.code == 1, ran
    assert ran.line == "leveret: standard output can't be written: [Errno 28] No space left on device"


def test_an_error_that_cannot_be_written_keeps_its_exit_code(project: Project) -> None:
    """A process manager that restarts after 1 and not after 2 would restart a wrong configuration for ever."""
    assert shell(project, ("work", "shpo:app"), "2>/dev/full").code == 2
    assert shell(project, ("queues", "nowhere"), "2>/dev/full").code == 2
    assert shell(project, ("bogus",), "2>/dev/full").code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("work", "shop:app"),
        ("work", "shop:app", "-p", "2"),
        ("cron", "shop:app"),
        ("describe", "shop:app"),
        (*NOTE, "--app", "shop:app"),
        ("queues", "plain", "--broker", "sqlite:///shop.db"),
    ],
    ids=" ".join,
)
def test_a_deleted_working_directory_is_one_line_and_exit_2(
    project: Project, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """After a deploy that replaces the directory a shell still stands in the old one: the line must name that."""
    (tmp_path / "gone").mkdir()

    ran = Ran(
        subprocess.run(
            ["sh", "-c", f"cd gone && rmdir ../gone && exec {shlex.join([LEVERET, *arguments])}"],
            cwd=project.folder,
            env=project.environment({"LEVERET_APP": ""}),
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )
    )

    assert ran.code == 2, ran
    assert "the working directory" in ran.line
    assert "was deleted" in ran.line


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_encoding_of_the_output_lacks_are_no_traceback(project: Project, encoding: str) -> None:
    """Under a forced encoding, as in some containers, the one dead letter an operator needs would be a UnicodeEncodeError."""
    project.publish("Report", {"title": "Größe → 7"})
    with project.start("work") as worker:
        worker.wait_for("buried in")
        worker.stop()
    records = project.run("dead", "list", "reports", "--json", PYTHONIOENCODING=encoding).json
    commands = (("dead", "list", "reports"), ("dead", "show", "reports", records[0]["id"]), ("describe",))

    ran = [shell(project, command, "2>&1", PYTHONIOENCODING=encoding, PYTHONUTF8="0") for command in commands]

    assert records[0]["reason"] == "no paper for Größe → 7"
    assert [one.code for one in ran] == [0, 0, 0], ran
    assert "no paper for Gr" in ran[0].out
    assert "Traceback" not in ran[0].out
