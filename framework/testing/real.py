"""The lab on a real RabbitMQ: the same test, with the broker's own encoding, order, delays and confirms, in real time."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime, timedelta, timezone
from typing import Any, NoReturn, Protocol, TypeVar, cast, final

from ..app import App
from ..consuming.settlement import Ended
from ..errors import ConfigurationError
from ..job import Queue
from ..outcome import NotStarted, Retry, Snooze, Unknown
from ..runtime import Runtime
from ..schemes import broker_module
from ..waits import first_of
from .lab import UNSET, AppLab, Lab, check_outside, opened
from .memory import memory
from .records import Delayed, Published
from .renamed import Names, RenamedBroker

_R = TypeVar("_R")

PATIENCE_S = 30.0
"""Seconds after which `run_due` and `drain` raise for jobs that haven't ended."""
_LOOK_S = 0.05


class Deletes(Protocol):
    """The part of RabbitMQ's admin that removes a test's queues; looked up by scheme, because this folder imports no broker.

    `tests/unit/testing/test_real.py` lets the type checkers compare the two.
    """

    async def delete(self, queue: Queue) -> None:
        """Delete a queue with its jobs and dead letters."""
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


@final
class RealLab(AppLab):
    """A lab on a RabbitMQ. Its time is the real one, so nothing can move it."""

    def __init__(self) -> None:
        super().__init__()
        self._over: list[str] = []
        """The ids of the jobs that ended for good."""
        self._due_s: dict[str, float] = {}
        """When a job that is retried or snoozed is due again, Unix seconds, by its id."""

    def __repr__(self) -> str:
        return f"<lab on a RabbitMQ, {self._summary()}>"

    @property
    def now(self) -> datetime:
        """As `Lab.now`."""
        return datetime.now(timezone.utc)

    @property
    def delayed(self) -> Sequence[Delayed]:
        """As `Lab.delayed`: the jobs that the lab knows of, since RabbitMQ can't list them."""
        now_s = time.time()
        waiting = sorted((self._due_at_s(one), one.envelope.job_id, one) for one in self._unended())
        return tuple(
            Delayed(one.job, one.envelope, datetime.fromtimestamp(due_s, timezone.utc))
            for due_s, _, one in waiting
            if due_s > now_s
        )

    def advance(self, by: float | timedelta, /) -> NoReturn:
        """Raise RuntimeError."""
        msg = f"the time of a real broker can't be moved (advance by {by}); test what waits with leveret_running, or use drain() and short delays"
        raise RuntimeError(msg)

    def advance_to(self, moment: datetime, /) -> NoReturn:
        """Raise RuntimeError."""
        self.advance(moment - self.now)

    async def run_due(self) -> None:
        """As `Lab.run_due`."""
        await self._until_ended(lambda one: self._due_at_s(one) <= time.time())

    async def drain(self) -> None:
        """As `Lab.drain`, in real time. Raises RuntimeError if a job hasn't ended after 30 s."""
        await self._until_ended(lambda _: True)

    async def _until_ended(self, awaited: Callable[[Published], bool]) -> None:
        check_outside()
        ends = time.monotonic() + PATIENCE_S
        while self.work is not None and (left := [one for one in self._unended() if awaited(one)]):
            if time.monotonic() > ends:
                first = left[0].envelope
                msg = f"{len(left)} jobs haven't ended after {PATIENCE_S:g} s, the first is {first.job} {first.job_id}"
                raise RuntimeError(msg)
            await first_of(self.work.consumer.changed(), self.work.consumption.failed(), timeout_s=_LOOK_S)

    def _unended(self) -> list[Published]:
        """Return the jobs that this app's handlers have still to end."""
        if self.work is None:
            return []
        handled = {one.queue.name for one in self.work.consumer.subscriptions}
        over = Counter(self._over)
        unended: list[Published] = []
        for one in self._published:
            if over[one.envelope.job_id]:
                over[one.envelope.job_id] -= 1
            elif one.envelope.queue in handled:
                unended.append(one)
        return unended

    def _due_at_s(self, one: Published) -> float:
        return self._due_s.get(one.envelope.job_id, (one.envelope.due_ms or 0) / 1000)

    def add_ended(self, ended: Ended) -> None:
        """As `Records.add_ended`."""
        super().add_ended(ended)
        job_id = ended.envelope.job_id
        if isinstance(ended.ending, (Retry, Snooze)):
            self._due_s[job_id] = time.time() + (ended.ending.delay_s or 0.0)
        elif not isinstance(ended.ending, (Unknown, NotStarted)):
            self._over.append(job_id)


@asynccontextmanager
async def _real_lab(url: str, app: App[Any], resources: Any) -> AsyncGenerator[RealLab, None]:
    module, runtime = broker_module(url), Runtime(app=app.name, settings=app.settings)
    names = Names(f"test-{uuid.uuid4().hex[:12]}")
    lab = RealLab()
    try:
        async with opened(
            lab,
            app,
            resources,
            open_broker=lambda: RenamedBroker(module.open_broker(url, runtime), names),
            open_store=memory().private_stores(runtime),
            runtime=runtime,
        ):
            yield lab
    finally:
        admin = cast("Deletes", module.open_admin(url, runtime))
        try:
            for queue in names.used:
                await admin.delete(queue)
        finally:
            await admin.close()


def running_on_rabbitmq(
    url: str,
    app: App[_R],
    *,
    resources: _R = UNSET,
    now: datetime | None = None,
    cron: bool = True,  # noqa: ARG001 - cron schedules fire in `advance` only, which raises here
) -> AbstractAsyncContextManager[Lab, None]:
    """Run `app` in a lab on the RabbitMQ at `url`, with queues that only this lab uses and that it deletes at the end.

    ConfigurationError for `now`, and for the URL of another broker.
    """
    if now is not None:
        msg = "now: the time of a real broker can't be set; leave it out, or use leveret_running"
        raise ConfigurationError(msg)
    if not url.startswith(("amqp://", "amqps://")):
        msg = f"the lab on a RabbitMQ needs a URL that begins with amqp:// or amqps://, not {url.partition(':')[0]!r}"
        raise ConfigurationError(msg)
    return cast("AbstractAsyncContextManager[Lab, None]", _real_lab(url, app, resources))
