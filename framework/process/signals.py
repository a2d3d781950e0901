"""How a process is asked to stop, and how it ends at once: shared by workers, their supervisor and cron."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

HURRY_S = 5.0
"""Time from a second signal until the process ends unconditionally."""


class Stop:
    """SIGTERM and SIGINT as two events: the first signal asks the process to stop, a second signal to hurry.

    Args:
        stop: Called at the first request to stop.
        hurry: Called at each further request.
    """

    def __init__(self, stop: Callable[[], object] | None = None, *, hurry: Callable[[], object] | None = None) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()
        self._stop = stop
        self._hurry = hurry
        self._starting: asyncio.Task[Any] | None = None
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self.ask)

    def ask(self) -> None:
        """Ask the process to stop; from the second call on, to hurry."""
        event, then = (self.hurried, self._hurry) if self.asked.is_set() else (self.asked, self._stop)
        event.set()
        if self._starting is not None:
            self._starting.cancel()
        if then is not None:
            then()

    def ask_at_end_of(self, lifeline: int) -> None:
        """Ask when the file descriptor reads end-of-file: the process at the other end is gone."""

        def ended() -> None:
            self._loop.remove_reader(lifeline)
            if not self.asked.is_set():
                self.ask()

        self._loop.add_reader(lifeline, ended)

    @property
    def interrupted(self) -> bool:
        """Whether a stop came inside a block of `interrupts`."""
        return self._starting is not None and self.asked.is_set()

    @contextmanager
    def interrupts(self) -> Generator[None, None, None]:
        """Cancel the current task if a stop comes inside this block, where there is nothing to drain yet."""
        self._starting = asyncio.current_task()
        yield
        self._starting = None  # not in a `finally`: `interrupted` is read afterwards


def exit_now(code: int) -> NoReturn:
    """End this process now: the interpreter's own exit would wait for threads that were cut off."""
    logging.shutdown()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
