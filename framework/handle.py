"""A handle: the receipt of a publish, by which a program asks how the job is, waits for its result and aborts it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, final

import msgspec
from typing_extensions import TypeVar as DefaultTypeVar

from .envelope import Receipt
from .errors import ConfigurationError

if TYPE_CHECKING:
    from .status import Status
    from .store import Abort

R_co = DefaultTypeVar("R_co", covariant=True, default=object)
_R = TypeVar("_R")
_T = TypeVar("_T")


class Kept(Protocol[R_co]):
    """What a job store keeps of the jobs of one class, as a handle asks for it. `publish` None stands for the newest of the id."""

    async def result(self, job_id: str, publish: int | None, timeout_s: float) -> R_co:
        """As `Handle.result`."""
        ...

    async def status(self, job_id: str, publish: int | None) -> Status:
        """As `Handle.status`."""
        ...

    async def abort(self, job_id: str, publish: int | None, timeout_s: float) -> Abort:
        """As `Handle.abort`."""
        ...


class _Asks(Protocol[R_co]):
    """Asks a handle on its event loop, and waits in the thread that calls, for a little longer than `timeout_s` at most."""

    def __call__(self, ask: Callable[[Handle[R_co]], Coroutine[Any, Any, _T]], timeout_s: float, /) -> _T: ...


class _AsksHandle(Protocol):
    def __call__(
        self, handle: Handle[_R], ask: Callable[[Handle[_R]], Coroutine[Any, Any, _T]], timeout_s: float, /
    ) -> _T: ...


# A field that is UNSET isn't encoded: the handle of a class without `keep` is the same JSON as a receipt.
@final
class Handle(Receipt, Generic[R_co], frozen=True, gc=True):
    """The receipt of a publish of a `Job[R]`; `publisher.handle` makes one from an id. Use it on the event loop of its publisher.

    Each method raises ConfigurationError for a job whose class has no `keep`.
    """

    _kept: Kept[R_co] | msgspec.UnsetType = msgspec.UNSET
    _publish: int | msgspec.UnsetType = msgspec.UNSET

    def __repr__(self) -> str:
        return f"Handle({self.job_id!r}, {self.state!r})"

    async def result(self, *, timeout_s: float) -> R_co:
        """Wait until the job has ended, for at most `timeout_s` seconds, and return its result; None for a bare `Job`.

        A store that doesn't answer for a while doesn't end the wait.

        Raises:
            JobFailed: The job is in the dead letters of its queue.
            JobAborted, JobExpired: The job was aborted, or had expired before it could start.
            ResultUnavailable: The job is done, and the store has no result of it: the text says why.
            TimeoutError: The store doesn't know within `timeout_s` how the job ended.
        """
        return await self._of().result(self.job_id, _or_none(self._publish), timeout_s)

    async def status(self) -> Status:
        """Return how the job is, as far as the store knows. Raises StoreUnavailable if the store doesn't answer within 5 s."""
        return await self._of().status(self.job_id, _or_none(self._publish))

    async def abort(self, *, timeout_s: float = 5.0) -> Abort:
        """Abort the job: one that waits never starts, and one that runs is cancelled within about a second. Its retries don't run.

        Returns:
            "aborted": It never starts, or was aborted before.
            "asked": It runs, and its worker will end it. A `def` handler isn't ended; it reads `attempt.aborting`.
            "finished": It has ended.
            "unknown": The store knows nothing of it.

        Raises StoreUnavailable if the store doesn't answer within `timeout_s`.
        """
        return await self._of().abort(self.job_id, _or_none(self._publish), timeout_s)

    def _of(self) -> Kept[R_co]:
        if self._kept is msgspec.UNSET:
            raise _keeps_nothing(self.job_id)
        return self._kept


@final
class BlockingHandle(Receipt, Generic[R_co], frozen=True, gc=True):
    """A `Handle` for threads and `def` code: its methods block, and otherwise do what the handle's do.

    Each method raises TimeoutError if something blocks the event loop of its publisher, and RuntimeError on that loop.
    """

    _asks: _Asks[R_co] | msgspec.UnsetType = msgspec.UNSET

    def __repr__(self) -> str:
        return f"BlockingHandle({self.job_id!r}, {self.state!r})"

    def result(self, *, timeout_s: float) -> R_co:
        """As `Handle.result`."""
        return self._of()(lambda handle: handle.result(timeout_s=timeout_s), timeout_s)

    def status(self) -> Status:
        """As `Handle.status`."""
        return self._of()(lambda handle: handle.status(), STATUS_S)

    def abort(self, *, timeout_s: float = 5.0) -> Abort:
        """As `Handle.abort`."""
        return self._of()(lambda handle: handle.abort(timeout_s=timeout_s), timeout_s)

    def _of(self) -> _Asks[R_co]:
        if self._asks is msgspec.UNSET:
            raise _keeps_nothing(self.job_id)
        return self._asks


def blocking(handle: Handle[R_co], asks: _AsksHandle) -> BlockingHandle[R_co]:
    """Return the blocking twin of a handle; `asks` asks the handle on its event loop."""
    if handle._kept is msgspec.UNSET:  # pyright: ignore[reportPrivateUsage] - private, so that nobody makes handles by hand
        return BlockingHandle(handle.job_id, handle.state)
    return BlockingHandle(handle.job_id, handle.state, partial(asks, handle))


STATUS_S = 5.0
"""How long `status` waits for the store, seconds."""


def _or_none(value: int | msgspec.UnsetType) -> int | None:
    return None if value is msgspec.UNSET else value


def _keeps_nothing(job_id: str) -> ConfigurationError:
    msg = f"nothing is known of job {job_id}, because its class keeps nothing; give the class keep=Keep() (beside RabbitMQ, the app a store= too)"
    return ConfigurationError(msg)
