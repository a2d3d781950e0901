"""What a process pays for before it runs a job."""

import json
import subprocess
import sys

import pytest

# Each costs 10 to 30 ms and 1 to 3 MB in every process.
_HEAVY = {
    "aio_pika",
    "aiormq",
    "asyncpg",
    "click",
    "croniter",
    "django",
    "importlib.metadata",
    "opentelemetry.sdk",
    "psycopg",
    "pytest",
    "redis",
    "rich",
    "sqlalchemy",
    "tenacity",
    "watchfiles",
}


def _imported_by(module: str) -> set[str]:
    return _imported_in(f"import {module}")


def _imported_in(program: str) -> set[str]:
    program += "\nimport sys, json; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "module",
    [
        "leveret",
        "leveret.brokers.memory",
        "leveret.brokers.rabbitmq",
        "leveret.brokers.sqlite",
        "leveret.middleware",
        "leveret.cron.scheduler",
        "leveret.process.cron",
        "leveret.process.main",
    ],
)
def test_nothing_heavy_is_imported(module: str) -> None:
    """A host starts dozens of workers, and a web service imports leveret to publish: both pay for each module, each time."""
    assert not _imported_by(module) & _HEAVY


def test_leveret_imports_no_broker_and_no_layer() -> None:
    """A publisher on RabbitMQ needn't know SQLite, nor a service without tracing OpenTelemetry."""
    imported = {
        name
        for name in _imported_by("leveret")
        if name.startswith(("leveret.brokers", "leveret.middleware", "opentelemetry", "sqlite3"))
    }

    assert not imported


@pytest.mark.parametrize("broker", ["leveret.brokers.memory", "leveret.brokers.rabbitmq"])
def test_a_broker_without_rows_imports_nothing_of_stores(broker: str) -> None:
    """A worker on RabbitMQ would pay for what gathers the transactions of a database."""
    stores = {
        "leveret.brokers.leases",
        "leveret.brokers.records",
        "leveret.brokers.rows",
        "leveret.brokers.turns",
        "leveret.brokers.sqlite",
        "leveret.brokers.postgresql",
    }

    assert not _imported_by(broker) & stores


@pytest.mark.parametrize("broker", ["memory.broker", "sqlite.broker", "postgresql.broker", "rabbitmq.broker"])
def test_a_broker_imports_nothing_of_its_job_store(broker: str) -> None:
    """A worker whose jobs have no results would pay for the store beside its broker."""
    imported = _imported_by(f"leveret.brokers.{broker}")

    assert not [name for name in imported if name == "leveret.store" or name.endswith((".jobs", ".records"))]


def test_publishing_in_transactions_imports_no_library_of_a_users_connection() -> None:
    """A service that uses one of them would need, and pay for, the others."""
    assert not _imported_by("leveret.brokers.postgresql.within") & {"django", "psycopg", "sqlalchemy"}


_WORK = """
import asyncio
from leveret import App, Job, Keep, Queue

class Send(Job, name="mail.send", queue=Queue("mails"){keep}): pass

app, ran = App("shop", broker="memory://"), asyncio.Event()

@app.handler
async def send(job: Send) -> None:
    ran.set()

async def main() -> None:
    async with app.publisher() as publisher, app.worker():
        await publisher.publish(Send())
        await publisher.publish_many([Send()])
        await ran.wait()

asyncio.run(main())
"""


def test_a_process_whose_classes_keep_nothing_imports_nothing_of_results() -> None:
    """A class without `keep` costs nothing on any path, in memory neither."""
    plain, keeping = (_imported_in(_WORK.format(keep=keep)) for keep in ("", ", keep=Keep()"))
    of_results = {name for name in keeping - plain if name.startswith("leveret.")}

    assert {"leveret.results.recorder", "leveret.store", "leveret.brokers.memory.jobs"} <= of_results
    assert not [name for name in plain if name.startswith("leveret.results") or name in of_results]
