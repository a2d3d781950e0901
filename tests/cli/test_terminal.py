"""What `leveret work` and `leveret cron` print on a terminal of 80 columns."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable

from tests.cli.command import LEVERET, PATIENCE_S, Project


def shown(project: Project, arguments: list[str], ended: Callable[[str], bool], **environment: str) -> str:
    """Run `leveret` on a terminal until `ended` is true of the words that it shows, and then stop it with SIGTERM; return it all."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 80, 0, 0))
    process = subprocess.Popen(
        [LEVERET, *arguments],
        cwd=project.folder,
        env=project.environment({"TERM": "xterm", **environment}),
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    text, stopping, ends = "", False, time.monotonic() + PATIENCE_S
    try:
        while select.select([ours], [], [], max(0.0, ends - time.monotonic()))[0]:
            try:
                text += os.read(ours, 1 << 16).decode().replace("\r\n", "\n")
            except OSError:  # the terminal's last process has ended
                break
            if not stopping and ended(" ".join(text.split())):
                process.send_signal(signal.SIGTERM)
                stopping = True
        assert stopping, text
        assert process.wait(PATIENCE_S) == 0, text
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return text


def bare(text: str) -> str:
    """Return the text without colours."""
    return re.sub(r"\x1b\[\d*m", "", text)


def test_the_lines_of_a_worker_fit(project: Project) -> None:
    """A terminal breaks a line that is too long in the middle of a word or an id, and a screenful holds six jobs."""
    ids = [project.publish("SendInvoice", {"order_id": 7}) for _ in range(2)]
    failed = project.publish("SendInvoice", {"order_id": -1})
    project.write("logged.py", "from leveret import App\nfrom leveret.middleware import Logs\nimport shop\n")
    with (project.folder / "logged.py").open("a") as file:
        file.write(
            "app = App('logged', default_broker='sqlite:///shop.db', middleware=[Logs()])\napp.handler(shop.send_invoice)\n"
        )

    def ended(text: str) -> bool:
        workers = text.count(" of app logged takes")
        return workers == 2 and text.count(" done after ") == 2 and text.count("ValueError: ") > 1

    text = shown(project, ["work", "logged:app", "--processes", "2"], ended)

    assert "\x1b[32mINFO\x1b[0m" in text
    assert "\x1b[31mERROR\x1b[0m" in text
    lines = bare(text).splitlines()
    assert (
        len([line for line in lines if re.match(r"\d\d:\d\d:\d\d #[01] INFO worker \d+ of app logged takes", line)])
        == 2
    )
    for job_id in ids:
        begins = rf"\d\d:\d\d:\d\d #[01] INFO job invoice.send {job_id[:18]}: done after \S+ ms"
        assert [line for line in lines if re.fullmatch(begins, line)]
    assert [line for line in lines if f"ERROR job invoice.send {failed[:18]}: buried in emails.dead" in line]
    assert max(len(line) for line in lines if not line.startswith("  ")) <= 80
    assert [line for line in lines if line.startswith('    File "') and line.endswith("in send_invoice")]


def test_the_lines_of_cron_fit_and_colours_can_be_switched_off(project: Project) -> None:
    """Codes for colours are noise on a terminal that doesn't know them, and to a reader who can't see them."""
    project.write(
        "timed.py",
        "import shop\nfrom leveret import App\napp = App('timed', default_broker='sqlite:///shop.db')\n"
        "app.cron('* * * * * *', shop.Note(), name='every-second', tz='America/Argentina/ComodRivadavia')\n",
    )

    text = shown(project, ["cron", "timed:app"], lambda words: "published timed.every" in words, NO_COLOR="1")

    lines = text.splitlines()
    assert "\x1b" not in text
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO schedule every-second .*", lines[0])
    assert re.search(r"next slot\s+\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d-03:00\n", text)  # as `describe` shows it
    assert max(map(len, lines)) <= 80
