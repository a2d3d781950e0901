"""A connection to a server that answers as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import uvloop

from leveret.brokers.redis.wire import Wire

PATIENCE_S = 15.0


@asynccontextmanager
async def connected(*answers: bytes) -> AsyncGenerator[Wire]:
    """Yield a connection; each PING that comes gets the next answer, and each other command none."""
    left = list(answers)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if line == b"PING\r\n":
                writer.write(left.pop(0))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    _, wire = await asyncio.get_running_loop().create_connection(Wire, "127.0.0.1", port)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield wire
    finally:
        wire.close()
        server.close()
        await server.wait_closed()


def test_a_connection_is_one_of_uvloop_too() -> None:
    """No worker could connect: its loop is uvloop's, whose transports aren't asyncio's."""

    async def ping() -> bytes:
        async with connected(b"+PONG\r\n") as wire:
            answer: bytes = await wire.call("PING")
            return answer

    assert uvloop.run(ping()) == b"PONG"
