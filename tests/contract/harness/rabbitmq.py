"""A RabbitMQ under test, behind a link that can freeze."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Unpack
from urllib.parse import urlsplit, urlunsplit

import pytest
from pamqp.commands import Basic

from leveret.envelope import JSON
from leveret.job import Priority, Queue
from tests.contract.harness.base import Foreign, Harness
from tests.rabbit.proxy import FaultProxy
from tests.rabbit.raw import connect

_NOT_HERE = "RabbitMQ isn't on this machine, so its link can't be cut or frozen"


class RabbitHarness(Harness):
    """A RabbitMQ node behind a link that can freeze."""

    example = "amqp://localhost/"
    marks = (pytest.mark.rabbit,)

    @classmethod
    def make(cls, request: pytest.FixtureRequest, folder: Path) -> Harness:
        """Return a harness for one case."""
        return cls(request.getfixturevalue("rabbit").url)

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.direct_url = url
        self._link: FaultProxy | None = None

    async def start(self) -> None:
        """Make the link if the node is on this machine; brokers that are opened later use it."""
        parts = urlsplit(self.direct_url)
        if parts.scheme == "amqp" and parts.hostname in {"127.0.0.1", "localhost"}:
            self._link = await FaultProxy(parts.port or 5672).__aenter__()
            credentials = parts.netloc.rpartition("@")[0]
            self.url = urlunsplit(parts._replace(netloc=f"{credentials}@127.0.0.1:{self._link.port}"))

    async def put(self, queue: Queue, body: bytes, **fields: Unpack[Foreign]) -> None:
        properties = Basic.Properties(
            headers=dict(fields.get("headers") or {}) or None,
            content_type=fields.get("content_type", JSON),
            content_encoding=fields.get("content_encoding"),
            message_id=fields.get("job_id"),
            message_type=fields.get("job") or None,
        )
        async with connect(self.direct_url) as raw:
            await raw.publish(queue.name, body, properties=properties)

    async def break_publishing(self) -> None:
        if self._link is None:
            pytest.skip(_NOT_HERE)
        self._link.freeze()

    async def heal(self) -> None:
        if self._link is not None:
            self._link.thaw()

    def cut(self) -> None:
        if self._link is None:
            pytest.skip(_NOT_HERE)
        self._link.reset()

    def _names(self, queue: Queue) -> list[str]:
        if queue.type == "classic":
            return [queue.name]
        return [queue.name if level is Priority.NORMAL else f"{queue.name}.{level.value}" for level in queue.levels]

    async def _delete(self, names: list[str]) -> None:
        async with connect(self.direct_url) as raw:
            for name in names:
                await raw.delete(name)

    async def delete(self, queue: Queue) -> None:
        await self._delete(self._names(queue))

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            if self._link is not None:
                await self._link.__aexit__(None, None, None)
            await self._delete(
                [
                    name
                    for queue in self.queues
                    for name in (*self._names(queue), f"{queue.name}.dead", f"{queue.name}.suspects")
                ]
            )


class ClassicHarness(RabbitHarness):
    """The same with classic queues."""

    queue_type: ClassVar[Literal["quorum", "classic"]] = "classic"


HARNESSES: dict[str, type[Harness]] = {"rabbitmq-quorum": RabbitHarness, "rabbitmq-classic": ClassicHarness}
