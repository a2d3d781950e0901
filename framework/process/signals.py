"""How a process is asked to stop, and how it ends at once: shared by workers, their supervisor and cron."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NoReturn

logger = logging.getLogger("leveret.worker")

HURRY_S = 5.0
"""Time from a second signal until the process ends unconditionally."""
_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def ignores_hangups() -> bool:
    """Return whether this process was started with SIGHUP ignored, as by nohup."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def _reset_in_forks() -> None:
    """Let signals end a child that a handler forks.

    The child has the pipe of its worker's loop. Without this, a signal to the child wouldn't end the child but stop the worker.
    """

    def reset() -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not ignores_hangups():
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        unblock()

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _NUMBERS)

    # a signal that comes before the child has reset the handlers waits for that
    block = partial(signal.pthread_sigmask, signal.SIG_BLOCK, _NUMBERS)
    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=reset)


class Stop:
    """SIGTERM and SIGINT as two events: the first signal asks the process to stop, a second signal to hurry.

    SIGHUP asks once: shell and kernel each send one when a terminal is lost. It stays ignored where it was, as under nohup.

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
        if not ignores_hangups():
            self._loop.add_signal_handler(signal.SIGHUP, self._ask_once)
        _reset_in_forks()

    def ask(self) -> None:
        """Ask the process to stop; from the second call on, to hurry."""
        event, then = (self.hurried, self._hurry) if self.asked.is_set() else (self.asked, self._stop)
        event.set()
        if self._starting is not None:
            self._starting.cancel()
        if then is not None:
            then()

    def _ask_once(self) -> None:
        if not self.asked.is_set():
            self.ask()

    def ask_at_end_of(self, lifeline: int) -> None:
        """Ask when the file descriptor reads end-of-file: the process at the other end is gone."""

        def ended() -> None:
            self._loop.remove_reader(lifeline)
            self._ask_once()

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


def exit_within(seconds: float) -> None:
    """Exit with 0 after this time: the interpreter's own exit waits for threads and child processes that handlers left."""
    timer = threading.Timer(seconds, _leave_behind)
    timer.daemon = True
    timer.start()


def _leave_behind() -> None:
    threads = [thread for thread in threading.enumerate() if not thread.daemon and thread != threading.main_thread()]
    left = [f"thread {thread.name}" for thread in threads]
    if "multiprocessing" in sys.modules:
        import multiprocessing

        for child in multiprocessing.active_children():
            if child.daemon:
                child.terminate()  # as the interpreter's own exit does
            else:
                left.append(f"child process {child.pid}")
    what = ", ".join(left) or "a function of atexit"
    logger.warning("the grace is over: the worker exits without waiting for what its handlers left running (%s)", what)
    exit_now(0)
