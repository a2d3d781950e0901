"""What every contestant shares: the job, the settings, and how a worker says what it ran. Imports next to nothing."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

URL = os.environ.get("BENCH_URL", "amqp://guest:guest@127.0.0.1:5672/")
STORE = os.environ.get("BENCH_STORE") or None  # where results are kept, beside the broker
KIND = os.environ.get("BENCH_KIND", "quorum")
QUEUE = os.environ.get("BENCH_QUEUE", "bench.unnamed")
MODE = os.environ.get(
    "BENCH_MODE", "plain"
)  # plain | samples (how late each job ran) | fails (each fails once) | allocations | results (each returns RESULT, which is kept)
BYTES = int(os.environ.get("BENCH_BYTES", "200"))
PROCESSES = int(os.environ.get("BENCH_PROCESSES", "1"))
PREFETCH = 200
WINDOW = 1000  # publishes in flight where a peer can pipeline
THREADS = 8  # publishing threads where it can't
MAX_PRIORITY = 6
PRIORITY = 4
RESULT: dict[str, Any] = {"order_id": 7, "number": "2026-0007"}
KEPT_S = 600  # how long results are kept: longer than any measurement, so that none is gone before it is read
READ_S = 120  # how long results are waited for

_ELSE_BYTES = 80  # what the fields other than the text take as JSON
TEXT = "x" * max(0, BYTES - _ELSE_BYTES)
CAPACITY = 1_000_000


class FailedOnceError(Exception):
    """What a job of mode "fails" raises the first time."""


def fields(at: int) -> dict[str, Any]:
    """Return a job's fields; `at`: monotonic nanoseconds of when it should run (its publish, or its due time)."""
    return {"at": at, "order_id": 7, "email": "a@example.org", "text": TEXT, "tags": ["a", "b"]}


class Sender(NamedTuple):
    """How a contestant publishes; each call ends confirmed, or raises."""

    one: Callable[[int, float | None], Awaitable[Any]]
    """Publish a job with that `at`, after that delay in seconds; return what `read` takes, if there is a `read`."""
    many: Callable[[int], Awaitable[None]] | None
    """Publish so many as fast as its API allows; None: `one` in many tasks."""
    blocking: bool = False
    """`one` blocks its thread: many at once are `THREADS` threads."""
    read: Callable[[list[Any]], Awaitable[list[Any]]] | None = None
    """Wait for the results of what `one` published, in mode "results"."""


class Ran:
    """Counts a worker process's runs in a file that the measuring process maps: no system call, no message.

    Int64 words: jobs run, monotonic ns of the first and of the last, CPU ns of the process at the first, allocations from
    the first to the last (mode "allocations"); then, in mode "samples", how late each was in ns.
    """

    HEAD = 5

    def __init__(self) -> None:
        self._count = 0
        self._words: memoryview | None = None
        self._lock = threading.Lock()
        self._allocated: Callable[[], int] = int
        self._before = self._asking = 0

    def _open(self) -> memoryview:
        size = 8 * (self.HEAD + (CAPACITY if MODE == "samples" else 0))
        path = os.path.join(os.environ["BENCH_SLOTS"], str(os.getpid()))  # noqa: PTH118 - pathlib costs an import
        with open(path + ".new", "w+b") as file:  # noqa: PTH123
            file.truncate(size)
            words = memoryview(mmap.mmap(file.fileno(), size)).cast("q")
        os.rename(path + ".new", path)  # noqa: PTH104
        self._gather(os.path.dirname(path))  # noqa: PTH120
        words[1], words[3] = time.monotonic_ns(), time.process_time_ns()
        self._words = words
        if MODE == "allocations":
            self._watch_allocations()
        return words

    def _watch_allocations(self) -> None:
        import ctypes

        self._allocated = ctypes.CDLL(None).bench_allocations  # preloaded: allocations.c
        self._allocated.restype = ctypes.c_uint64
        some = [self._allocated() for _ in range(11)]
        self._asking = (some[-1] - some[0]) // 10  # what asking itself takes
        self._before = self._allocated()

    @staticmethod
    def _gather(folder: str) -> None:
        """Wait for the other processes' first job: none may empty the queue while another is still starting."""
        end = time.monotonic() + 30
        while sum(name.isdecimal() for name in os.listdir(folder)) < PROCESSES:  # noqa: PTH208
            if time.monotonic() > end:
                msg = f"fewer than {PROCESSES} processes got a job within 30 s"
                raise RuntimeError(msg)
            time.sleep(0.001)  # it blocks the worker, and is meant to

    def begin(self) -> None:
        """A first run that fails: time counts from here, and the job doesn't."""
        if self._words is None:
            with self._lock:
                if self._words is None:
                    self._open()

    def one(self, at: int) -> None:
        """One more job ran; for handlers of one thread."""
        now = time.monotonic_ns()
        words = self._words
        if words is None:
            words = self._open()
        if MODE == "samples":
            words[self.HEAD + self._count] = now - at
        elif MODE == "allocations":
            words[4] = self._allocated() - self._before - self._count * self._asking
        self._count += 1
        words[2] = now
        words[0] = self._count

    def one_of_threads(self, at: int) -> None:
        """The same, where handlers run in threads."""
        with self._lock:
            self.one(at)


ran = Ran()
