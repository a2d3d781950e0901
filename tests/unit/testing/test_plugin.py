"""The fixtures of the pytest plugin, in a pytest of their own, as a user's tests have them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_TEST = """
import asyncio
from leveret import App, Job, Queue

class Note(Job, name="note", queue=Queue("notes")): ...

app, kept = App("unit"), []

@app.handler
async def handle(job: Note) -> None: ...

async def test_real(leveret_rabbitmq):
    async with leveret_rabbitmq(app) as lab:
        await lab.publish(Note())

async def test_left(leveret_running):
    async with leveret_running(app, resources=None) as lab:
        await lab.publish(Note())
        await lab.drain()
        assert len(lab.done) == 1

def test_not_left(leveret_running):
    kept.extend([leveret_running(app), asyncio.new_event_loop()])
    kept[1].run_until_complete(kept[0].__aenter__())
"""


def run(folder: Path, *arguments: str, **environment: str) -> str:
    """Run the tests above in `folder`, where no Docker can be found, and return what pytest prints."""
    (folder / "test_notes.py").write_text(_TEST, encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LEVERET_", "PYTEST_", "CI"))}
    command = [sys.executable, "-m", "pytest", "-rsfE", "-p", "no:xdist", "-p", "no:hypothesispytest"]
    options = ["-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function", *arguments]
    nowhere = f"unix://{folder}/no-docker.sock"
    ended = subprocess.run(
        [*command, *options, "test_notes.py"],
        check=False,
        cwd=folder,
        env=kept | {"DOCKER_HOST": nowhere} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return " ".join((ended.stdout + ended.stderr).split())


def test_without_a_rabbitmq_the_test_is_skipped_and_says_what_to_do(tmp_path: Path) -> None:
    """A suite that needs Docker on every laptop isn't run; one that says nothing is never run on a broker."""
    output = run(tmp_path)

    assert "2 passed, 1 skipped, 1 error" in output, output
    assert "give --leveret-amqp or LEVERET_TEST_AMQP a broker's URL, or start Docker, which gave:" in output
    assert "the test entered a lab of app 'unit' and didn't leave it; use async with" in output


def test_in_ci_it_fails(tmp_path: Path) -> None:
    """A pipeline that lost its broker would be green for ever."""
    output = run(tmp_path, "-k", "real", "-W", "error", CI="true")

    assert "1 error" in output, output
    assert "Unraisable" not in output, "the Docker client's open socket becomes an error of the whole suite"
    assert "no RabbitMQ for leveret_rabbitmq" in output


def test_the_option_beats_the_environment(tmp_path: Path) -> None:
    """One run on another broker, without changing what the shell exports. Another kind of broker is refused."""
    output = run(tmp_path, "-k", "real", "--leveret-amqp", "sqlite:///x.db", LEVERET_TEST_AMQP="memory://")

    assert "needs a URL that begins with amqp:// or amqps://, not 'sqlite'" in output, output
