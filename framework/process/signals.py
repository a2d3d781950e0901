"""How a process is told to stop, and how it ends at once where it must: the same for workers, their supervisor and cron."""

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
"""How long after a second signal the process is ended, whatever it is at."""


class Stop:
    """SIGTERM and SIGINT as two events: the first signal asks the process to stop, a second one to hurry.

    Args:
        stop: Called when the process is asked to stop.
        hurry: Called each time it is asked again.
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
        """Ask the process to stop; asked again, to hurry."""
        event, then = (self.hurried, self._hurry) if self.asked.is_set() else (self.asked, self._stop)
        event.set()
        if self._starting is not None:
            self._starting.cancel()
        if then is not None:
            then()

    def ask_at_end_of(self, lifeline: int) -> None:
        """Ask once a file descriptor reads end-of-file: whoever held its other end is gone."""

        def ended() -> None:
            self._loop.remove_reader(lifeline)
            if not self.asked.is_set():
                self.ask()

        self._loop.add_reader(lifeline, ended)

    @property
    def interrupted(self) -> bool:
        """Whether a stop came while something was starting."""
        return self._starting is not None and self.asked.is_set()

    @contextmanager
    def interrupts(self) -> Generator[None, None, None]:
        """Cancel the current task if a stop comes inside this block: until it is left there is nothing to drain."""
        self._starting = asyncio.current_task()
        yield
        self._starting = None  # not in a `finally`: `interrupted` is asked afterwards


def exit_now(code: int) -> NoReturn:
    """End this process now: a thread that was cut off would keep the interpreter from ending."""
    logging.shutdown()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
