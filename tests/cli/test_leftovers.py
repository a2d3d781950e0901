"""What becomes of the threads and child processes that a `def` handler leaves, and of the worker that ran it."""

import os
import signal

from tests.cli.command import Project, alive, until

LEFT = """
import multiprocessing, threading, time
from concurrent.futures import ThreadPoolExecutor
from shop import Job, Queue, App, said

fork = multiprocessing.get_context("fork")
executor = ThreadPoolExecutor(1)
app = App("left", broker="sqlite:///shop.db")


class Leave(Job, name="leave", queue=Queue("left")): ...


class Terminate(Job, name="terminate", queue=Queue("left")): ...


@app.handler
def leave(job: Leave) -> None:
    child, daemon = (fork.Process(target=time.sleep, args=(600,), daemon=daemon) for daemon in (False, True))
    child.start()
    daemon.start()
    executor.submit(time.sleep, 600)
    said(f"{child.pid} {daemon.pid}")


@app.handler
def terminate(job: Terminate) -> None:
    child = fork.Process(target=time.sleep, args=(600,))
    child.start()
    child.terminate()
    child.join(5)
    said(f"the child ended with {child.exitcode}")
    child.kill()
"""


def test_a_stop_waits_for_leftovers_within_its_grace_only(project: Project) -> None:
    """The interpreter waited for a thread or child process for ever: the worker was killed, or hung until somebody saw it."""
    project.write("left.py", LEFT)
    project.call("import left; left.app.blocking_publisher().publish(left.Leave())")
    with project.start("work", "left:app", "--grace", "0") as worker:
        worker.wait_for("takes jobs")
        until(lambda: bool(project.said), lambda: worker.log)
        child, daemon = map(int, project.said[0].split())
        worker.stop()

        [left] = worker.wait_for(r"exits without waiting for what its handlers left running \((.*)\)")
        assert left == f"thread ThreadPoolExecutor-0_0, child process {child}"
        assert alive(child)  # nobody asked for its end
        assert not alive(daemon)
        os.kill(child, signal.SIGKILL)


def test_a_handler_can_terminate_a_process_that_it_forked(project: Project) -> None:
    """The child wrote the signal into the pipe of its worker's loop: the child lived on, and the worker stopped."""
    project.write("left.py", LEFT)
    project.call("import left; left.app.blocking_publisher().publish(left.Terminate())")
    with project.start("work", "left:app") as worker:
        worker.wait_for("takes jobs")
        until(lambda: bool(project.said), lambda: worker.log)

        assert project.said == [f"the child ended with {-signal.SIGTERM}"]
        assert "stopping" not in worker.log
        worker.stop()
