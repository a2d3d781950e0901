"""The relay: jobs of an outbox → broker, each confirmed before it leaves the outbox.

A batch is one transaction of the database: lock jobs, publish them, delete those that are confirmed, commit. Wherever a relay, the broker
or the database dies, the jobs are still in the outbox, and are published again under their ids.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol, TypeVar, final

import msgspec

from ..backoff import full_jitter
from ..broker import Broker, Posted
from ..envelope import Envelope
from ..errors import (
    BrokerUnavailable,
    ConfigurationError,
    InvalidJob,
    LeveretError,
    MessageTooLarge,
    PublishError,
)
from ..failure import Failure, failures_of
from ..outbox import Line, Outbox, Waiting
from ..runtime import Runtime
from ..settings import redact
from ..texts import named, one_line, said_by
from ..waits import first_of

logger = logging.getLogger("leveret.relay")

LINES = 2
"""How many batches are under way: one is confirmed and deleted while the next one is written."""
BATCH = 500
"""At most this many jobs in one transaction. Two batches fit into the window of a publisher."""
PUBLISH_S = 4.0
"""How long the publishes of a batch may take, seconds: no transaction may be open longer than 5 s."""
FORGET_S = 60.0
"""How often a relay deletes old entries of the inbox."""
_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_SAY_AGAIN_S = 60.0
_T = TypeVar("_T")


class Relayed(Protocol):
    """The part of an app that a relay needs."""

    @property
    def name(self) -> str:
        """The app's name, for errors."""
        ...

    def runtime(self) -> Runtime:
        """Return the clock, the random generator and the settings of a process of the app."""
        ...

    def open_broker(self, runtime: Runtime) -> Broker:
        """Make the broker."""
        ...

    def open_outbox(self, runtime: Runtime) -> Outbox | None:
        """Make the outbox, if the app has one."""
        ...


class _Pause(msgspec.Struct):
    """A queue that takes no jobs for now."""

    tries: int
    ends: float
    """When it is tried again, `time.monotonic()` seconds."""
    said: float
    """When the log said so."""


class _Sent(msgspec.Struct):
    """A job of a batch and its publish."""

    waiting: Waiting
    publish: Posted | asyncio.Task[None] | None = None
    """None if the job was refused before a byte was sent."""
    error: PublishError | None = None

    @property
    def final(self) -> bool:
        """Whether the broker will never take the job."""
        return self.waiting.problem is not None or isinstance(self.error, (InvalidJob, MessageTooLarge))


@final
class Relay:
    """Publishes the jobs of `outbox` to `broker`."""

    def __init__(self, outbox: Outbox, broker: Broker, runtime: Runtime) -> None:
        self._broker = broker
        self._runtime = runtime
        self._lines = [outbox.line() for _ in range(LINES)]
        self._order = asyncio.Lock()
        """Held by the line that takes jobs and writes them, so that they are written in their order."""
        self._stop = asyncio.Event()
        self._pauses: dict[str, _Pause] = {}
        self._failures = 0
        self._said = 0.0
        self._next_forget = 0.0
        self._next_try = 0.0
        """When a blocked broker is tried again."""
        self.published = 0
        """How many jobs it has published."""
        self.buried = 0
        """How many jobs it has moved to the outbox's dead letters."""

    @classmethod
    def of(cls, app: Relayed) -> Relay:
        """Return the relay of an app; ConfigurationError if it has no outbox."""
        runtime = app.runtime()
        outbox = app.open_outbox(runtime)
        if outbox is None:
            msg = f'app {app.name!r} has no outbox; set App(outbox="postgresql://…") or LEVERET_OUTBOX to the URL of its database'
            raise ConfigurationError(msg)
        return cls(outbox, app.open_broker(runtime), runtime)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[asyncio.Task[None], None]:
        """Run the relay in a task until the block is left; the batches under way end first."""
        task = asyncio.create_task(self.run())
        task.add_done_callback(_tell)
        try:
            yield task
        finally:
            self.stop()
            try:
                await task
            finally:
                await self.close()

    def stop(self) -> None:
        """Take no more jobs."""
        self._stop.set()

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(*(line.close() for line in self._lines), self._broker.close())

    async def run(self) -> None:
        """Relay until `stop`. Raises ConfigurationError if waiting won't help."""
        lines = [asyncio.create_task(self._run(line)) for line in self._lines]
        try:
            await asyncio.gather(*lines)
        finally:
            for line in lines:
                line.cancel()
            await asyncio.wait(lines)

    async def _run(self, line: Line) -> None:
        while not self._stop.is_set():
            try:
                async with self._order:
                    if self._stop.is_set():
                        return
                    batch = await self._begin(line)
                if batch:
                    await self._end(line, batch)
                    self._failures = 0
            except BrokerUnavailable as error:
                await self._hold_up(error)

    async def _begin(self, line: Line) -> Sequence[_Sent]:
        """Take jobs and write them; without any, wait for some."""
        state, now = self._broker.publishing, time.monotonic()
        if state.name == "blocked" and now < self._next_try:
            raise BrokerUnavailable(state.why)  # what is written now would run when the block ends, once for each try
        self._next_try, deadline = now + _LONGEST_PAUSE_S, now + PUBLISH_S
        if now >= self._next_forget:
            self._next_forget = now + FORGET_S
            await self._unless_stopped(line.forget())
        tried = next((queue for queue, pause in self._pauses.items() if pause.ends <= now), None)
        # one job shows whether a broker, or a queue, is there again
        at_most = 1 if tried is not None or self._failures else BATCH
        take = line.take(at_most, only=tried, without=() if tried else self._pauses, deadline=deadline)
        jobs = await self._unless_stopped(take)
        if jobs is None:
            return ()
        if tried is not None:
            self._pauses[tried].ends = deadline + 1  # not tried by the other line too
        if jobs:
            return await self._write(jobs)
        if tried is not None:
            del self._pauses[tried]
        else:
            await first_of(line.wait(), self._stop.wait())
        return ()

    async def _unless_stopped(self, asked: Coroutine[Any, Any, _T]) -> _T | None:
        """Return what the database answers; None if the relay stops first: nothing is published yet, so nobody waits for an answer."""
        answer = asyncio.ensure_future(asked)
        await first_of(answer, self._stop.wait())
        return answer.result() if answer.done() else None

    async def _write(self, jobs: Sequence[Waiting]) -> Sequence[_Sent]:
        """Publish jobs; return once each that is due is written, so that the next batch overtakes none."""
        batch = [_Sent(waiting) for waiting in jobs]
        late: dict[str, _Sent] = {}
        """By queue: the last job that waits for a connection or a window, behind which the queue's next jobs have to wait."""
        for sent in batch:
            queue, envelope = sent.waiting.queue, sent.waiting.envelope
            if queue is None or sent.waiting.problem is not None:
                continue
            is_due = envelope.due_ms is None
            try:
                sent.publish = self._broker.post(queue, envelope) if is_due and queue.name not in late else None
            except PublishError as error:
                sent.error = error
                continue
            if sent.publish is None:
                sent.publish = asyncio.create_task(self._broker.publish(queue, envelope))
                if is_due:
                    late[queue.name] = sent
        for sent in late.values():
            await _confirmed(sent)
        return batch

    async def _end(self, line: Line, batch: Sequence[_Sent]) -> None:
        """Wait for the confirms, and settle the batch."""
        for sent in batch:
            await _confirmed(sent)
        published = [sent for sent in batch if sent.error is None and not sent.final]
        dead = [sent for sent in batch if sent.final]
        held_up = [sent for sent in batch if sent.error is not None and not sent.final]
        if published or dead:
            await line.settle(
                [sent.waiting.seq for sent in published], [(sent.waiting.seq, self._letter(sent)) for sent in dead]
            )
        else:
            await line.leave()
        self.published += len(published)
        self.buried += len(dead)
        for sent in dead:
            envelope = sent.waiting.envelope
            logger.error(
                "job %s %s to queue %s went to the outbox's dead letters: %s",
                envelope.job,
                envelope.job_id,
                envelope.queue,
                _why(sent),
            )
        for queue in {sent.waiting.envelope.queue for sent in published}:
            self._pauses.pop(queue, None)
        if held_up:
            self._pause(held_up)

    def _pause(self, held_up: Sequence[_Sent]) -> None:
        """Leave the queues of these jobs out for a while, or all if the broker is away."""
        first = held_up[0].error
        assert first is not None
        if isinstance(first.__cause__, ConfigurationError) and self._broker.publishing.name != "ready":
            raise first.__cause__
        if self._broker.publishing.name != "ready":
            raise BrokerUnavailable(str(first))
        now = time.monotonic()
        for queue, error in {sent.waiting.envelope.queue: sent.error for sent in held_up}.items():
            pause = self._pauses.setdefault(queue, _Pause(0, 0.0, -_SAY_AGAIN_S))
            pause.tries += 1
            wait_s = min(_PAUSE_S * 2 ** min(pause.tries - 1, 10), _LONGEST_PAUSE_S)
            pause.ends = now + full_jitter(1, base_s=wait_s, cap_s=wait_s, rng=self._runtime.rng)
            if now - pause.said >= _SAY_AGAIN_S:
                pause.said = now
                logger.warning(
                    "queue %s takes no jobs, which stay in the outbox: %s", queue, redact(one_line(str(error)))
                )

    async def _hold_up(self, error: LeveretError) -> None:
        """Wait after a failure of the broker or of the database."""
        self._failures += 1
        if time.monotonic() - self._said >= _SAY_AGAIN_S or self._failures == 1:
            self._said = time.monotonic()
            logger.warning("relaying waits, and the jobs stay in the outbox: %s", redact(one_line(str(error))))
        settings = self._runtime.settings
        base_s, cap_s = settings.reconnect_base_s, settings.reconnect_cap_s
        wait_s = full_jitter(self._failures, base_s=base_s, cap_s=cap_s, rng=self._runtime.rng)
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._stop.wait()

    def _letter(self, sent: _Sent) -> Envelope:
        envelope, error = sent.waiting.envelope, sent.error
        failure = Failure(
            attempt=envelope.attempt,
            at_ms=int(self._runtime.clock.now() * 1000),
            host=socket.gethostname(),
            error="" if error is None else type(error).__qualname__,
            message=_why(sent)[:500],
        )
        return msgspec.structs.replace(
            envelope, errors=msgspec.json.encode([*failures_of(envelope), failure]).decode(), due_ms=None
        )


async def _confirmed(sent: _Sent) -> None:
    """Wait for the end of a job's publish, and keep its error."""
    publish = sent.publish
    if isinstance(publish, asyncio.Task):
        try:
            await publish
        except PublishError as error:
            sent.error = error
    elif publish is not None:
        if not publish.ended:
            await publish.wait()
        sent.error = publish.error()


def _why(sent: _Sent) -> str:
    return redact(one_line(sent.waiting.problem or ("" if sent.error is None else said_by(sent.error))))


def _tell(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the relay has ended: %s", redact(named(error)))
