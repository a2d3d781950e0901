"""ending → settled: only this module acts on how a run ended. What must be published first, it hands to `replacing`."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from ..attempt import Attempt, elapsed_s
from ..attemptlog import duration
from ..broker import Delivery, Subscription
from ..envelope import Envelope
from ..headers import MOST
from ..job import Job
from ..layer import AnyLayer
from ..outcome import (
    Aborted,
    Bury,
    CutOff,
    Done,
    Ending,
    Expired,
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
from ..texts import one_line
from .following import entered, failure_of, following, met, unknown_wait_s, waited
from .remembered import ACKED, Past, Remembered, key_of
from .replacing import Replacing
from .said import Run, log, say, say_cut_off, what, why_expired

if TYPE_CHECKING:
    from .recording import Recording

logger = logging.getLogger("leveret.consumer")  # for readers of logs, the consumer settles

_DONE = Done()
MOST_WINDOW = 5000
"""At most this many settlements are remembered in case that they didn't arrive: about 800 kB."""
_MOST_UNKNOWN = 1000
"""At most this many kinds of unknown jobs are logged; a kind is a name, a version and a sender."""
MOST_GRACES = 10
"""After so many graces a job with an unknown name is buried though it hasn't met every consumer of its queue. It has met at most
about 400 workers by then, whose ids take 4 KB of its headers."""
MOST_LOST = 3
"""At most this many failed runs whose deliveries one loss took are logged as warnings; the others at debug level."""


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


class Settlement:
    """Counts endings, and settles the delivery of each ending.

    Args:
        publish_layers: The middleware round every publish, first is outermost.
        runtime: Clock, chance and settings.
        observe: Called with each ending once its delivery is settled.
        subscriptions: The queues of the deliveries, with their prefetch.
        recording: Hears of retries and burials of jobs whose classes have `keep`; None without such a class.
    """

    def __init__(
        self,
        publish_layers: Sequence[AnyLayer],
        runtime: Runtime,
        observe: Callable[[Ended], None] | None = None,
        subscriptions: Sequence[Subscription] = (),
        recording: Recording | None = None,
    ) -> None:
        self._observe = observe
        self._recording = recording
        self.counts: defaultdict[type[Ending | Lost], int] = defaultdict(int)
        """Endings so far, by their class."""
        self._runtime = runtime
        self._clock = runtime.clock
        window = sum(each.prefetch * len(each.queue.levels) for each in subscriptions)
        self.remembered = Remembered(runtime.clock, min(window, MOST_WINDOW))
        self._settled = self.remembered.settled.append  # looked up once
        self.replacing = Replacing(publish_layers, runtime, subscriptions, recording)
        """Publishes retries and burials."""
        self.cut = False
        """Whether the grace of a stop is over; nothing is then tried again."""
        self._id = os.urandom(4).hex()
        """Names this worker among the strangers of a job."""
        self._unknown: set[tuple[str, int, str | None]] = set()
        self._lost_failures = 0
        """Failed runs since the last loss whose deliveries it took."""

    def cut_off(self) -> None:
        """Try nothing again: the grace of a stop is over."""
        self.cut = self.replacing.cut = True

    def lost(self) -> None:
        """Note that a channel or lease was lost, with its deliveries."""
        self._lost_failures = 0
        self.replacing.lost()

    def end(
        self, delivery: Delivery, attempt: Attempt[Any] | None, ending: Ending, arrived: float | None
    ) -> Coroutine[Any, Any, None] | None:
        """Count an ending and settle its delivery; return the rest of the settlement to await, or None.

        `attempt` is None for a delivery that didn't run. `arrived` is the time of arrival, in seconds of the clock's `now`.
        """
        run: Run | None = None
        try:
            if not self.cut and isinstance(ending, Done) and delivery.live:  # nearly all
                self.counts[Done] += 1
                delivery.done()
                self._settled(key_of(delivery.envelope))
            else:
                run = self._run(delivery, attempt, ending, arrived)
                if isinstance(ending, CutOff) or (self.cut and not isinstance(ending, NotStarted)):
                    say_cut_off(run, ending)
                    ending = CutOff()  # counted in `Consumer.cut_off`, because a thread may never get here
                else:
                    if run.envelope.bury_since_ms is None:  # otherwise counted where the job ended
                        self.counts[type(ending)] += 1
                    if not delivery.live:
                        if self._recording is not None:
                            self._recording.lost(delivery)
                        self._lost(run, ending)
                    elif (republishing := self.settle(run, ending)) is not None:
                        return self._republished(republishing, run, ending)
                    else:
                        if isinstance(ending, (Done, Aborted, Expired, Repeated)):
                            self._settled(key_of(delivery.envelope))
                        say(run, ending)
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

    def _run(self, delivery: Delivery, attempt: Attempt[Any] | None, ending: Ending, arrived: float | None) -> Run:
        envelope = delivery.envelope
        if not envelope.first_seen_ms:
            envelope = msgspec.structs.replace(envelope, first_seen_ms=int((arrived or self._clock.now()) * 1000))
        error = ending.__cause__ if isinstance(ending, BaseException) else None
        return Run(delivery, attempt, envelope, error, 0.0 if attempt is None else elapsed_s(attempt))

    async def _republished(self, republishing: Coroutine[Any, Any, Ending | None], run: Run, ending: Ending) -> None:
        try:
            became = await republishing
            if became is not None:
                if not isinstance(became, Suspect):  # its copy has the same key
                    self._replaced(run.delivery)
                if self._recording is not None and run.envelope.publish:
                    self._recording.replaced(run, ending, became)
                say(run, became)
            elif self.cut:
                say_cut_off(run, ending)
            else:
                self._lost(run, ending)
            if self._observe is not None:
                self._show(self._observe, run.delivery, run.attempt, ending, run.error)
        except asyncio.CancelledError as cancelled:
            if self.cut:
                say_cut_off(run, ending)
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

    def _lost(self, run: Run, ending: Ending) -> None:
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
            log(run, level, "lost", gone, run.error)
            return
        logger.debug(  # the worker's state has one line for all of them, with their number
            "%s: the channel or lease is gone, so the broker delivers the job again; the run ended as %s",
            what(run.envelope),
            ending.kind.value,
        )

    def _past(self, run: Run, ending: Ending) -> Past | None:
        """Return what to remember of a run; None for a delivery that didn't run."""
        if run.attempt is None:
            return None
        if not isinstance(ending, (Retry, Snooze, Bury)):
            return Past(_DONE if isinstance(ending, Done) else ending)  # without its result, which nobody asks for
        reason = ending.reason if isinstance(ending, Bury) else ""
        # a copy, since the exception's traceback holds what the handler's frames hold
        return Past(type(ending)(*ending.args), failure_of(run.envelope, run.error, reason, self._clock.now()))

    def settle(self, run: Run, ending: Ending) -> Coroutine[Any, Any, Ending | None] | None:
        """Settle a live delivery by its ending; return None, or a publish to await.

        The publish returns the ending that it made true; None if the delivery's channel or lease was lost meanwhile.
        """
        delivery, envelope = run.delivery, run.envelope
        match ending:
            case Done() | Aborted() | Repeated():
                delivery.done()
            case Expired(keep):
                if keep:
                    return self.replacing.bury(run, ending, self._failed(run, why_expired(run, ending)))
                delivery.done()
            case Snooze(delay_s):
                # only a handler that has begun shows that the job kills no worker: a rate limit may have snoozed it before
                crashes = 0 if run.attempt is None or run.attempt.begun else envelope.crashes
                snoozed = following(envelope, cause="snooze", crashes=crashes)
                return self.replacing.again(run, ending, snoozed, delay_s)
            case Retry(delay_s):
                failed = self._failed(run)
                retried = following(failed, cause="retry", attempt=min(envelope.attempt + 1, MOST))
                return self.replacing.again(run, ending, retried, delay_s or 0.0)
            case Bury(reason):
                return self.replacing.bury(run, ending, self._failed(run, reason))
            case Undecodable(reason):
                return self.replacing.bury(run, ending, self._failed(run, reason))
            case Suspect():
                suspect = msgspec.structs.replace(envelope, cause="crash", crashes=min(envelope.crashes + 1, MOST))
                return self.replacing.again(run, ending, suspect, 0.0)
            case WorkerLost(crashes):
                failed = self._failed(run, ending.reason)
                return self.replacing.bury(run, ending, msgspec.structs.replace(failed, crashes=crashes))
            case Unknown(reason):
                since_ms, waited_s = waited(envelope.unknown_since_ms, self._clock.now())
                grace_s = self._runtime.settings.unknown_grace_s
                strangers = met(envelope.strangers, self._id)
                # while the queue has more consumers than the job has met strangers, one of them may know it
                met_all = strangers.count(",") + 1 >= delivery.consumers
                if waited_s >= (grace_s if met_all else grace_s * MOST_GRACES):
                    why = Bury(f"{reason}, after a wait of {waited_s:.0f} s")
                    return self.replacing.bury(run, why, self._failed(run, reason))
                self._say_unknown(envelope, reason)
                unknown = following(
                    envelope, cause="snooze", crashes=envelope.crashes, unknown_since_ms=since_ms, strangers=strangers
                )
                return self.replacing.again(run, ending, unknown, unknown_wait_s(waited_s, grace_s))
            case NotStarted():
                delivery.give_back()
            case CutOff():
                pass  # left unsettled, so that the broker delivers it again when the connection closes
        return None

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

    def returned(self, delivery: Delivery) -> None:
        """Count a job that was published again instead of given back."""
        self.counts[NotStarted] += 1
        if self._observe is not None:
            self._show(self._observe, delivery, None, NotStarted(), None)

    def _failed(self, run: Run, reason: str = "") -> Envelope:
        """Return the envelope of `run` with its failure; that of a remembered run, if there is one."""
        if run.envelope.bury_since_ms is not None:
            return run.envelope  # its failure was entered where the job ended
        failure = run.past.failure if run.past is not None else None
        return entered(run.envelope, failure or failure_of(run.envelope, run.error, reason, self._clock.now()))
