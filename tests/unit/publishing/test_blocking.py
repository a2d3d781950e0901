"""The blocking publisher: from threads, after a fork, from `def` handlers."""

import os
import subprocess
import sys
import threading

import pytest

from leveret import App, InvalidJob, Job, Outgoing, Queue
from leveret.testing import running

notes = Queue("notes")


class Note(Job, name="note.take", queue=notes):
    """A job."""

    n: int


def test_it_publishes_without_any_set_up_from_many_threads() -> None:
    """A module's variable in Django could not be used as it is."""
    publisher = App("threads", broker="memory://threads").blocking_publisher()
    ids: list[str] = []

    def publish(n: int) -> None:
        ids.extend(publisher.publish(Note(n)).job_id for _ in range(20))

    threads = [threading.Thread(target=publish, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert len(set(ids)) == 160
    publisher.close()
    assert publisher.publish(Note(1)).state == "confirmed"
    publisher.close()


def test_errors_come_out_in_the_caller() -> None:
    """A wrong job would be lost in a thread that nobody looks at."""
    with (
        App("errors", broker="memory://errors").blocking_publisher() as publisher,
        pytest.raises(InvalidJob, match="Expected `int`"),
    ):
        publisher.publish(Note("seven"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_it_starts_anew_after_a_fork(tmp_path: object) -> None:
    """Under gunicorn's prefork the child would wait for a thread that only its parent has."""
    publisher = App("fork", broker=f"sqlite:///{tmp_path}/fork.db").blocking_publisher()
    publisher.publish(Note(1))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, publisher.publish(Note(2)).state.encode())
            publisher.close()
        finally:
            os._exit(0)
    os.close(write)
    said = os.read(read, 100)
    os.waitpid(child, 0)
    os.close(read)

    assert said == b"confirmed"
    assert publisher.publish(Note(3)).state == "confirmed"
    publisher.close()


AT_EXIT = """
import atexit
from leveret import App, BrokerUnavailable, Job, Queue

class Note(Job, name="note.take", queue=Queue("notes")):
    n: int

publisher = App("exit", broker="amqp://localhost:1/").blocking_publisher()

@atexit.register
def last() -> None:
    try:
        publisher.publish(Note(1), job_id="id-1", timeout_s=2)
    except BrokerUnavailable as error:
        print(error.job_id, error)
"""


def test_first_used_while_the_interpreter_exits_it_raises_an_error_of_the_family() -> None:
    """A service's last words end in a RuntimeError of Python's insides, past the `except PublishError` that would have kept the job."""
    ended = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=30, check=True)
    assert ended.stdout.startswith("id-1 nothing was sent, because the interpreter exits"), ended


async def test_in_a_def_handler_it_inherits_the_line_of_the_job() -> None:
    """What one order set going couldn't be found in the logs."""
    app = App("line", broker="memory://")
    publisher = app.blocking_publisher()

    @app.handler
    def take(job: Note) -> None:
        if job.n == 1:
            publisher.publish_many([Note(2), Outgoing(Note(3))])

    async with running(app) as lab:
        receipt = await lab.publish(Note(1))
        await lab.drain()

        assert [(one.job, one.envelope.correlation_id) for one in lab.published] == [
            (Note(1), None),
            (Note(2), receipt.job_id),
            (Note(3), receipt.job_id),
        ]
        assert len(lab.done) == 3
