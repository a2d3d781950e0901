"""What commands print on a terminal, through the installed command; the layout itself is tested in tests/unit/cli."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios

from tests.cli.command import LEVERET, Project

FIRST, SECOND = "0198e2a4-0000-7000-8000-00000000000a", "0198e2a4-0000-7000-8000-00000000000b"


def on_terminal(project: Project, columns: int, *arguments: str) -> list[str]:
    """Run `leveret` on a terminal of so many columns; return the lines that stay there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = subprocess.Popen(
        [LEVERET, *arguments],
        cwd=project.folder,
        env=project.environment({"TERM": "xterm"}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    printed = b""
    try:
        while more := os.read(ours, 65536):
            printed += more
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    command.wait()
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", printed.decode().replace("\r\n", "\n"))
    return [line.rpartition("\r")[2] for line in text.splitlines()]  # a progress bar overwrites itself


def test_a_terminal_gets_lines_that_fit_and_ids_that_can_be_copied(project: Project) -> None:
    """At 80 columns the ids were broken over three lines, so that nobody could copy one into `dead show`."""
    project.call(
        "from shop import SendInvoice, app\n"
        "with app.blocking_publisher() as publisher:\n"
        f"    for number, job_id in enumerate({[FIRST, SECOND, 'order-12']}):\n"
        "        publisher.publish(SendInvoice(order_id=-1 - number), job_id=job_id)"
    )
    with project.start("work", "-c", "1") as worker:
        worker.wait_for("buried in emails.dead", count=3)
        worker.stop()

    table = on_terminal(project, 80, "dead", "list", "emails")
    narrow = on_terminal(project, 60, "dead", "list", "emails")
    refusal = on_terminal(project, 80, "dead", "drop", "emails", "--yes", "--id", FIRST[:8])

    assert max(map(len, [*table, *refusal, *on_terminal(project, 80, "describe")])) <= 80
    assert max(map(len, narrow)) <= 60
    assert [line.split()[0] for line in table if "invoice.send" in line] == [FIRST, SECOND, "order-12"]
    assert "postgresql://shop:***@db/shop" in " ".join(narrow).split()
    assert {FIRST, SECOND} <= set(re.findall(r"[0-9a-f-]{36}", "\n".join(refusal)))
    other = project.run("dead", "drop", "emails", "--id", "order-1", "--yes")
    assert "has no dead letter with id 'order-1'" in other.line

    assert project.run("dead", "drop", "emails", "--id", FIRST, "--yes").code == 0
    short, *_ = next(
        line for line in on_terminal(project, 80, "dead", "list", "emails") if "invoice.send" in line
    ).split()
    assert short == SECOND[:8]
    assert project.run("dead", "show", "emails", short, "--json").json["id"] == SECOND
    piped = project.run("dead", "list", "emails").out.splitlines()
    assert [line.split()[0] for line in piped] == ["id", SECOND, "order-12"]
    assert all(line.endswith("(a rule buries it at once)") for line in piped[1:])
