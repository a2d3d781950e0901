"""deliveries → job store: what the store hears of a worker's jobs, and which of them it wants aborted. Only for job classes with `keep`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from ..attempt import Attempt, Tracked
from ..broker import Delivery, Recorded
from ..clock import Timer
from ..codec import content_type
from ..envelope import Envelope
from ..errors import ConfigurationError
from ..failure import failures_of
from ..headers import MOST
from ..job import Keep
from ..outcome import (
    Aborted,
    Bury,
    Done,
    Ending,
    Expired,
    Repeated,
    Retry,
    Snooze,
    Undecodable,
    WorkerLost,
)
from ..results.recorder import Recorder
from ..results.values import Values, WrongResult
from ..runtime import Runtime
from ..store import Change, Key, Progress, State
from ..texts import named, one_line, said_by
from .handler import Handler
from .said import Run, why_expired

LOOK_S = 0.5
"""How often the progress of the running jobs is written, and aborts of them are looked for, seconds."""


class _Contract(msgspec.Struct, frozen=True):
    """What is kept of the jobs of one class."""

    keep: Keep
    values: Values | None
    """None for a class without a result."""


class _Running(msgspec.Struct, eq=False):
    """A run that has begun and hasn't ended."""

    attempt: Attempt[Any]
    tracked: Tracked
    task: asyncio.Task[Any]
    in_thread: bool
    written: tuple[float, str] | None = None
    """The progress that was written last."""


class Recording:
    """Enters the runs and endings of one worker's jobs into the job store.

    Args:
        recorder: Writes to the store.
        handlers: The worker's handlers.
        runtime: Clock and settings.
        shared: Whether the broker shares its transactions with the store. The changes of a settlement then go with it, and the recorder
            writes what belongs to none.
    """

    def __init__(
        self, recorder: Recorder, handlers: Sequence[Handler], runtime: Runtime, *, shared: bool = False
    ) -> None:
        self._recorder = recorder
        self._shared = shared
        self._clock = runtime.clock
        self._content_type = content_type(runtime.settings.encoding)
        self._contracts: dict[tuple[str, str], _Contract | None] = {
            (handler.queue.name, handler.spec.name): _contract(handler) for handler in handlers
        }
        self._running: dict[Tracked, _Running] = {}
        self._timer: Timer | None = None
        self._asking: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Look for nothing more."""
        self._running.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._asking is not None:
            self._asking.cancel()

    async def begin(self, envelope: Envelope, *, redelivered: bool) -> Aborted | Repeated | None:
        """Enter that a run begins; return why it doesn't, None if it does.

        Only a redelivery is taken for one whose acknowledgement got lost. Another copy of a publish that has ended runs: somebody
        may have moved it out of the dead letters by the broker's own tools, and acknowledged without a run it would be lost.
        """
        contract = self._contracts.get((envelope.queue, envelope.job))
        if contract is None:
            return None
        body = envelope.body if contract.keep.body else None
        change = self._change(envelope, "running", contract.keep.failed_s, body=body)
        verdict = await self._recorder.begin(change)
        if verdict == "go" or (verdict == "ended" and not redelivered):
            return None
        return Aborted() if verdict == "aborted" else Repeated()

    def track(self, attempt: Attempt[Any], *, in_thread: bool) -> None:
        """Follow a run that begins in the running task: write its progress, and end it if somebody aborts its job."""
        envelope, task = attempt.envelope, asyncio.current_task()
        if task is None or self._contracts.get((envelope.queue, envelope.job)) is None:
            return
        attempt.tracked = tracked = Tracked()
        self._running[tracked] = _Running(attempt, tracked, task, in_thread)
        if self._timer is None:
            self._timer = self._clock.call_later(LOOK_S, self._look, limit=True)

    def _look(self) -> None:
        self._timer = None
        if not self._running:
            return
        for running in self._running.values():
            if (progress := self._progress(running)) is not None:
                self._recorder.note(progress)
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._ask())
        self._timer = self._clock.call_later(LOOK_S, self._look, limit=True)

    def _progress(self, running: _Running) -> Progress | None:
        """Return what the store hasn't heard of the progress of a run."""
        said = running.tracked.progress  # set by any thread
        if said is None or said is running.written:
            return None
        running.written = said
        envelope, (fraction, note) = running.attempt.envelope, said
        return Progress(
            job_id=envelope.job_id,
            publish=envelope.publish,
            passes=envelope.passes,
            attempt=envelope.attempt,
            fraction=fraction,
            note=note,
        )

    async def _ask(self) -> None:
        """Ask which runs are to end. An `async def` handler is cancelled, and so is middleware before any handler."""
        asked = set(await self._recorder.asked([key_of(each.attempt.envelope) for each in self._running.values()]))
        for running in list(self._running.values()) if asked else ():
            tracked = running.tracked
            if key_of(running.attempt.envelope) in asked and not tracked.asked:
                tracked.asked = True
                if not (tracked.over or (running.in_thread and running.attempt.begun)):
                    running.task.cancel()

    async def end(self, delivery: Delivery, attempt: Attempt[Any] | None, ending: Ending) -> Ending:
        """Enter what an acknowledgement makes final, before it or with it; return the ending by which the delivery is settled."""
        envelope = delivery.envelope
        contract = self._contracts.get((envelope.queue, envelope.job))
        if contract is None or attempt is None:
            return ending
        running = None if attempt.tracked is None else self._running.pop(attempt.tracked, None)
        progress = None if running is None else self._progress(running)
        try:
            change = self._end_of(contract, envelope, ending)
        except WrongResult as wrong:
            change, ending = None, Bury(said_by(wrong))
            ending.__cause__ = wrong
        if change is not None and self._shared and delivery.live:
            cast("Recorded", delivery).changes = (change,) if progress is None else (progress, change)
            return ending
        if progress is not None:
            self._recorder.note(progress)
        if change is not None:
            await self._recorder.end(change, required=contract.keep.required and change.state == "done")
        return ending

    def _end_of(self, contract: _Contract, envelope: Envelope, ending: Ending) -> Change | None:
        """Return what an acknowledgement makes final. Raises WrongResult."""
        keep = contract.keep
        match ending:
            case Done(result):
                encoded, reason = self._encoded(contract, envelope, result)
                kind = "" if encoded is None else self._content_type
                return self._change(envelope, "done", keep.result_s, result=encoded, content_type=kind, reason=reason)
            case Aborted():
                return self._change(envelope, "aborted", keep.result_s)
            case Expired(kept) if not kept:
                return self._change(envelope, "expired", keep.result_s)
            case _:
                return None

    def lost(self, delivery: Delivery) -> None:
        """Write what the settlement of a delivery was to enter, whose lease was lost since its `end`."""
        if self._shared:
            for change in getattr(delivery, "changes", ()):
                self._recorder.note(change)

    def _encoded(self, contract: _Contract, envelope: Envelope, result: object) -> tuple[bytes | None, str]:
        """Return a result as bytes, or None and why the store doesn't get it. Raises WrongResult."""
        if contract.values is None:
            if result is not None:
                msg = f"{envelope.job} has no result, and its handler returned one; derive its class from Job[…]"
                raise WrongResult(msg)
            return None, ""
        encoded = contract.values.encode(result, self._content_type)
        if len(encoded) > (most := contract.keep.max_bytes):
            return None, f"the result has {len(encoded)} bytes, and Keep(max_bytes={most}) keeps none above that"
        return encoded, ""

    def bring(self, run: Run, ending: Ending | None) -> None:
        """Let the publish that now makes `ending` true enter it too, if it can; None: the next publish enters nothing."""
        if self._shared and run.delivery.live:
            change = None if ending is None else self._replaced(run, ending)
            cast("Recorded", run.delivery).changes = () if change is None else (change,)

    def replaced(self, run: Run, ending: Ending, became: Ending) -> None:
        """Enter what a publish has made of a delivery, once the broker has confirmed it, unless the publish has entered it."""
        if self._shared or (isinstance(became, Snooze) and became is not ending):
            return  # a burial that waits is running until it is confirmed
        if (change := self._replaced(run, became)) is not None:
            self._recorder.note(change)

    def _replaced(self, run: Run, became: Ending) -> Change | None:
        envelope = run.envelope
        contract = self._contracts.get((envelope.queue, envelope.job), _UNKNOWN)
        if contract is None:
            return None
        keep = contract.keep
        match became:
            case Retry(delay_s):
                attempt = min(envelope.attempt + 1, MOST)
                keep_s = keep.failed_s + (delay_s or 0.0)
                return self._change(_next(envelope, attempt), "retrying", keep_s, error=_error(run))
            case Snooze(delay_s):
                return self._change(_next(envelope, envelope.attempt), "delayed", keep.failed_s + delay_s)
            case Bury(reason) | Undecodable(reason):
                error = _error(run) or (
                    named(became.__cause__) if isinstance(became, Bury) and became.__cause__ else ""
                )
                return self._change(envelope, "failed", keep.failed_s, error=error, reason=one_line(reason))
            case WorkerLost():
                return self._change(envelope, "failed", keep.failed_s, reason=became.reason)
            case Expired():
                return self._change(envelope, "expired", keep.result_s, reason=why_expired(run, became))
            case _:
                return None

    def _change(
        self,
        envelope: Envelope,
        state: State,
        keep_s: float,
        *,
        result: bytes | None = None,
        content_type: str = "",
        error: str = "",
        reason: str = "",
        body: bytes | None = None,
    ) -> Change:
        return Change(
            job_id=envelope.job_id,
            publish=envelope.publish,
            queue=envelope.queue,
            job=envelope.job,
            state=state,
            passes=envelope.passes,
            attempt=envelope.attempt,
            keep_s=keep_s,
            at_ms=int(self._clock.now() * 1000),
            result=result,
            content_type=content_type,
            error=error,
            reason=reason,
            body=body,
        )


_UNKNOWN = _Contract(Keep(), None)
"""For a job that no handler here knows, and that is buried."""


def _contract(handler: Handler) -> _Contract | None:
    keep, result = handler.spec.keep, handler.spec.result
    if keep is None:
        return None
    try:
        return _Contract(keep, None if result is None else Values(handler.job_class, result))
    except Exception as error:
        msg = f"handler {handler.name}: the result of {handler.job_class.__name__}, {result!r:.200}, can't be decoded: {said_by(error)}"
        raise ConfigurationError(msg) from error


def key_of(envelope: Envelope) -> Key:
    """Return the publish of a delivery."""
    return Key(envelope.job_id, envelope.publish)


def _next(envelope: Envelope, attempt: int) -> Envelope:
    """Return the envelope of the job's next delivery, as far as a store knows it."""
    return msgspec.structs.replace(envelope, passes=min(envelope.passes + 1, MOST), attempt=attempt)


def _error(run: Run) -> str:
    """Return the class and the message of the error that led to an ending; empty without one."""
    if run.error is not None:
        return named(run.error)
    failures = failures_of(run.envelope) if run.envelope.bury_since_ms is not None else []
    failure = run.past.failure if run.past is not None else failures[-1] if failures else None
    return f"{failure.error}: {failure.message}" if failure is not None and failure.error else ""
