"""ending → settled: only this module acts on how a run ended. It repeats a retry's or burial's publish until the broker confirms."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, ClassVar

import msgspec

from ..attempt import Attempt, elapsed_s
from ..attemptlog import duration, log_attempt, when
from ..backoff import full_jitter
from ..broker import Delivery
from ..chain import fold_publish
from ..clock import moment_ms
from ..envelope import Envelope, Receipt
from ..errors import InvalidJob, MessageTooLarge, PublishError
from ..failure import Failure, failures_of
from ..headers import MOST
from ..job import Job
from ..layer import AnyLayer
from ..outcome import (
    Bury,
    CutOff,
    Done,
    Ending,
    Expired,
    ExpiredOnArrival,
    Kind,
    NotStarted,
    Repeated,
    Retry,
    Snooze,
    Suspect,
    Undecodable,
    Unknown,
    WorkerLost,
)
from ..runtime import Runtime
from ..texts import named, one_line, said_by
from ..tracebacks import exc_info
from .remembered import ACKED, Past, Remembered, key_of

logger = logging.getLogger("leveret.consumer")  # for readers of logs, the consumer settles

SETTLE_TIMEOUT_S = 5.0
"""Seconds per try to publish a retry or a burial; the tries go on until the delivery's channel or lease is gone."""
PUT_BACK_S = 3.0
"""Seconds to publish a job again that was held or cut off at a stop."""
MAX_ERRORS_BYTES = 16 << 10
_TRACEBACK_CHARS = 2000
_MESSAGE_CHARS = 500
_REFUSED = (InvalidJob, MessageTooLarge)
"""Errors that another try wouldn't change."""


class Ended(msgspec.Struct, frozen=True):
    """A delivery that ended in this consumer; for observers such as `leveret.testing`."""

    envelope: Envelope
    job: Job | None
    """None if the body wasn't decoded."""
    ending: Ending
    error: BaseException | None


class Lost(msgspec.Struct, frozen=True):
    """Counts deliveries whose channel or lease was lost; the broker delivers them again."""

    kind: ClassVar[Kind] = Kind.LOST


class _Run(msgspec.Struct):
    """A delivery that ended, for its settlement and its log record."""

    delivery: Delivery
    attempt: Attempt[Any] | None
    """None if the delivery didn't run."""
    envelope: Envelope
    """The delivery's envelope, with the time of its first delivery."""
    error: BaseException | None
    """The error that led to the ending."""
    took_s: float
    past: Past | None = None
    """For a redelivery that doesn't run: how the earlier run ended."""


class Settlement:
    """Counts endings, and settles the delivery of each ending.

    Args:
        publish_layers: The middleware round every publish, first is outermost.
        runtime: Clock, chance and settings.
        observe: Called with each ending once its delivery is settled.
        window: The number of deliveries that this worker may hold.
    """

    def __init__(
        self,
        publish_layers: Sequence[AnyLayer],
        runtime: Runtime,
        observe: Callable[[Ended], None] | None = None,
        window: int = 0,
    ) -> None:
        self._observe = observe
        self.counts: defaultdict[type[Ending | Lost], int] = defaultdict(int)
        """Endings so far, by their class."""
        self._publish_layers = publish_layers
        self._runtime = runtime
        self._clock = runtime.clock
        self.remembered = Remembered(runtime.clock, window)
        self._settled = self.remembered.settled.append  # looked up once
        self.unsettled = 0
        """The number of retries and burials that can't be published now; their deliveries stay unacknowledged."""
        self.cut = False
        """Whether the grace of a stop is over; nothing is then tried again."""

    def end(
        self, delivery: Delivery, attempt: Attempt[Any] | None, ending: Ending, arrived: float | None
    ) -> Coroutine[Any, Any, None] | None:
        """Count an ending and settle its delivery; return the rest of the settlement to await, or None.

        `attempt` is None for a delivery that didn't run. `arrived` is the time of arrival, in seconds of the clock's `now`.
        """
        run: _Run | None = None
        try:
            if not self.cut and isinstance(ending, Done) and delivery.live:  # nearly all
                self.counts[Done] += 1
                delivery.done()
                self._settled(key_of(delivery.envelope))
            else:
                run = self._run(delivery, attempt, ending, arrived)
                if isinstance(ending, CutOff) or (self.cut and not isinstance(ending, NotStarted)):
                    _say_cut_off(run, ending)
                    ending = CutOff()  # counted in `Consumer.cut_off`, because a thread may never get here
                else:
                    self.counts[type(ending)] += 1
                    if not delivery.live:
                        self._lost(run, ending)
                    elif (republishing := self.settle(run, ending)) is not None:
                        return self._republished(republishing, run, ending)
                    else:
                        if isinstance(ending, (Done, Expired, Repeated)):
                            self._settled(key_of(delivery.envelope))
                        _say(run, ending)
            if self._observe is not None:
                self._show(self._observe, delivery, attempt, ending, None if run is None else run.error)
        except Exception as bug:  # noqa: BLE001 - see there
            self._stuck(delivery, bug)
        return None

    def recall(self, delivery: Delivery, past: Past) -> Coroutine[Any, Any, None] | None:
        """Settle a delivery by an earlier run of its job; return the rest of the settlement to await, or None."""
        self.counts[Repeated] += 1
        run = self._run(delivery, None, past.ending, None)
        run.past = past
        try:
            if not delivery.live:
                self._lost(run, past.ending)
            elif (republishing := self.settle(run, past.ending)) is not None:
                return self._republished(republishing, run, past.ending)
            else:
                self._settled(key_of(delivery.envelope))
        except Exception as bug:  # noqa: BLE001 - see there
            self._stuck(delivery, bug)
        return None

    def _run(self, delivery: Delivery, attempt: Attempt[Any] | None, ending: Ending, arrived: float | None) -> _Run:
        envelope = delivery.envelope
        if not envelope.first_seen_ms:
            envelope = msgspec.structs.replace(envelope, first_seen_ms=int((arrived or self._clock.now()) * 1000))
        error = ending.__cause__ if isinstance(ending, BaseException) else None
        return _Run(delivery, attempt, envelope, error, 0.0 if attempt is None else elapsed_s(attempt))

    async def _republished(self, republishing: Coroutine[Any, Any, Ending | None], run: _Run, ending: Ending) -> None:
        try:
            became = await republishing
            if became is not None:
                self._replaced(run.delivery)
                _say(run, became)
            elif self.cut:
                _say_cut_off(run, ending)
            else:
                self._lost(run, ending)
            if self._observe is not None:
                self._show(self._observe, run.delivery, run.attempt, ending, run.error)
        except asyncio.CancelledError as cancelled:
            if self.cut:
                _say_cut_off(run, ending)
            else:
                self._stuck(run.delivery, cancelled)
            raise
        except Exception as bug:  # noqa: BLE001 - see there
            self._stuck(run.delivery, bug)

    def _replaced(self, delivery: Delivery) -> None:
        """Remember that a retry or a burial is published: if the delivery was lost meanwhile, its redelivery is only acknowledged."""
        key = key_of(delivery.envelope)
        if delivery.live:
            self._settled(key)
        else:
            self.remembered.add(key, ACKED)

    def _show(
        self,
        observe: Callable[[Ended], None],
        delivery: Delivery,
        attempt: Attempt[Any] | None,
        ending: Ending,
        error: BaseException | None,
    ) -> None:
        """Call the observer. Its error says nothing about the settlement, which is over or left to the broker."""
        try:
            observe(Ended(delivery.envelope, None if attempt is None else attempt.job, ending, error))
        except Exception as bug:
            logger.exception("%s: the observer of its ending raised: %r", what(delivery.envelope), bug)  # noqa: TRY401 - one line, without its traceback, as a rule

    def _stuck(self, delivery: Delivery, bug: BaseException) -> None:
        """Log that leveret's own code failed, or that user code cancelled it. The delivery stays unacknowledged, so that no job is lost."""
        logger.critical(
            "%s couldn't be settled and stays unacknowledged: %r", what(delivery.envelope), bug, exc_info=bug
        )

    def _lost(self, run: _Run, ending: Ending) -> None:
        self.counts[Lost] += 1
        if past := run.past or self._past(run, ending):
            self.remembered.add(key_of(run.envelope), past)
        if run.attempt is not None and isinstance(ending, (Retry, Bury)):
            ended = f"ended as {ending.kind.value} after {duration(run.took_s)}"
            gone = f"{ended}, but the channel or lease is gone, so the broker delivers the job again"
            _log(run, logging.WARNING, "lost", gone, run.error)
            return
        logger.debug(  # the worker's state has one line for all of them, with their number
            "%s: the channel or lease is gone, so the broker delivers the job again; the run ended as %s",
            what(run.envelope),
            ending.kind.value,
        )

    def _past(self, run: _Run, ending: Ending) -> Past | None:
        """Return what to remember of a run; None for a delivery that didn't run."""
        if run.attempt is None:
            return None
        if not isinstance(ending, (Retry, Snooze, Bury)):
            return Past(ending)
        reason = ending.reason if isinstance(ending, Bury) else ""
        # a copy, since the exception's traceback holds what the handler's frames hold
        return Past(type(ending)(*ending.args), self._failure(run.envelope, run.error, reason))

    def settle(self, run: _Run, ending: Ending) -> Coroutine[Any, Any, Ending | None] | None:
        """Settle a live delivery by its ending; return None, or a publish to await.

        The publish returns the ending that it made true; None if the delivery's channel or lease was lost meanwhile.
        """
        delivery, envelope = run.delivery, run.envelope
        match ending:
            case Done() | Repeated():
                delivery.done()
            case Expired(keep):
                if keep:
                    return self._bury(delivery, ending, self._failed(run, _why_expired(run, ending)))
                delivery.done()
            case Snooze(delay_s):
                return self._again(delivery, ending, _next(envelope, cause="snooze"), delay_s)
            case Retry(delay_s):
                failed = self._failed(run)
                following = _next(failed, cause="retry", attempt=min(envelope.attempt + 1, MOST))
                return self._again(delivery, ending, following, delay_s or 0.0)
            case Bury(reason):
                return self._bury(delivery, ending, self._failed(run, reason))
            case Undecodable(reason):
                return self._bury(delivery, ending, self._failed(run, reason))
            case Suspect():
                suspect = _next(envelope, cause="crash", crashes=min(envelope.crashes + 1, MOST))
                return self._again(delivery, ending, suspect, 0.0)
            case WorkerLost(crashes):
                failed = self._failed(run, ending.reason)
                return self._bury(delivery, ending, msgspec.structs.replace(failed, crashes=crashes))
            case Unknown(reason):
                now_ms = int(self._clock.now() * 1000)
                # A time in the future, from a wrong clock, would make the job wait until then.
                since_ms = min(envelope.unknown_since_ms or now_ms, now_ms)
                waited_s = (now_ms - since_ms) / 1000
                if waited_s >= self._runtime.settings.unknown_grace_s:
                    why = Bury(f"{reason}, after a wait of {waited_s:.0f} s")
                    return self._bury(delivery, why, self._failed(run, reason))
                if envelope.unknown_since_ms is None:
                    logger.warning(
                        "%s waits in the broker, because a deploy may be in progress, and is buried in %s otherwise: %s",
                        what(envelope),
                        duration(self._runtime.settings.unknown_grace_s),
                        one_line(reason),
                    )
                # 1, 2, 4 … 30 s: each wait is 1 s longer than all before it together.
                unknown = _next(envelope, cause="snooze", unknown_since_ms=since_ms)
                return self._again(delivery, ending, unknown, min(30.0, 1.0 + waited_s))
            case NotStarted():
                delivery.give_back()
            case CutOff():
                pass  # left unsettled, so that the broker delivers it again when the connection closes
        return None

    async def _again(self, delivery: Delivery, ending: Ending, envelope: Envelope, delay_s: float) -> Ending | None:
        due_ms = moment_ms(self._clock.now() + delay_s) if delay_s else None
        envelope = msgspec.structs.replace(envelope, due_ms=due_ms)

        published = False

        async def publish() -> None:
            reached = False

            async def last(changed: Envelope) -> Receipt:
                nonlocal reached, published
                reached = True
                published = await delivery.again(changed)
                return Receipt(changed.job_id)

            await fold_publish(self._publish_layers, last)(_with_deadline(envelope))
            if not reached:
                msg = "publishing middleware returned without awaiting proceed(envelope)"
                raise RuntimeError(msg)

        try:
            return ending if await self._insist(delivery, publish, envelope) and published else None
        except _REFUSED as refused:  # another try wouldn't help
            reason = f"the {envelope.cause} can't be published: {refused}"
            ran = msgspec.structs.replace(envelope, attempt=delivery.envelope.attempt)
            bury = Bury(reason)
            bury.__cause__ = refused
            return await self._bury(delivery, bury, _entered(ran, self._failure(ran, refused, reason)))

    async def _bury(self, delivery: Delivery, ending: Ending, envelope: Envelope) -> Ending | None:
        buried = msgspec.structs.replace(
            envelope, origin=delivery.queue.name, cause="bury", due_ms=None, unknown_since_ms=None
        )

        published = False

        async def publish() -> None:
            reached = False

            async def last(changed: Envelope) -> Receipt:
                nonlocal reached, published
                reached = True
                # Middleware may only add headers to a burial; the rest stays as it came.
                published = await delivery.bury(
                    _with_deadline(msgspec.structs.replace(buried, headers=changed.headers))
                )
                return Receipt(changed.job_id)

            try:
                await fold_publish(self._publish_layers, last)(_with_deadline(buried))
            except Exception as error:
                if reached and not isinstance(
                    error, _REFUSED
                ):  # the headers that middleware added may be what can't be sent
                    raise
                reached = False
                logger.warning(
                    "%s: publishing middleware raised on the burial, which goes on without the middleware: %r",
                    what(envelope),
                    error,
                )
            if not reached:
                await last(buried)

        return ending if await self._insist(delivery, publish, buried) and published else None

    async def _insist(self, delivery: Delivery, publish: Callable[[], Awaitable[None]], envelope: Envelope) -> bool:
        """Repeat `publish` until the broker confirms, or until the delivery's channel or lease is gone.

        The delivery isn't acknowledged before, and never rejected. Raises `InvalidJob` or `MessageTooLarge` if the job can only
        be buried; a burial is repeated in spite of them.
        """
        tries, told = 0, float("-inf")
        try:
            while delivery.live and not self.cut:
                try:
                    await publish()
                except Exception as error:  # the delivery must not be lost, whatever middleware raises
                    if isinstance(error, _REFUSED) and envelope.cause != "bury":
                        raise
                    if tries == 0:
                        self.unsettled += 1
                    tries += 1
                    if self._clock.monotonic() - told >= 60.0 and delivery.live:
                        told = self._clock.monotonic()
                        logger.error(  # noqa: TRY400 - one line; the traceback at debug level
                            "%s: the %s can't be published, so the job stays unacknowledged and the worker tries again: %s",
                            what(envelope),
                            envelope.cause,
                            said_by(error) if isinstance(error, PublishError) else named(error),
                            exc_info=at_debug(error),
                        )
                    if delivery.live:
                        await self._clock.sleep(full_jitter(tries, base_s=0.2, cap_s=15.0, rng=self._runtime.rng))
                else:
                    if tries:
                        logger.info("%s: the %s is published after %d tries", what(envelope), envelope.cause, tries + 1)
                    return True
        finally:
            if tries:
                self.unsettled -= 1
        return False

    async def put_back(self, held: deque[Delivery]) -> None:
        """Publish jobs again that didn't start, until `held` is empty: given back, they would look like jobs that killed their worker.

        The first is confirmed before the others are written. A broker that confirms nothing may keep what was written, and the
        jobs that go back all the same would run twice.
        """
        confirms = await self._put_back(held.popleft())
        while held:
            batch = list(held)
            held.clear()
            if confirms:
                confirms = all(await asyncio.gather(*map(self._put_back, batch)))
            else:
                for delivery in batch:
                    self.end(delivery, None, NotStarted(), None)

    async def _put_back(self, delivery: Delivery) -> bool:
        """Publish a job again that didn't start, and ack it; where that fails give it back, and return False."""
        if not await self.uncount(delivery):
            failed = delivery.live
            self.end(delivery, None, NotStarted(), None)
            return not failed
        self.counts[NotStarted] += 1
        self._replaced(delivery)
        if self._observe is not None:
            self._show(self._observe, delivery, None, NotStarted(), None)
        return True

    async def uncount(self, delivery: Delivery) -> bool:
        """Publish a job again whose redelivery would be counted as a crash, if that is quick; return whether it is published."""
        envelope = _uncounted(delivery)
        try:
            return await delivery.again(msgspec.structs.replace(envelope, deadline=time.monotonic() + PUT_BACK_S))
        except PublishError as error:
            logger.debug("%s goes back as redelivered, since it can't be published: %s", what(envelope), said_by(error))
            return False

    def _failed(self, run: _Run, reason: str = "") -> Envelope:
        """Return the envelope of `run` with its failure; that of a remembered run, if there is one."""
        failure = run.past.failure if run.past is not None else None
        return _entered(run.envelope, failure or self._failure(run.envelope, run.error, reason))

    def _failure(self, envelope: Envelope, error: BaseException | None, reason: str) -> Failure:
        reason = reason or ("a retry was requested" if error is None else "")
        return Failure(
            attempt=envelope.attempt,
            at_ms=int(self._clock.now() * 1000),
            host=socket.gethostname(),
            error="" if error is None else _encodable(type(error).__qualname__),
            message=(one_line(reason) if error is None else said_by(error))[:_MESSAGE_CHARS],
            reason=one_line(reason)[:_MESSAGE_CHARS],
            traceback="" if error is None else _trimmed(error),
        )


def _say(run: _Run, ending: Ending) -> None:
    """Log an ending that is true now: settled, or published and confirmed. The middleware `Logs` logs the runs that ended well."""
    attempt, dead, took = run.attempt, f"{run.delivery.queue.name}.dead", f"after {duration(run.took_s)}"
    match ending:
        case Undecodable(reason) | Bury(reason) if attempt is None:
            logger.error("%s is buried in %s: %s", what(run.envelope), dead, one_line(reason))
        case WorkerLost():
            logger.error("%s is buried in %s: %s", what(run.envelope), dead, ending.reason)
        case Suspect():
            crashes = run.envelope.crashes + 1
            level = logging.WARNING if crashes > 1 else logging.DEBUG  # neighbours of a crash come back once
            logger.log(level, "%s came back; workers that may have died of it: %d", what(run.envelope), crashes)
        case Retry(delay_s):
            ended = "ended" if run.error is None else "failed"
            said = f"{ended} {took}, retried {when(delay_s)}"
            _log(run, logging.WARNING, "retry", said, run.error, delay_s=delay_s)
        case Bury(reason):
            error = run.error or ending.__cause__  # the second is the error of a retry that can't be published
            _log(run, logging.ERROR, "buried", f"buried in {dead} {took}", error, reason=one_line(reason))
        case Expired(keep):
            becomes = f"buried in {dead}" if keep else "dropped"
            _log(run, logging.WARNING, "expired", f"{_why_expired(run, ending)}; the job is {becomes}")
        case _:
            pass


def _say_cut_off(run: _Run, ending: Ending) -> None:
    """Log a run that was cut off, unless it ended well nevertheless: the middleware `Logs` logs those."""
    if not isinstance(ending, (Done, Snooze)):
        took = duration(run.took_s)
        _log(run, logging.WARNING, "cut off", f"cut off after {took}, so the broker delivers the job again", run.error)


def _log(run: _Run, level: int, outcome: str, said: str, error: BaseException | None = None, **fields: object) -> None:
    """Log the ending of a run, with its error and the traceback; nothing for a delivery that didn't run."""
    if run.attempt is None:
        return
    if error is not None:
        fields["error"] = named(error)
    why = fields.get("reason") or fields.get("error")
    said = f"{said}: {why}" if why else said
    log_attempt(level, run.attempt, outcome, run.took_s, said, None if error is None else exc_info(error), **fields)


def _why_expired(run: _Run, ending: Expired) -> str:
    """Return why a job expired. Before its first delivery, its age is by the publisher's clock, the delivery by this one."""
    if not isinstance(ending, ExpiredOnArrival):
        return "expired before it ran"
    envelope = run.envelope
    arrived_ms, expires_at_ms = envelope.first_seen_ms or 0, envelope.expires_at_ms or 0
    age = (
        f"was {arrived_ms / 1000 - envelope.created_s:.0f} s old by its time stamp"
        if envelope.created_s
        else "had no time stamp"
    )
    return (
        f"had expired {(arrived_ms - expires_at_ms) / 1000:.0f} s before it first arrived, when it {age}: either it waited in the queue, "
        "or the clocks of its publisher and of this worker differ"
    )


def _entered(envelope: Envelope, failure: Failure) -> Envelope:
    """Return `envelope` with another entry in its errors; the oldest entries are dropped above `MAX_ERRORS_BYTES`."""
    failures = [*failures_of(envelope), failure]
    text = msgspec.json.encode(failures)
    while len(text) > MAX_ERRORS_BYTES and len(failures) > 1:
        failures = failures[1:]
        text = msgspec.json.encode(failures)
    return msgspec.structs.replace(envelope, errors=text.decode())


def _next(envelope: Envelope, **changes: Any) -> Envelope:
    """Return `envelope` for its next publish: the same id, one more pass."""
    # the count of a foreign producer may be at its maximum
    counted = {"passes": min(envelope.passes + 1, MOST), "crashes": 0, "unknown_since_ms": None, **changes}
    return msgspec.structs.replace(envelope, **counted)


def _uncounted(delivery: Delivery) -> Envelope:
    """Return the envelope of `delivery` for a publish without a count. One that came back before keeps a mark of that, for `Attempt.redelivered`."""
    envelope = delivery.envelope
    crashes = max(envelope.crashes, int(delivery.redelivered))
    return _next(envelope, crashes=crashes, due_ms=None, unknown_since_ms=envelope.unknown_since_ms)


def _with_deadline(envelope: Envelope) -> Envelope:
    return msgspec.structs.replace(envelope, deadline=time.monotonic() + SETTLE_TIMEOUT_S)


def what(envelope: Envelope) -> str:
    """Return the name of a job in log lines."""
    return f"{envelope.job or 'a job without a name'} {envelope.job_id} (queue {envelope.queue}, attempt {envelope.attempt})"


def at_debug(error: BaseException | None) -> BaseException | None:
    """Return `exc_info` for a log record: a traceback at debug level, otherwise None for one line."""
    return error if logger.isEnabledFor(logging.DEBUG) else None


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _trimmed(error: BaseException) -> str:
    try:
        text = _encodable("".join(traceback.format_exception(*exc_info(error))))
    except Exception as refused:  # noqa: BLE001 - a class of the user may refuse anything, and the job must still be settled
        return f"the traceback can't be shown: {named(refused)}"
    return text if len(text) <= _TRACEBACK_CHARS else "…" + text[-_TRACEBACK_CHARS:]
