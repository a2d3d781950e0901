"""What a running worker on RabbitMQ has imported."""

import json
import subprocess
import sys
from pathlib import Path

from tests.rabbit.node import Rabbit

_APP = """
import json, os, sys
from leveret import App, Job, Queue
from leveret.middleware import Logs, RateLimit, Retries, Timeout, Tracing


class Look(Job, name="tests.look", queue=Queue("tests.light")):
    file: str


app = App("light", broker=os.environ["URL"], middleware=[Tracing(), Logs(), Retries(), RateLimit(1000), Timeout(30)])


@app.handler
async def look(job: Look) -> None:
    with open(job.file + ".new", "w") as file:
        json.dump(sorted(sys.modules), file)
    os.rename(job.file + ".new", job.file)
"""

# Each costs up to 30 ms per start and up to 3 MB per process. Some also mean that a worker does the work of the command line,
# of a cron process or of a blocking publisher.
_UNWANTED = {
    "aio_pika",
    "aiormq",
    "asyncpg",
    "click",
    "croniter",
    "difflib",
    "email",
    "hashlib",
    "http",
    "importlib.metadata",
    "multiprocessing",
    "opentelemetry",
    "pytest",
    "redis",
    "rich",
    "sqlite3",
    "tenacity",
    "watchfiles",
    "zoneinfo",
    "leveret.publishing.blocking",
    "leveret.brokers.leases",
    "leveret.brokers.memory",
    "leveret.brokers.rabbitmq.admin",
    "leveret.brokers.rows",
    "leveret.brokers.sqlite",
    "leveret.brokers.turns",
    "leveret.cli",
    "leveret.cron",
    "leveret.process.cron",
    "leveret.process.supervisor",
    "leveret.testing",
}


def test_a_running_worker_has_imported_nothing_that_it_does_not_need(rabbit: Rabbit, tmp_path: Path) -> None:
    """A host runs dozens of workers: what one imports without need is paid for in each, and comes back with any careless line."""
    (tmp_path / "light_app.py").write_text(_APP)
    file = tmp_path / "modules.json"
    environment = {"URL": rabbit.url, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}
    leveret = [sys.executable, "-m", "leveret"]
    publish = [*leveret, "publish", "light_app:Look", json.dumps({"file": str(file)}), "--app", "light_app:app"]
    subprocess.run(publish, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    with subprocess.Popen(
        [*leveret, "work", "light_app:app"], env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as worker:
        try:
            assert worker.stderr is not None
            for line in worker.stderr:
                if ": done after" in line:
                    break
        finally:
            worker.terminate()
    imported = set(json.loads(file.read_text()))

    assert "leveret.brokers.rabbitmq" in imported
    assert imported & _UNWANTED == set()
