"""The blocking publisher: from threads, after a fork, from `def` handlers."""

import os
import re
import subprocess
import sys
import threading
import time

import pytest

from leveret import App, Envelope, InvalidJob, Job, Outgoing, Publish, PublishTimeout, Queue, Receipt
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


class Blocks:
    """Publish middleware that blocks its thread until it is released."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.released = threading.Event()

    async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
        self.entered.set()
        self.released.wait(30)
        return await proceed(envelope)


class Counts:
    """Publish middleware that counts."""

    def __init__(self) -> None:
        self.passed = 0

    async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
        self.passed += 1
        return await proceed(envelope)


@pytest.mark.parametrize("opened", [False, True], ids=["at its first use", "later"])
def test_middleware_of_another_app_that_blocks_the_shared_loop_is_named(*, opened: bool) -> None:
    """A bare TimeoutError after 5 s passes `except PublishError`, and nobody would look for the fault in another app."""
    blocks, counts = Blocks(), Counts()
    blocked = App("blocked", broker="memory://blocked", middleware=[blocks]).blocking_publisher()
    publisher = App("victim", broker="memory://victim", middleware=[counts]).blocking_publisher()
    if opened:
        publisher.publish(Note(1))
    thread = threading.Thread(target=blocked.publish, args=(Note(1),))
    thread.start()
    assert blocks.entered.wait(10)

    began = time.monotonic()
    try:
        with pytest.raises(
            PublishTimeout, match=rf"^nothing was sent .* at {re.escape(__file__)}, line \d+, in publish$"
        ) as raised:
            publisher.publish(Note(2), job_id="id-2", timeout_s=0.2)
        took_s = time.monotonic() - began
    finally:
        blocks.released.set()
    thread.join(10)

    assert (raised.value.job_id, raised.value.maybe_published) == ("id-2", False)
    assert took_s < 2.0, "timeout_s and a second, with room for a loaded machine"
    publisher.publish(Note(3))
    assert counts.passed == 1 + opened, "the job that wasn't sent must not be sent once the loop is free"
    publisher.close()
    blocked.close()


def test_a_timeout_after_the_publish_began_says_that_the_job_may_be_published() -> None:
    """A caller who is told that nothing was sent publishes again under another id, and the job runs twice."""
    blocks = Blocks()
    publisher = App("late", broker="memory://late", middleware=[blocks]).blocking_publisher()
    try:
        with pytest.raises(PublishTimeout, match=r"^no confirm arrived .*, in publish$") as raised:
            publisher.publish(Note(1), timeout_s=0.1)
    finally:
        blocks.released.set()

    assert raised.value.maybe_published
    publisher.close()


def test_errors_come_out_in_the_caller() -> None:
    """A wrong job would be lost in a thread that nobody looks at."""
    with (
        App("errors", broker="memory://errors").blocking_publisher() as publisher,
        pytest.raises(InvalidJob, match="field n: expected int, got str"),
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
