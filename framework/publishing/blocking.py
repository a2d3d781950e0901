"""A thin blocking wrapper of `Publisher`: one background thread with an event loop per process."""

from __future__ import annotations

import asyncio
import atexit
import os
import selectors
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Never, Self, TypeVar, Unpack, final

from ..broker import PublisherState
from ..envelope import Receipt
from ..errors import BrokerUnavailable, LeveretError, PublishTimeout
from ..handle import BlockingHandle, Handle, blocking
from ..job import Job
from ..options import TIMEOUT_S, PublishOptions, for_outgoing
from ..texts import is_ours
from ..tracebacks import show_users_frames
from ..transactions import Transaction
from .publisher import answered, check_many
from .within import Handed

if TYPE_CHECKING:
    from ..options import Outgoing
    from .publisher import Publisher

_R = TypeVar("_R")
_T = TypeVar("_T")

FLUSH_S = 5.0
"""Seconds that `close()` and the interpreter's exit wait for publishes in progress."""
_MARGIN_S = 1.0
_ASYNCIO = os.path.join(os.path.dirname(asyncio.__file__), "")  # noqa: PTH118, PTH120 - compared with file names of frames


class _Thread:
    """The background loop of the process; made again after a fork, because threads don't survive one."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="leveret-publisher", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run `work` on the loop, in a copy of the caller's context: correlation and trace are inherited."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def where(self) -> str:
        """Return the user's line at which the thread is, "" if it is in leveret or waits."""
        frame = sys._current_frames().get(self._thread.ident or 0)  # pyright: ignore[reportPrivateUsage] - Python documents it
        users: FrameType | None = None
        while frame is not None and not is_ours(file := frame.f_code.co_filename) and not file.startswith(_ASYNCIO):
            users, frame = frame, frame.f_back
        if users is None or users.f_code.co_filename == selectors.__file__:
            return ""
        return f"{users.f_code.co_filename}, line {users.f_lineno}, in {users.f_code.co_name}"


_lock = threading.Lock()
_thread: _Thread | None = None


def _background() -> _Thread:
    global _thread  # noqa: PLW0603 - one thread per process is the purpose
    with _lock:
        if _thread is None or _thread.pid != os.getpid():
            _thread = _Thread()
        return _thread


def _new_lock() -> None:
    # A lock that another thread held at the fork would stay locked in the child for ever.
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


class _Opened:
    """An `app.publisher()` of this process, which the first publish enters on the loop."""

    def __init__(self, make: Callable[[], AbstractAsyncContextManager[Publisher, None]]) -> None:
        self.pid = os.getpid()
        self.thread = _background()
        self.publisher: Publisher | None = None
        self._make = make
        self._stack = AsyncExitStack()
        self._left = False
        self.flying: set[Future[Any]] = set()

    async def enter(self) -> Publisher:
        """Enter the publisher. Entering doesn't wait, so no second publish can come in between."""
        if self._left:
            msg = "nothing was sent: another thread closed this publisher; publish again, which opens it"
            raise BrokerUnavailable(msg)
        self.publisher = await self._stack.enter_async_context(self._make())
        return self.publisher

    async def _leave(self) -> None:
        self._left = True
        await self._stack.aclose()

    def close(self) -> None:
        # After a fork, the parent owns the connection.
        if self.pid != os.getpid():
            return
        for future in tuple(self.flying):
            with suppress(Exception):
                future.result(FLUSH_S)
        with suppress(FutureTimeoutError):
            self.thread.submit(self._leave()).result(FLUSH_S)


@final
class BlockingPublisher:
    """Publishes from threads and `def` code. It needs no set-up; `close()` and `with` are optional.

    Keep it in a variable of a module. It starts at the first use, and again after a `fork` (gunicorn's prefork). Many
    threads may share it. In an `async def`, use `App.publisher` instead: a `BlockingPublisher` blocks the event loop.
    """

    def __init__(self, make: Callable[[], AbstractAsyncContextManager[Publisher, None]]) -> None:
        self._make = make
        self._opened: _Opened | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._unopened = PublisherState.at(time.time(), "connecting", "nothing was published yet")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.close()

    def close(self) -> None:
        """Flush within a deadline, as the interpreter's exit does. A later publish opens the publisher again."""
        opened, self._opened = self._opened, None
        self._unopened = self._unopened.then(time.time(), "closed")
        atexit.unregister(self.close)
        if opened is not None:
            opened.close()

    def state(self) -> PublisherState:
        """Return how the publisher is now, as `Publisher.state`. It is connecting until its first publish, and closed after `close`."""
        opened = self._opened
        publisher = opened.publisher if opened is not None and opened.pid == os.getpid() else None
        return self._unopened if publisher is None else publisher.state()

    def _ready(self) -> _Opened:
        if self._pid != os.getpid():
            self._lock, self._opened, self._pid = threading.Lock(), None, os.getpid()
        with self._lock:
            if self._opened is None:
                self._opened = _Opened(self._make)
                atexit.register(self.close)
            return self._opened

    def _call(
        self,
        make: Callable[[Publisher], Awaitable[_T]],
        timeout_s: float,
        job_id: str | None = None,
        handed: Handed | None = None,
    ) -> _T:
        try:
            return self._wait(make, timeout_s, job_id, handed)
        except LeveretError as error:
            show_users_frames(error)
            raise
        except RuntimeError as error:
            if threading.main_thread().is_alive():
                raise
            # In an atexit handler, Python starts no more threads: neither ours nor the one that resolves host names.
            msg = f"nothing was sent, because the interpreter exits ({error}); publish before the main thread ends, not only in an atexit handler"
            raise BrokerUnavailable(msg, job_id=job_id) from error

    def _wait(
        self, make: Callable[[Publisher], Awaitable[_T]], timeout_s: float, job_id: str | None, handed: Handed | None
    ) -> _T:
        opened = self._ready()
        if asyncio._get_running_loop() is opened.thread.loop:
            msg = "middleware called the blocking publisher on that publisher's own event loop, where it would wait for itself; use app.publisher() there"
            raise RuntimeError(msg)
        begun = abandoned = False

        async def run() -> _T:
            nonlocal begun
            begun = True
            if abandoned:  # the caller has raised by now that nothing was sent
                raise asyncio.CancelledError
            return await make(opened.publisher or await opened.enter())

        future = opened.thread.submit(run())
        opened.flying.add(future)
        future.add_done_callback(opened.flying.discard)
        # the publisher itself refuses a timeout_s that isn't a number
        limit = timeout_s + _MARGIN_S if isinstance(timeout_s, (int, float)) and timeout_s > 0 else FLUSH_S  # pyright: ignore[reportUnnecessaryIsInstance]
        limit = min(limit, threading.TIMEOUT_MAX)
        try:
            return future.result(limit if handed is None or handed.wait(future, limit) else 0)
        except FutureTimeoutError:
            if future.done():
                raise
            abandoned = True  # before `begun` is read: a publish that begins later then sees it
            maybe_published = begun if handed is None else handed.used
            future.cancel()
            at = opened.thread.where()
            cause = (
                f"middleware blocks the event loop that all blocking publishers share, at {at}"
                if at
                else "middleware waits"
            )
            msg = f"{'no confirm arrived' if maybe_published else 'nothing was sent'} within {limit:g} s: {cause}"
            raise PublishTimeout(msg, job_id=job_id, maybe_published=maybe_published) from None

    def publish(
        self, job: Job[_R], *, connection: Transaction | None = None, **options: Unpack[PublishOptions]
    ) -> BlockingHandle[_R]:
        """Publish `job` and block until the publish is confirmed; otherwise as `Publisher.publish`.

        `connection` is a connection of psycopg, SQLAlchemy or Django with an open transaction, or the alias of one of Django's.
        Its statement runs in the calling thread.
        """
        timeout_s, job_id = options.get("timeout_s", TIMEOUT_S), options.get("job_id")
        if connection is None:
            return blocking(
                self._call(lambda publisher: publisher.publish(job, **options), timeout_s, job_id), self._ask
            )
        handed = Handed(connection)
        handle = self._call(lambda publisher: publisher.publish_handed(job, handed, options), timeout_s, job_id, handed)
        return blocking(handle, self._ask)

    def handle(self, job_id: str, job: type[Job[_R]]) -> BlockingHandle[_R]:
        """As `Publisher.handle`."""

        async def made(publisher: Publisher) -> Handle[_R]:
            return publisher.handle(job_id, job)

        return blocking(self._call(made, TIMEOUT_S, job_id), self._ask)

    def _ask(self, handle: Handle[_R], ask: Callable[[Handle[_R]], Coroutine[Any, Any, _T]], timeout_s: float) -> _T:
        """Ask a handle on the background loop."""
        loop = _background().loop
        if asyncio._get_running_loop() is loop:
            msg = "a blocking handle was asked on its publisher's own event loop, where it would wait for itself; use app.publisher() there"
            raise RuntimeError(msg)
        return answered(ask(handle), loop, timeout_s)

    def publish_many(
        self,
        jobs: Iterable[Job | Outgoing],
        *,
        connection: Transaction | None = None,
        timeout_s: float = 5.0,
        **options: Never,
    ) -> list[Receipt]:
        """Publish `jobs` and block until the publishes are confirmed; otherwise as `Publisher.publish_many`."""
        if options:
            raise for_outgoing(options)
        if connection is None:
            return self._call(lambda publisher: publisher.publish_many(jobs, timeout_s=timeout_s), timeout_s)
        check_many(jobs)
        handed, listed = Handed(connection), list(jobs)  # in this thread: jobs may be read from the transaction
        return self._call(
            lambda publisher: publisher.publish_many_handed(listed, handed, timeout_s), timeout_s, handed=handed
        )
