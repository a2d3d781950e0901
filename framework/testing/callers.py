"""A loop without a thread: the thread that calls it drives it, and runs `def` handlers while the loop stands still."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar, final

_T = TypeVar("_T")
_P = ParamSpec("_P")


@final
class CallersThread(Executor):
    """The event loop of `running_sync`, and the executor of its `def` handlers.

    The loop runs only inside `run`. A `def` handler that is submitted meanwhile stops the loop, runs in the thread that called
    `run`, and the loop goes on. So the handler has the caller's thread-locals, such as Django's transaction, and no running
    loop, in which Django would refuse to open a connection.
    """

    def __init__(self) -> None:
        self._runner = asyncio.Runner(
            loop_factory=asyncio.new_event_loop
        )  # with a factory, the thread's own loop is left alone
        self._loop = self._runner.get_loop()
        self._thread = threading.get_ident()
        self._submitted: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self.in_handler = False
        """Whether a `def` handler is running."""

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Run `fn` in the thread that drives the loop, once the loop stands still."""
        future: Future[_T] = Future()
        self._submitted.append((future, lambda: fn(*args, **kwargs)))
        self._loop.stop()
        return future

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Drive the loop until `work` has ended, and return its result. A `def` handler may call it too."""
        if asyncio._get_running_loop() is not None or threading.get_ident() != self._thread:
            work.close()
            msg = "a lab of running_sync works only in the thread that entered it, and not inside an `async def`"
            raise RuntimeError(msg)
        task = self._loop.create_task(work)
        task.add_done_callback(lambda _: self._loop.stop())
        while not task.done():
            if self._submitted and not self.in_handler:
                self._call(*self._submitted.popleft())
            else:
                self._loop.run_forever()
        return task.result()

    def _call(self, future: Future[Any], function: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        self.in_handler = True
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            self.in_handler = False

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002 - nothing runs beside the caller
        """Cancel what hasn't begun, if `cancel_futures`."""
        if cancel_futures:
            for future, _ in self._submitted:
                future.cancel()

    def close(self) -> None:
        """Cancel the tasks that are left, and close the loop."""
        self._runner.close()
