"""What a channel needs of its connection, and how either of them ends."""

from __future__ import annotations

import asyncio
from typing import Any, Literal, Protocol

WRITE_HIGH_BYTES = 1 << 20
"""Above so many unsent bytes publishers wait; acks and heartbeats don't."""
CLOSE_TIMEOUT_S = 3.0


class Closed(Exception):
    """A channel, a connection or its socket was closed; `code` is AMQP's, 0 where none was said."""

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
        """Most bytes of one frame."""
        ...

    @property
    def writable(self) -> bool:
        """Whether it takes more publishes; acks and heartbeats don't ask."""
        ...

    @property
    def queued(self) -> int:
        """Bytes of publishes that leave at the end of this turn of the loop."""
        ...

    def write(self, data: bytes, /) -> None:
        """Send `data` with all else of this turn of the loop."""
        ...

    def write_all(self, head: bytes, rest: list[bytes | memoryview], size: int, /) -> None:
        """Send a publish of `size` bytes in pieces, in order."""
        ...

    def flush(self) -> None:
        """Hand what was written to the socket."""
        ...

    def forget(self, number: int, /) -> None:
        """Free the number of a channel that ended."""
        ...


def check_open(closed: Closed | None) -> None:
    """Raise why it is closed, if it is."""
    if closed is not None:
        raise closed.with_traceback(None)  # or each raise would add its frames to it


def fail(future: asyncio.Future[Any], why: Exception) -> None:
    """End what waits with an error, if it still does."""
    if not future.done():
        future.set_exception(why)
        future.exception()  # looked at: a publisher that was cancelled meanwhile doesn't come for it


def wake(future: asyncio.Future[None]) -> None:
    """End what waits, if it still does."""
    if not future.done():
        future.set_result(None)
