"""Two services, each a process of its own, that share one module: web publishes, then a worker of mailer does the work."""

import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
EXPECTED = {"invoice-7": "to a@example.org (en)", "reset-a@example.org": "to a@example.org"}


def outbox(folder: str) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in Path(folder, "outbox").iterdir()}


with tempfile.TemporaryDirectory() as folder:
    Path(folder, "outbox").mkdir()
    environment = {
        **os.environ,
        "LEVERET_BROKER": f"sqlite:///{folder}/jobs.db",
        "OUTBOX": f"{folder}/outbox",
        "LEVERET_LOG": "warning",
    }
    subprocess.run(
        [sys.executable, "-m", "web", "7", "a@example.org"], cwd=HERE, env=environment, check=True, timeout=30
    )
    assert outbox(folder) == {}  # no worker yet: the jobs wait
    leveret = Path(sysconfig.get_path("scripts"), "leveret")
    worker = subprocess.Popen([leveret, "work", "mailer:app"], cwd=HERE, env=environment)
    deadline = time.monotonic() + 30
    while outbox(folder) != EXPECTED and worker.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    assert outbox(folder) == EXPECTED, outbox(folder)
