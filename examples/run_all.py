"""Run every example, each in a process of its own: `make examples`. One that finds something wrong ends with an error.

Examples with transactions get a database each, on the PostgreSQL of the tests (LEVERET_TEST_POSTGRES, or one that is started here);
the outbox's gets a RabbitMQ too (LEVERET_TEST_RABBIT).
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests.nodes import Unavailable  # noqa: E402
from tests.postgres.node import Node, Postgres, find_postgres  # noqa: E402
from tests.rabbit.node import Node as RabbitNode  # noqa: E402
from tests.rabbit.node import Rabbit, find_rabbit  # noqa: E402

EXAMPLES = {
    "index_files/try_out.py": ["--limit", "200"],
    "fastapi_service.py": [],
    "fastapi_reports.py": [],
    "embedded_worker.py": [],
    "django_view.py": [],
    "django_project/try_out.py": [],
    "flask_service.py": [],
    "shared_contract/try_out.py": [],
    "database_pool.py": [],
    "retry_rules.py": [],
    "pydantic_fields.py": [],
    "own_layers.py": [],
    "orders_asyncpg.py": [],
    "orders_sqlalchemy.py": [],
    "orders_outbox.py": [],
}
WITH_DATABASE = {"django_view.py", "orders_asyncpg.py", "orders_sqlalchemy.py", "orders_outbox.py"}
WITH_RABBITMQ = {"orders_outbox.py"}
# of their own, whatever the shell has set
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("LEVERET_")}


def run(*command: str, **environment: str) -> tuple[bool, str]:
    try:
        ended = subprocess.run(
            [sys.executable, *command],
            env=ENVIRONMENT | environment,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
    except subprocess.TimeoutExpired as error:
        return False, f"{error}\n{error.output}\n"
    return ended.returncode == 0, ended.stdout


@asynccontextmanager
async def server() -> AsyncGenerator[Postgres]:
    found = find_postgres()
    opened = found if isinstance(found, Postgres) else Node(found, conf={"fsync": "off"})
    try:
        if isinstance(opened, Node):
            await opened.start()
        yield opened
    finally:
        await opened.close()


@asynccontextmanager
async def rabbitmq() -> AsyncGenerator[str]:
    """Start a RabbitMQ, or take that of the tests."""
    found = find_rabbit()
    opened = found if isinstance(found, Rabbit) else RabbitNode(found)
    try:
        if isinstance(opened, RabbitNode):
            await opened.start()
        yield opened.url
    finally:
        await opened.close()


async def run_on_a_database(postgres: Postgres, program: str, **environment: str) -> tuple[bool, str]:
    async with postgres.database() as url:
        migrated, output = await asyncio.to_thread(run, "-m", "leveret", "migrate", "--url", url)
        return await asyncio.to_thread(run, program, DATABASE_URL=url, **environment) if migrated else (False, output)


def say(name: str, began: float, output: str, *, good: bool) -> bool:
    word = "ok" if good else "FAILED"
    print(f"{word:6} {time.monotonic() - began:5.1f} s  {name}\n{'' if good else output}", end="", flush=True)
    return not good


async def main() -> int:
    failed = 0
    for name, arguments in EXAMPLES.items():
        if name not in WITH_DATABASE:
            began = time.monotonic()
            good, output = run(str(HERE / name), *arguments)
            failed += say(name, began, output, good=good)
    try:
        async with server() as postgres:
            for name in filter(WITH_DATABASE.__contains__, EXAMPLES):
                began = time.monotonic()
                if name in WITH_RABBITMQ:
                    async with rabbitmq() as url:
                        good, output = await run_on_a_database(postgres, str(HERE / name), AMQP_URL=url)
                else:
                    good, output = await run_on_a_database(postgres, str(HERE / name))
                failed += say(name, began, output, good=good)
    except Unavailable as error:
        print(f"{', '.join(sorted(WITH_DATABASE))} need servers: {error}")
        failed += os.environ.get("CI") == "true"
    return failed


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
