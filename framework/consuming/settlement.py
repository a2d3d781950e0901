"""ending → settled: only this module acts on how a run ended. It repeats a retry's or burial's publish until the broker confirms."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any, ClassVar

import msgspec

from ..attempt import Attempt, elapsed_s
from ..attemptlog import duration, log_attempt, when
from ..backoff import full_jitter
from ..broker import Delivery, Subscription
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
from ..waits import first_of
from .burials import PATIENCE_S, Burials
from .remembered import ACKED, Past, Remembered, key_of

logger = logging.getLogger("leveret.consumer")  # for readers of logs, the consumer settles

SETTLE_TIMEOUT_S = 5.0
"""Seconds per try to publish a retry or a burial; the tries go on until the delivery's channel or lease is gone."""
PUT_BACK_S = 3.0
"""Seconds to publish a job again that was held or cut off at a stop."""
MAX_ERRORS_BYTES = 16 << 10
_TRACEBACK_CHARS = 2000
_MESSAGE_CHARS = 500
MOST_WINDOW = 5000
"""At most this many settlements are remembered in case that they didn't arrive: about 800 kB."""
_SHORTEST_WAIT_S = 0.25
"""The unit of delays on RabbitMQ."""
_MOST_UNKNOWN = 1000
"""At most this many kinds of unknown jobs are logged; a kind is a name, a version and a sender."""
_BURIED_WITHIN_S = 4.0
"""The longest wait between two tries of a burial that stays in the worker."""
_POSTPONED_S = (10.0, 300.0)
"""The shortest and the longest wait, in the broker, of a job that is to be buried: each is as long as all before it together."""
MOST_GRACES = 10
"""After so many graces a job with an unknown name is buried though it hasn't met every consumer of its queue. It has met at most
about 400 workers by then, whose ids take 4 KB of its headers."""
MOST_LOST = 3
"""At most this many failed runs whose deliveries one loss took are logged as warnings; the others at debug level."""
_TELL_EVERY_S = 60.0
"""How often a queue's log says that its retries can't be published."""
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
        subscriptions: The queues of the deliveries, with their prefetch.
    """

    def __init__(
        self,
        publish_layers: Sequence[AnyLayer],
        runtime: Runtime,
        observe: Callable[[Ended], None] | None = None,
        subscriptions: Sequence[Subscription] = (),
    ) -> None:
        self._observe = observe
        self.counts: defaultdict[type[Ending | Lost], int] = defaultdict(int)
        """Endings so far, by their class."""
        self._publish_layers = publish_layers
        self._runtime = runtime
        self._clock = runtime.clock
        window = sum(each.prefetch * len(each.queue.levels) for each in subscriptions)
        self.remembered = Remembered(runtime.clock, min(window, MOST_WINDOW))
        self._settled = self.remembered.settled.append  # looked up once
        self.unsettled = 0
        """The number of retries and burials that can't be published now; their deliveries stay unacknowledged."""
        self.cut = False
        """Whether the grace of a stop is over; nothing is then tried again."""
        self._id = os.urandom(4).hex()
        """Names this worker among the strangers of a job."""
        self._burials = defaultdict[str, Burials](partial(Burials, 2))
        self._burials.update((each.queue.name, Burials(each.prefetch)) for each in subscriptions)
        self._unknown: set[tuple[str, int, str | None]] = set()
        self._lost_failures = 0
        """Failed runs since the last loss whose deliveries it took."""
        self._told: dict[str, float] = {}
        """By queue: when the log last said that its retries can't be published, seconds of the clock's `monotonic`."""
        self._stopping = asyncio.Event()
        self.on_refusals_changed: Callable[[], None] | None = None
        """Called when `refusals` has changed."""

    @property
    def refusals(self) -> Mapping[str, str]:
        """Why the dead letters of a queue take nothing, by the queue's name; only queues with burials that wait in this worker."""
        return {name: burials.why for name, burials in self._burials.items() if burials.why}

    def stop(self) -> None:
        """Let no burial wait in this worker any more: the worker stops."""
        self._stopping.set()

    def lost(self) -> None:
        """Forget what the dead letters refused: the deliveries that waited for them may be gone."""
        self._lost_failures = 0
        for burials in self._burials.values():
            burials.why = ""

    def _refuse(self, queue: str, why: str) -> None:
        """Note why the dead letters of `queue` take nothing; "" if they do."""
        burials = self._burials[queue]
        before, burials.why = burials.why, why
        if bool(before) == bool(why):
            return
        if why:
            burials.hurry()
            logger.error(
                "queue %s: burials can't be published: a few wait in this worker, the others in the broker: %s",
                queue,
                why,
            )
        else:
            logger.info("queue %s: burials are published again", queue)
        if self.on_refusals_changed is not None:
            self.on_refusals_changed()

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
                    if run.envelope.bury_since_ms is None:  # otherwise counted where the job ended
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
                if not isinstance(became, Suspect):  # its copy has the same key
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
        if delivery.envelope.bury_since_ms is not None:  # shown where the job ended
            return
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
            self._lost_failures += 1
            if self._lost_failures == MOST_LOST:
                gone += " (the next such runs are logged at debug level)"
            level = logging.WARNING if self._lost_failures <= MOST_LOST else logging.DEBUG
            _log(run, level, "lost", gone, run.error)
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
                    return self._bury(run, ending, self._failed(run, _why_expired(run, ending)))
                delivery.done()
            case Snooze(delay_s):
                return self._again(run, ending, _next(envelope, cause="snooze"), delay_s)
            case Retry(delay_s):
                failed = self._failed(run)
                following = _next(failed, cause="retry", attempt=min(envelope.attempt + 1, MOST))
                return self._again(run, ending, following, delay_s or 0.0)
            case Bury(reason):
                return self._bury(run, ending, self._failed(run, reason))
            case Undecodable(reason):
                return self._bury(run, ending, self._failed(run, reason))
            case Suspect():
                suspect = msgspec.structs.replace(envelope, cause="crash", crashes=min(envelope.crashes + 1, MOST))
                return self._again(run, ending, suspect, 0.0)
            case WorkerLost(crashes):
                failed = self._failed(run, ending.reason)
                return self._bury(run, ending, msgspec.structs.replace(failed, crashes=crashes))
            case Unknown(reason):
                since_ms, waited_s = self._waited(envelope.unknown_since_ms)
                grace_s = self._runtime.settings.unknown_grace_s
                strangers = _met(envelope.strangers, self._id)
                # while the queue has more consumers than the job has met strangers, one of them may know it
                met_all = strangers.count(",") + 1 >= delivery.consumers
                if waited_s >= (grace_s if met_all else grace_s * MOST_GRACES):
                    why = Bury(f"{reason}, after a wait of {waited_s:.0f} s")
                    return self._bury(run, why, self._failed(run, reason))
                self._say_unknown(envelope, reason)
                unknown = _next(envelope, cause="snooze", unknown_since_ms=since_ms, strangers=strangers)
                return self._again(run, ending, unknown, unknown_wait_s(waited_s, grace_s))
            case NotStarted():
                delivery.give_back()
            case CutOff():
                pass  # left unsettled, so that the broker delivers it again when the connection closes
        return None

    def _waited(self, since_ms: int | None) -> tuple[int, float]:
        """Return since when a job waits, Unix ms, and for how long, seconds; from now on if it didn't wait before."""
        now_ms = int(self._clock.now() * 1000)
        # A time in the future, from a wrong clock, would make the job wait until then.
        since_ms = min(since_ms or now_ms, now_ms)
        return since_ms, (now_ms - since_ms) / 1000

    def _say_unknown(self, envelope: Envelope, reason: str) -> None:
        """Log a job that this worker doesn't know; once per name and sender, since each such job comes many times."""
        kind = (envelope.job, envelope.version, envelope.app)
        if kind in self._unknown or len(self._unknown) >= _MOST_UNKNOWN:
            return
        self._unknown.add(kind)
        sender = "" if envelope.app in (None, self._runtime.app) else f", from the app {one_line(envelope.app):.80}"
        logger.warning(
            "%s%s waits in the broker, because a deploy may be in progress, and is buried in %s otherwise: %s",
            what(envelope),
            sender,
            duration(self._runtime.settings.unknown_grace_s),
            one_line(reason),
        )

    async def _again(self, run: _Run, ending: Ending, envelope: Envelope, delay_s: float) -> Ending | None:
        try:
            return ending if await self._delayed(run.delivery, envelope, delay_s) else None
        except _REFUSED as refused:  # another try wouldn't help
            reason = f"the {envelope.cause} can't be published: {refused}"
            ran = msgspec.structs.replace(envelope, attempt=run.delivery.envelope.attempt)
            bury = Bury(reason)
            bury.__cause__ = refused
            return await self._bury(run, bury, _entered(ran, self._failure(ran, refused, reason)))

    async def _delayed(self, delivery: Delivery, envelope: Envelope, delay_s: float) -> bool:
        """Publish `envelope` to its queue, due after `delay_s`; return whether it is published. Raises what another try wouldn't change."""
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

        return await self._insist(delivery, publish, envelope) and published

    async def _bury(self, run: _Run, ending: Ending, envelope: Envelope) -> Ending | None:
        """Publish the job to the dead letters. If they take nothing, few burials wait here, and any other in the broker."""
        delivery = run.delivery
        buried = msgspec.structs.replace(
            envelope,
            origin=delivery.queue.name,
            cause="bury",
            due_ms=None,
            unknown_since_ms=None,
            strangers="",
            bury_since_ms=None,
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

        burials = self._burials[delivery.queue.name]
        if await burials.enter():
            try:
                if await self._insist(delivery, publish, buried, burials):
                    return ending if published else None
            finally:
                burials.leave()
        elif burials.parks and not burials.why:
            self._refuse(delivery.queue.name, f"{delivery.queue.name}.dead confirmed no letter for {PATIENCE_S:g} s")
        if not delivery.live or self.cut:
            return None
        try:
            return await self._postponed(run, ending, envelope)
        except _REFUSED:  # the mark doesn't fit into its headers any more
            return ending if await self._insist(delivery, publish, buried) and published else None

    async def _postponed(self, run: _Run, ending: Ending, envelope: Envelope) -> Ending | None:
        """Let a job that is to be buried wait in the broker, with a mark, so that no worker runs it again."""
        since_ms, waited_s = self._waited(run.envelope.bury_since_ms)
        shortest_s, longest_s = _POSTPONED_S
        waits_s = min(longest_s, max(shortest_s, waited_s))
        marked = _next(envelope, cause="bury", bury_since_ms=since_ms)
        if not await self._delayed(run.delivery, marked, waits_s):
            return None
        if run.envelope.bury_since_ms is None:
            _say_postponed(run, ending)
        return Snooze(waits_s)

    async def _insist(
        self,
        delivery: Delivery,
        publish: Callable[[], Awaitable[None]],
        envelope: Envelope,
        burials: Burials | None = None,
    ) -> bool:
        """Repeat `publish` until the broker confirms, or until the delivery's channel or lease is gone.

        The delivery isn't acknowledged before, and never rejected. Raises `InvalidJob` or `MessageTooLarge` if the job can only
        be buried; a burial is repeated in spite of them. A burial, with its `burials`, ends without success at a stop, or if no
        burial may wait here.
        """
        tries, told, queue = 0, False, delivery.queue.name
        try:
            while delivery.live and not self.cut:
                try:
                    await publish()
                except Exception as error:  # the delivery must not be lost, whatever middleware raises
                    if isinstance(error, _REFUSED) and (envelope.cause != "bury" or envelope.bury_since_ms is not None):
                        raise
                    if tries == 0:
                        self.unsettled += 1
                    tries += 1
                    said = said_by(error) if isinstance(error, PublishError) else named(error)
                    if burials is not None:
                        if not burials.parks or self._stopping.is_set():
                            return False
                        self._refuse(queue, said)
                    elif delivery.live and self._clock.monotonic() - self._told.get(queue, -inf) >= _TELL_EVERY_S:
                        told, self._told[queue] = True, self._clock.monotonic()
                        logger.error(  # noqa: TRY400 - one line; the traceback at debug level
                            "%s: the %s can't be published, so the job stays unacknowledged and the worker tries again (jobs in this state: %d): %s",
                            what(envelope),
                            envelope.cause,
                            self.unsettled,
                            said,
                            exc_info=at_debug(error),
                        )
                    if delivery.live:
                        cap_s = 15.0 if burials is None else _BURIED_WITHIN_S
                        wait_s = full_jitter(tries, base_s=0.2, cap_s=cap_s, rng=self._runtime.rng)
                        if burials is None:
                            await self._clock.sleep(wait_s)
                        else:
                            await first_of(self._clock.sleep(wait_s), self._stopping.wait())
                else:
                    if burials is not None:
                        self._refuse(queue, "")
                    elif told:
                        logger.info("%s: the %s is published after %d tries", what(envelope), envelope.cause, tries + 1)
                    return True
        finally:
            if tries:
                self.unsettled -= 1
        return False

    async def put_back(self, held: deque[tuple[Delivery, Envelope]]) -> None:
        """Publish each delivery's envelope until `held` is empty: given back, the jobs would look like those that killed their worker.

        The first is confirmed before the others are written. A broker that confirms nothing may keep what was written, and the
        jobs that go back all the same would run twice.
        """
        confirms = await self._put_back(*held.popleft())
        while held:
            batch = list(held)
            held.clear()
            if confirms:
                confirms = all(await asyncio.gather(*(self._put_back(*each) for each in batch)))
            else:
                for delivery, _ in batch:
                    self.end(delivery, None, NotStarted(), None)

    async def _put_back(self, delivery: Delivery, envelope: Envelope) -> bool:
        """Publish a job again, and ack its delivery; where that fails give it back, and return False."""
        if not await self.uncount(delivery, envelope):
            failed = delivery.live
            self.end(delivery, None, NotStarted(), None)
            return not failed
        self.counts[NotStarted] += 1
        if self._observe is not None:
            self._show(self._observe, delivery, None, NotStarted(), None)
        return True

    async def uncount(self, delivery: Delivery, envelope: Envelope) -> bool:
        """Publish a job again whose redelivery would be counted as a crash, if that is quick; return whether it is published."""
        try:
            return await delivery.again(msgspec.structs.replace(envelope, deadline=time.monotonic() + PUT_BACK_S))
        except PublishError as error:
            logger.debug("%s goes back as redelivered, since it can't be published: %s", what(envelope), said_by(error))
            return False

    def _failed(self, run: _Run, reason: str = "") -> Envelope:
        """Return the envelope of `run` with its failure; that of a remembered run, if there is one."""
        if run.envelope.bury_since_ms is not None:
            return run.envelope  # its failure was entered where the job ended
        failure = run.past.failure if run.past is not None else None
        return _entered(run.envelope, failure or self._failure(run.envelope, run.error, reason))

    def _failure(self, envelope: Envelope, error: BaseException | None, reason: str) -> Failure:
        reason = reason or ("a retry was requested" if error is None else "")
        return Failure(
            attempt=envelope.attempt,
            at_ms=int(self._clock.now() * 1000),
            host=socket.gethostname(),
            error="" if error is None else one_line(type(error).__qualname__),
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


def _say_postponed(run: _Run, ending: Ending) -> None:
    """Log a job that ended, and that can't be buried yet."""
    dead = f"{run.delivery.queue.name}.dead"
    waits = f"{dead} takes no letter now, so the job waits in the broker to be buried"
    error = run.error or (ending.__cause__ if isinstance(ending, BaseException) else None)
    reason = one_line(_why(run, ending))
    if run.attempt is None:
        logger.error("%s: %s: %s", what(run.envelope), waits, reason)
    else:
        _log(run, logging.ERROR, "bury", f"ended after {duration(run.took_s)}; {waits}", error, reason=reason)


def _why(run: _Run, ending: Ending) -> str:
    match ending:
        case Undecodable(reason) | Bury(reason):
            return reason
        case Expired():
            return _why_expired(run, ending)
        case _:
            return ending.kind.value


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


def unknown_wait_s(waited_s: float, grace_s: float) -> float:
    """Return how long a job waits for the next worker that may know it, seconds: a quarter of its wait so far.

    At least 40 waits fit into the grace, so that a job meets a worker that knows it even where most workers of its queue don't.
    """
    return max(_SHORTEST_WAIT_S, min(grace_s / 40, max(0.5, waited_s / 4)))


def _met(strangers: str, worker: str) -> str:
    """Return the ids `strangers` with that of `worker` among them."""
    if worker in strangers:
        return strangers
    return f"{strangers},{worker}" if strangers else worker


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
    fresh = {"crashes": 0, "unknown_since_ms": None, "strangers": ""}
    counted = {"passes": min(envelope.passes + 1, MOST), **fresh, **changes}
    return msgspec.structs.replace(envelope, **counted)


def uncounted(delivery: Delivery, *, began: bool) -> Envelope:
    """Return the envelope of `delivery` for a publish without a count.

    A job that `began`, here or before, has a count of 1 at least, so that `Attempt.redelivered` says so and a worker that runs it
    knows it. The passes stay: by them, such a worker knows it.
    """
    envelope = delivery.envelope
    crashes = max(envelope.crashes, int(began or delivery.redelivered))
    return msgspec.structs.replace(envelope, crashes=crashes, due_ms=None)


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
