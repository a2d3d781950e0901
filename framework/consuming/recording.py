"""deliveries → job store: what the store hears of a worker's jobs, and which of them it wants aborted. Only for job classes with `keep`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from ..attempt import Attempt, Tracked
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
    """

    def __init__(self, recorder: Recorder, handlers: Sequence[Handler], runtime: Runtime) -> None:
        self._recorder = recorder
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
            self._note_progress(running)
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._ask())
        self._timer = self._clock.call_later(LOOK_S, self._look, limit=True)

    def _note_progress(self, running: _Running) -> None:
        said = running.tracked.progress  # set by any thread
        if said is not None and said is not running.written:
            running.written = said
            envelope, (fraction, note) = running.attempt.envelope, said
            self._recorder.note(
                Progress(
                    job_id=envelope.job_id,
                    publish=envelope.publish,
                    passes=envelope.passes,
                    attempt=envelope.attempt,
                    fraction=fraction,
                    note=note,
                )
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

    async def end(self, envelope: Envelope, attempt: Attempt[Any] | None, ending: Ending) -> Ending:
        """Enter what an acknowledgement makes final, before it; return the ending by which the delivery is settled."""
        contract = self._contracts.get((envelope.queue, envelope.job))
        if contract is None or attempt is None:
            return ending
        keep = contract.keep
        if attempt.tracked is not None and (running := self._running.pop(attempt.tracked, None)) is not None:
            self._note_progress(running)
        match ending:
            case Done(result):
                try:
                    encoded, reason = self._encoded(contract, envelope, result)
                except WrongResult as wrong:
                    bury = Bury(said_by(wrong))
                    bury.__cause__ = wrong
                    return bury
                kind = "" if encoded is None else self._content_type
                change = self._change(envelope, "done", keep.result_s, result=encoded, content_type=kind, reason=reason)
                await self._recorder.end(change, required=keep.required)
            case Aborted():
                await self._recorder.end(self._change(envelope, "aborted", keep.result_s))
            case Expired(kept) if not kept:
                await self._recorder.end(self._change(envelope, "expired", keep.result_s))
            case _:
                pass
        return ending

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

    def replaced(self, run: Run, ending: Ending, became: Ending) -> None:
        """Enter what a publish has made of a delivery, once the broker has confirmed it."""
        envelope = run.envelope
        contract = self._contracts.get((envelope.queue, envelope.job), _UNKNOWN)
        if contract is None:
            return
        keep = contract.keep
        match became:
            case Retry(delay_s):
                attempt = min(envelope.attempt + 1, MOST)
                self._note(_next(envelope, attempt), "retrying", keep.failed_s + (delay_s or 0.0), error=_error(run))
            case Snooze(delay_s) if became is ending:  # a burial that waits is running until it is confirmed
                self._note(_next(envelope, envelope.attempt), "delayed", keep.failed_s + delay_s)
            case Bury(reason) | Undecodable(reason):
                error = _error(run) or (
                    named(became.__cause__) if isinstance(became, Bury) and became.__cause__ else ""
                )
                self._note(envelope, "failed", keep.failed_s, error=error, reason=one_line(reason))
            case WorkerLost():
                self._note(envelope, "failed", keep.failed_s, reason=became.reason)
            case Expired():
                self._note(envelope, "expired", keep.result_s, reason=why_expired(run, became))
            case _:
                pass

    def _note(self, envelope: Envelope, state: State, keep_s: float, **more: str) -> None:
        self._recorder.note(self._change(envelope, state, keep_s, **more))

    def _change(self, envelope: Envelope, state: State, keep_s: float, **more: Any) -> Change:
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
            **more,
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
