"""A connection as its channels see it, and the error with which either of them ends."""

from __future__ import annotations

import asyncio
from typing import Any, Literal, Protocol

WRITE_HIGH_BYTES = 1 << 20
"""Above this many unsent bytes publishers wait; acks and heartbeats don't."""
CLOSE_TIMEOUT_S = 3.0


class Closed(Exception):
    """A channel, a connection or its socket was closed; `code` is AMQP's reply code, 0 if there was none."""

    def __init__(self, scope: Literal["channel", "connection", "socket"], code: int, text: str) -> None:
        super().__init__(text)
        self.scope = scope
        self.code = code
        self.text = text


class Wire(Protocol):
    """A connection, as its channels see it."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that reads and writes."""
        ...

    @property
    def frame_max(self) -> int:
        """The largest frame, in bytes."""
        ...

    @property
    def writable(self) -> bool:
        """Whether publishes may be written now; acks and heartbeats always are."""
        ...

    @property
    def queued(self) -> int:
        """Bytes of publishes that are sent at the end of this loop turn."""
        ...

    def write(self, data: bytes, /) -> None:
        """Send `data` at the end of this loop turn."""
        ...

    def write_all(self, head: bytes, rest: list[bytes | memoryview], size: int, /) -> None:
        """Send a publish of `size` bytes in pieces, in order."""
        ...

    def flush(self) -> None:
        """Hand the collected data to the socket."""
        ...

    def forget(self, number: int, /) -> None:
        """Free the number of a closed channel."""
        ...


def check_open(closed: Closed | None) -> None:
    """Raise `closed`, unless it is None."""
    if closed is not None:
        raise closed.with_traceback(None)  # otherwise each raise would add its frames to the traceback


def fail(future: asyncio.Future[Any], why: Exception) -> None:
    """End `future` with `why`, unless it has ended."""
    if not future.done():
        future.set_exception(why)
        future.exception()  # read here, or asyncio would log it where the waiting task was cancelled


def wake(future: asyncio.Future[None]) -> None:
    """End `future`, unless it has ended."""
    if not future.done():
        future.set_result(None)
