"""The fixtures of the outbox."""

from collections.abc import AsyncGenerator

import pytest_asyncio

from tests.outbox.shop import Shop, migrated
from tests.postgres.node import Postgres
from tests.rabbit.node import Rabbit


@pytest_asyncio.fixture
async def url(postgres: Postgres) -> AsyncGenerator[str]:
    """A database with leveret's tables."""
    async with migrated(postgres) as made:
        yield made


@pytest_asyncio.fixture
async def shop(rabbit: Rabbit, url: str) -> Shop:
    """A shop on the session's RabbitMQ."""
    return Shop(rabbit.url, url)
