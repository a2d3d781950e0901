"""`leveret work` as processes: who dies, who is told to end, and what becomes of the jobs."""

import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.command import LEVERET, PATIENCE_S, Project, Running, alive, children_of, until

pytestmark = pytest.mark.fault


@contextmanager
def hangups(action: signal.Handlers) -> Generator[None]:
    """What is started in the block inherits `action` for SIGHUP: SIG_IGN, as under nohup, or SIG_DFL."""
    before = signal.signal(signal.SIGHUP, action)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def hangups_heard() -> Generator[None]:
    """Let workers hear of a lost terminal although the tests run under nohup."""
    with hangups(signal.SIG_DFL):
        yield


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A folder with shop.py and nothing else."""
    return Project(tmp_path)


def workers(running: Running, count: int) -> list[int]:
    """The processes of `count` workers, once they take."""
    return [int(pid) for pid in running.wait_for(r"worker (\d+) of app shop takes", count)]


def ended(project: Project) -> list[str]:
    """The orders whose handlers ended."""
    return [line.split()[1] for line in project.said if line.startswith("end")]


def started(project: Project) -> list[str]:
    return [line.split()[1] for line in project.said if line.startswith("start")]


def ready(project: Project) -> int:
    row = project.run("queues", "emails", "--json").json[0]
    return row["ready"] + (row["unsettled"] or 0)


def test_a_killed_worker_is_restarted_and_its_job_runs_again(project: Project) -> None:
    """The kernel kills for memory: the others go on, and the host has all its workers again a moment later."""
    with project.start("work", "-q", "emails", "--processes", "2") as running:
        workers(running, 2)
        project.publish("SendInvoice", {"order_id": 1, "seconds": 2})
        until(lambda: started(project) == ["1"])
        victim = int(project.said[0].split()[2])

        os.kill(victim, signal.SIGKILL)

        assert running.wait_for(r"worker (\d+) \(number \d\) died with SIGKILL; restarting it in 0\.\d s") == [
            str(victim)
        ]
        assert len(set(workers(running, 3))) == 3
        until(lambda: ended(project) == ["1"], lambda: running.log)
        running.stop()


def test_a_worker_that_always_dies_is_restarted_ever_more_rarely(project: Project) -> None:
    """Without back-off a broken deploy burns a core and fills the disk with its log."""
    project.write(
        "dying.py",
        "import os\nfrom shop import *\napp = App('shop', default_broker='sqlite:///shop.db', lifespan=lambda: os._exit(3))\n"
        "app.handler(note)\n",
    )

    with project.start("work", "dying:app", "--processes", "2") as running:
        running.wait_for(r"died with exit code 3; restarting it", count=8)
        waits = [float(text) for text in re.findall(r"number 0\) died.* in ([\d.]+) s", running.log)]

        assert all(wait <= 0.5 * 2**n + 0.1 for n, wait in enumerate(waits)), waits
        running.send(signal.SIGTERM)
        assert running.end() == 1


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("how", ["SIGTERM", "^C", "SIGHUP"])
def test_a_stop_lets_what_runs_end_and_exits_with_0(project: Project, processes: str, how: str) -> None:
    """Every deploy does this: a job that is cut off runs twice."""
    for n in range(4):
        project.publish("SendInvoice", {"order_id": n, "seconds": 1.5})
    with project.start("work", "-q", "emails=2", "--processes", processes, "--concurrency", "2") as running:
        workers(running, int(processes))
        until(lambda: len(started(project)) >= 2)
        if how == "^C":
            os.killpg(running.process.pid, signal.SIGINT)  # as a terminal does: the whole group
        elif how == "SIGHUP":
            running.send(signal.SIGHUP)
            running.wait_for("stopping: [12] running")
            running.send(signal.SIGHUP)  # when a terminal is lost, the shell sends one, and the kernel another
        else:
            running.send(signal.SIGTERM)

        assert running.end() == 0, running.log
    assert sorted(ended(project)) == sorted(started(project))
    assert len(ended(project)) + ready(project) == 4
    assert "Traceback" not in running.log


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_lost_terminal_lets_what_runs_end_and_exits_with_0(project: Project, processes: str) -> None:
    """A closed laptop ended a worker on the spot, and whatever it ran was run again from the beginning."""
    project.publish("SendInvoice", {"order_id": 1, "seconds": 1.5})
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", LEVERET, "work", "-q", "emails", "--processes", processes],
        cwd=project.folder,
        env=project.environment({}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        until(lambda: started(project) == ["1"])
        os.close(ours)

        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
    assert ended(project) == ["1"]
    assert ready(project) == 0


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_worker_that_ignores_hangups_outlives_its_terminal(project: Project, processes: str) -> None:
    """`nohup leveret work` is started so that it goes on after the log-out: it must not drain at it."""
    with hangups(signal.SIG_IGN), project.start("work", "-q", "emails", "--processes", processes) as running:
        pids = {running.process.pid, *workers(running, int(processes))}
        for pid in pids:
            os.kill(pid, signal.SIGHUP)
        project.publish("SendInvoice", {"order_id": 1})

        until(lambda: ended(project) == ["1"], lambda: running.log)
        assert "stopping" not in running.log
        running.stop()


def test_a_cron_process_that_loses_its_terminal_ends_in_order(project: Project) -> None:
    """A publish that was on its way is cut off, and nobody knows whether its job is there."""
    project.write("timed.py", "from shop import *\napp.cron('0 0 1 1 *', Note(), name='yearly')\n")
    with project.start("cron", "timed:app") as running:
        running.wait_for("schedule yearly")
        running.send(signal.SIGHUP)

        assert running.end() == 0, running.log
    assert "stopped" in running.log


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_second_signal_cuts_off_at_once_and_exits_with_1(project: Project, processes: str) -> None:
    """Who says it twice means it; what was cut off is delivered again."""
    project.publish("SendInvoice", {"order_id": 1, "seconds": 60})
    with project.start("work", "-q", "emails", "--processes", processes, "--grace", "50") as running:
        workers(running, int(processes))
        until(lambda: started(project) == ["1"])
        running.send(signal.SIGTERM)
        running.wait_for("stopping: 1 running")
        running.send(signal.SIGTERM)

        assert running.end(15) == 1, running.log
    assert ended(project) == []
    assert ready(project) == 1


def test_past_its_grace_it_cuts_off_and_exits_with_1(project: Project) -> None:
    """An orchestrator kills what doesn't end: better to end first, and say so."""
    project.publish("SendInvoice", {"order_id": 1, "seconds": 60})
    with project.start("work", "-q", "emails", "--processes", "2", "--grace", "0.5") as running:
        workers(running, 2)
        until(lambda: started(project) == ["1"])
        running.send(signal.SIGTERM)

        assert running.end(15) == 1, running.log
    assert "cut off" in running.log
    assert ready(project) == 1


def test_workers_whose_parent_was_killed_drain_and_end(project: Project) -> None:
    """An orphan that goes on consuming is a worker that nobody can stop, and that the next deploy doesn't know of."""
    project.publish("SendInvoice", {"order_id": 1, "seconds": 1.5})
    with project.start("work", "-q", "emails", "--processes", "2") as running:
        children = workers(running, 2)
        until(lambda: started(project) == ["1"])

        running.send(signal.SIGKILL)

        until(lambda: not any(map(alive, children)), lambda: running.log)
        assert ended(project) == ["1"]
        assert running.log.count("stopped: ") == 2
    assert ready(project) == 0


def test_what_is_configured_wrong_ends_all_workers_once_with_one_line(project: Project) -> None:
    """Four workers that restart for ever, saying the same, hide the one line that would help."""
    ran = project.run("work", "-q", "emials", "--processes", "4")

    assert ran.code == 2
    assert ran.line.startswith("leveret: app 'shop' has no handler for queue 'emials' (queues with handlers: ")


def test_a_stop_before_anything_has_started_is_a_clean_end(project: Project) -> None:
    """A deploy may be called off in its first second; nothing was lost, so nothing is to be alarmed about."""
    with project.start("work", "--processes", "2", "--log-level", "debug") as running:
        until(lambda: len(children_of(running.process.pid)) == 2)
        running.send(signal.SIGTERM)

        assert running.end(20) == 0, running.log


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_stop_while_the_lifespan_starts_ends_it(project: Project, processes: str) -> None:
    """A worker that waits for its database at start must still be stoppable without kill -9."""
    project.write(
        "waiting.py",
        "from shop import *\n@asynccontextmanager\nasync def forever():\n"
        "    said('entering')\n    await asyncio.sleep(1000)\n    yield\n"
        "app = App('shop', default_broker='sqlite:///shop.db', lifespan=forever)\napp.handler(note)\n",
    )
    with project.start("work", "waiting:app", "--processes", processes) as running:
        until(lambda: len(project.said) == int(processes))
        running.send(signal.SIGTERM)

        assert running.end(15) == 0, running.log
    assert "stopped while the app's lifespan was starting" in running.log


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_second_signal_ends_what_would_not_end(project: Project, processes: str) -> None:
    """A pool that doesn't close must not keep a worker alive that was told twice to end."""
    project.write(
        "leaving.py",
        "from shop import *\n@asynccontextmanager\nasync def sticky():\n    yield\n    said('leaving')\n    await asyncio.sleep(1000)\n"
        "app = App('shop', default_broker='sqlite:///shop.db', lifespan=sticky)\napp.handler(note)\n",
    )
    with project.start("work", "leaving:app", "--processes", processes) as running:
        workers(running, int(processes))
        running.send(signal.SIGTERM)
        until(lambda: "leaving" in project.said)
        running.send(signal.SIGTERM)

        assert running.end(20) == 1, running.log


def test_a_handler_that_blocks_the_loop_is_killed_after_a_second_signal(project: Project) -> None:
    """Blocking code in an `async def` hears no signal; the parent must end it all the same."""
    project.write(
        "blocked.py",
        "import time\nfrom shop import *\napp = App('shop', default_broker='sqlite:///shop.db')\n"
        "@app.handler\nasync def stuck(job: Note) -> None:\n    said('stuck')\n    time.sleep(1000)\n",
    )
    project.publish("Note", {})
    with project.start("work", "blocked:app", "--processes", "2") as running:
        workers(running, 1)
        until(lambda: project.said == ["stuck"])
        running.send(signal.SIGTERM)
        running.wait_for("stopped: ")
        running.send(signal.SIGTERM)

        assert running.end(20) == 1, running.log
    assert "didn't end in time; killing it" in running.log


def test_a_lifespan_that_fails_is_shown_without_its_password_and_tried_again(project: Project) -> None:
    """The database may be back in a minute; its URL must not be in the log for ever."""
    project.write(
        "failing.py",
        "from shop import *\n@asynccontextmanager\nasync def database():\n"
        "    raise OSError('no answer from postgresql://shop:hunter2@db/')\n    yield\n"
        "app = App('shop', default_broker='sqlite:///shop.db', lifespan=database)\napp.handler(note)\n",
    )
    with project.start("work", "failing:app", "--processes", "2") as running:
        running.wait_for(r"died with exit code 1; restarting it", count=3)
        running.send(signal.SIGTERM)
        running.end()

    assert "OSError: no answer from postgresql://shop:***@db/" in running.log
    assert "hunter2" not in running.log


def test_reload_restarts_on_a_change_and_outlives_a_broken_file(project: Project) -> None:
    """While somebody types, most states of a file are wrong; the command must be there when it is right again."""
    good = (project.folder / "shop.py").read_text()
    with project.start("work", "-q", "emails", "--reload") as running:
        workers(running, 1)
        time.sleep(1)  # watchfiles says nothing of when it begins to watch

        project.write("shop.py", good + "\ndef f(:\n")
        running.wait_for("SyntaxError")
        running.wait_for("waiting for a file to change")
        project.write("shop.py", good.replace("end {job.order_id}", "end new{job.order_id}"))
        workers(running, 2)
        project.publish("SendInvoice", {"order_id": 1})

        until(lambda: ended(project) == ["new1"], lambda: running.log)
        running.stop()
