"""The link that is spoilt in tests: a fault that doesn't strike, or strikes elsewhere, makes a test of it pass."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

import pytest

from tests.proxy import FaultProxy

T = TypeVar("T")
SILENCE_S = 0.05


@pytest.fixture
async def link() -> AsyncGenerator[FaultProxy]:
    """A link to a server that sends back what it gets."""
    served: set[asyncio.Task[None] | None] = set()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError):  # the link was reset
            while data := await reader.read(4096):
                writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server:
        async with FaultProxy(server.sockets[0].getsockname()[1]) as made:
            yield made
        await asyncio.gather(*(one for one in served if one is not None))


async def soon(answer: Awaitable[T]) -> T:
    """Wait for what comes at once."""
    return await asyncio.wait_for(answer, 10)


async def silent(reader: asyncio.StreamReader) -> bool:
    """Say whether nothing comes."""
    try:
        await asyncio.wait_for(reader.read(1), SILENCE_S)
    except TimeoutError:
        return True
    return False


async def test_a_mute_link_accepts_and_never_answers_while_those_before_go_on(link: FaultProxy) -> None:
    """A load balancer without a server behind it does that; a refusal instead would be the easy case."""
    before, to_before = await asyncio.open_connection("127.0.0.1", link.port)
    to_before.write(b"a")
    assert await soon(before.readexactly(1)) == b"a"
    link.mute = True
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    writer.write(b"b")
    to_before.write(b"c")
    assert await soon(before.readexactly(1)) == b"c"
    assert await silent(reader)
    for one in (writer, to_before):
        one.close()


async def test_an_answer_stops_in_its_middle_and_goes_on_after_the_thaw(link: FaultProxy) -> None:
    """Half a handshake, then silence: whatever is lost at the cut would be a fault of the test's own."""
    link.freeze_after("down", 3)
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    writer.write(b"abcdef")
    assert await soon(reader.readexactly(3)) == b"abc"
    assert await silent(reader)
    link.thaw()
    assert await soon(reader.readexactly(3)) == b"def"
    writer.close()


@pytest.mark.parametrize("count", [0, 1, 4])
async def test_a_link_is_reset_after_an_exact_count(link: FaultProxy, count: int) -> None:
    """A cut that spares a byte never falls into each place of a frame."""
    link.cut_after("up", count)
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    writer.write(b"abcdef")
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await soon(reader.readexactly(6))
    assert link.passed["up"] == count
    writer.close()


def test_a_url_leads_through_the_link(link: FaultProxy) -> None:
    """A URL that still named the server, or lost a part, would test a sound link or another database."""
    assert (
        link.url_of("postgresql://u:p%40@127.0.0.1:5432/db?a=b") == f"postgresql://u:p%40@127.0.0.1:{link.port}/db?a=b"
    )
    assert link.url_of("redis://host") == f"redis://127.0.0.1:{link.port}"
