"""ending → settled: the one place that acts on how a run ended. What must be published before the ack is insisted on."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import traceback
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, ClassVar

import msgspec

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
from ..outcome import Bury, CutOff, Done, Ending, Expired, Kind, NotStarted, Retry, Snooze, Undecodable, Unknown
from ..runtime import Runtime
from ..texts import below_ours, named, one_line, said_by

logger = logging.getLogger("leveret.consumer")  # to its readers it is the consumer that settles

SETTLE_TIMEOUT_S = 5.0
"""Deadline of one try to publish a retry or a burial; it is tried again until its channel or lease is gone."""
MAX_ERRORS_BYTES = 16 << 10
_TRACEBACK_CHARS = 2000
_MESSAGE_CHARS = 500
_REFUSED = (InvalidJob, MessageTooLarge)
"""What no other try would change."""


class Ended(msgspec.Struct, frozen=True):
    """One delivery that ended here; for whoever watches a consumer (`leveret.testing`)."""

    envelope: Envelope
    job: Job | None
    """None where it wasn't decoded."""
    ending: Ending
    error: BaseException | None


class Lost(msgspec.Struct, frozen=True):
    """Counts deliveries whose channel went away here: the broker delivers them again."""

    kind: ClassVar[Kind] = Kind.LOST


class Settlement:
    """Counts endings, and settles the delivery of each.

    Args:
        publish_layers: The middleware round every publish, first is outermost.
        runtime: Clock, chance and settings.
        observe: Called with each ending once its delivery is settled.
    """

    def __init__(
        self, publish_layers: Sequence[AnyLayer], runtime: Runtime, observe: Callable[[Ended], None] | None = None
    ) -> None:
        self._observe = observe
        self.counts: defaultdict[type[Ending | Lost], int] = defaultdict(int)
        """Endings so far, by their class."""
        self._publish_layers = publish_layers
        self._runtime = runtime
        self._clock = runtime.clock
        self.unsettled = 0
        """Retries and burials that can't be published now; their deliveries stay unacked."""
        self.cut = False
        """Whether a stop's grace is over: nothing is tried again."""

    def end(
        self, delivery: Delivery, job: Job | None, ending: Ending, arrived: float | None
    ) -> Coroutine[Any, Any, None] | None:
        """Count an ending and settle its delivery; what comes back is the rest of it, to be awaited."""
        error: BaseException | None = None
        try:
            if isinstance(ending, Done) and delivery.live and not self.cut:  # nearly all: written out
                self.counts[Done] += 1
                delivery.done()
                if self._observe is not None:
                    self._observe(Ended(delivery.envelope, job, ending, None))
                return None
            if self.cut:
                ending = CutOff()
            error = ending.__cause__ if isinstance(ending, BaseException) else None
            if not isinstance(ending, CutOff):  # those are counted where they are cut off: a thread may never get here
                self.counts[type(ending)] += 1
                if not delivery.live:
                    self._lost(delivery, ending)
                elif (republishing := self.settle(delivery, ending, error, arrived)) is not None:
                    return self._republished(republishing, delivery, job, ending, error)
            if self._observe is not None:
                self._observe(Ended(delivery.envelope, job, ending, error))
        except Exception as bug:  # noqa: BLE001 - see there
            self._stuck(delivery, bug)
        return None

    async def _republished(
        self,
        republishing: Coroutine[Any, Any, bool],
        delivery: Delivery,
        job: Job | None,
        ending: Ending,
        error: BaseException | None,
    ) -> None:
        try:
            if not await republishing:
                self._lost(delivery, ending)
            if self._observe is not None:
                self._observe(Ended(delivery.envelope, job, ending, error))
        except asyncio.CancelledError as cancelled:
            if not self.cut:
                self._stuck(delivery, cancelled)
            raise
        except Exception as bug:  # noqa: BLE001 - see there
            self._stuck(delivery, bug)

    def _stuck(self, delivery: Delivery, bug: BaseException) -> None:
        """Say that our own code failed, or was cancelled by a user's: its delivery stays unacked, so nothing is lost, but it must be seen."""
        logger.critical("%s couldn't be settled, it stays unacked: %r", what(delivery.envelope), bug, exc_info=bug)

    def _lost(self, delivery: Delivery, ending: Ending) -> None:
        self.counts[Lost] += 1
        logger.warning(
            "%s: its channel or lease is gone, so the broker delivers it again; it ended as %s",
            what(delivery.envelope),
            ending.kind.value,
        )

    def settle(
        self, delivery: Delivery, ending: Ending, error: BaseException | None, arrived: float | None
    ) -> Coroutine[Any, Any, bool] | None:
        """Act on the ending of a live delivery, `error` its cause, `arrived` when it came here (seconds of the clock's `now`).

        What comes back is to be awaited: a publish, which is False where the delivery's channel or lease was lost meanwhile.
        """
        if isinstance(ending, Done):
            delivery.done()
            return None
        envelope = delivery.envelope
        if not envelope.first_seen_ms:
            envelope = msgspec.structs.replace(envelope, first_seen_ms=int((arrived or self._clock.now()) * 1000))
        match ending:
            case Expired():
                logger.warning("%s expired before it ran; it is dropped", what(envelope))
                delivery.done()
            case Snooze(delay_s):
                return self._again(delivery, _next(envelope, cause="snooze"), delay_s)
            case Retry(delay_s):
                # at debug level: the line for everyday is that of `Logs`
                logger.debug("%s is retried in %.3g s", what(envelope), delay_s or 0.0, exc_info=error)
                failed = self._failed(envelope, error, "" if error is not None else "another try was asked for")
                return self._again(
                    delivery, _next(failed, cause="retry", attempt=min(envelope.attempt + 1, MOST)), delay_s or 0.0
                )
            case Bury(reason):
                logger.error(
                    "%s is buried in %s.dead: %s",
                    what(envelope),
                    delivery.queue.name,
                    one_line(reason),
                    exc_info=at_debug(error),
                )
                return self._bury(delivery, self._failed(envelope, error, reason))
            case Undecodable(reason):
                logger.error("%s is buried in %s.dead: %s", what(envelope), delivery.queue.name, one_line(reason))
                return self._bury(delivery, self._failed(envelope, None, reason))
            case Unknown(reason):
                now_ms = int(self._clock.now() * 1000)
                since_ms = min(
                    envelope.unknown_since_ms or now_ms, now_ms
                )  # one in the future would have it wait until then
                waited_s = (now_ms - since_ms) / 1000
                if waited_s >= self._runtime.settings.unknown_grace_s:
                    logger.error(
                        "%s is buried in %s.dead: %s, for %d s",
                        what(envelope),
                        delivery.queue.name,
                        one_line(reason),
                        waited_s,
                    )
                    return self._bury(delivery, self._failed(envelope, None, reason))
                if envelope.unknown_since_ms is None:
                    logger.warning(
                        "%s waits in the broker, a deploy may be rolling: %s", what(envelope), one_line(reason)
                    )
                # 1, 2, 4 … 30 s: it waits as long again as it has waited
                unknown = _next(envelope, cause="snooze", unknown_since_ms=since_ms)
                return self._again(delivery, unknown, min(30.0, 1.0 + waited_s))
            case NotStarted():
                delivery.give_back()
            case CutOff():
                pass  # left unsettled: when the connection closes, the broker delivers it again
        return None

    async def _again(self, delivery: Delivery, envelope: Envelope, delay_s: float) -> bool:
        due_ms = moment_ms(self._clock.now() + delay_s) if delay_s else None
        envelope = msgspec.structs.replace(envelope, due_ms=due_ms)

        async def publish() -> None:
            reached = False

            async def last(changed: Envelope) -> Receipt:
                nonlocal reached
                reached = True
                await delivery.again(changed)
                return Receipt(changed.job_id)

            await fold_publish(self._publish_layers, last)(_with_deadline(envelope))
            if not reached:
                msg = "a publish layer returned without proceeding"
                raise RuntimeError(msg)

        try:
            return await self._insist(delivery, publish, envelope)
        except _REFUSED as refused:  # waiting doesn't help
            reason = f"its {envelope.cause} can't be published: {refused}"
            logger.error(  # noqa: TRY400 - one line
                "%s is buried in %s.dead: %s",
                what(envelope),
                delivery.queue.name,
                one_line(reason),
                exc_info=at_debug(refused),
            )
            ran = msgspec.structs.replace(envelope, attempt=delivery.envelope.attempt)
            return await self._bury(delivery, self._failed(ran, refused, reason))

    async def _bury(self, delivery: Delivery, envelope: Envelope) -> bool:
        buried = msgspec.structs.replace(
            envelope, origin=delivery.queue.name, cause="bury", due_ms=None, unknown_since_ms=None
        )

        async def publish() -> None:
            reached = False

            async def last(changed: Envelope) -> Receipt:
                nonlocal reached
                reached = True
                # layers may add headers to a burial, nothing else: it is kept as it came
                await delivery.bury(_with_deadline(msgspec.structs.replace(buried, headers=changed.headers)))
                return Receipt(changed.job_id)

            try:
                await fold_publish(self._publish_layers, last)(_with_deadline(buried))
            except Exception as error:
                if reached and not isinstance(error, _REFUSED):  # what a layer adds may be what can't be sent
                    raise
                reached = False
                logger.warning(
                    "%s: a publish layer raised on its burial, which goes on without: %r", what(envelope), error
                )
            if not reached:
                await last(buried)

        return await self._insist(delivery, publish, buried)

    async def _insist(self, delivery: Delivery, publish: Callable[[], Awaitable[None]], envelope: Envelope) -> bool:
        """Publish until it is confirmed, or until the delivery's channel or lease is gone; it is never acked before, and never nacked.

        Raises `InvalidJob` or `MessageTooLarge` of what can only be buried; a burial goes on.
        """
        tries, told = 0, float("-inf")
        try:
            while delivery.live and not self.cut:
                try:
                    await publish()
                except Exception as error:  # whatever a layer raises, the original must not be lost
                    if isinstance(error, _REFUSED) and envelope.cause != "bury":
                        raise
                    if tries == 0:
                        self.unsettled += 1
                    tries += 1
                    if self._clock.monotonic() - told >= 60.0 and delivery.live:
                        told = self._clock.monotonic()
                        logger.error(  # noqa: TRY400 - one line; the traceback at debug level
                            "%s: its %s can't be published, so it stays unacked and is tried again: %s",
                            what(envelope),
                            envelope.cause,
                            said_by(error) if isinstance(error, PublishError) else named(error),
                            exc_info=at_debug(error),
                        )
                    if delivery.live:
                        await self._clock.sleep(full_jitter(tries, base_s=0.2, cap_s=15.0, rng=self._runtime.rng))
                else:
                    if tries:
                        logger.info("%s: its %s is published after %d tries", what(envelope), envelope.cause, tries + 1)
                    return True
        finally:
            if tries:
                self.unsettled -= 1
        return False

    def _failed(self, envelope: Envelope, error: BaseException | None, reason: str = "") -> Envelope:
        """Return `envelope` with one more entry in its errors; the oldest go when they take too much room."""
        failure = Failure(
            attempt=envelope.attempt,
            at_ms=int(self._clock.now() * 1000),
            host=socket.gethostname(),
            error="" if error is None else type(error).__qualname__,
            message=(one_line(reason) if error is None else said_by(error))[:_MESSAGE_CHARS],
            reason=one_line(reason)[:_MESSAGE_CHARS],
            traceback="" if error is None else _trimmed(error),
        )
        failures = [*failures_of(envelope), failure]
        text = msgspec.json.encode(failures)
        while len(text) > MAX_ERRORS_BYTES and len(failures) > 1:
            failures = failures[1:]
            text = msgspec.json.encode(failures)
        return msgspec.structs.replace(envelope, errors=text.decode())


def _next(envelope: Envelope, **changes: Any) -> Envelope:
    """Return `envelope` as leveret publishes it anew: same id, one pass more."""
    # a foreign producer's count may be at its end
    counted = {"passes": min(envelope.passes + 1, MOST), "unknown_since_ms": None, **changes}
    return msgspec.structs.replace(envelope, **counted)


def _with_deadline(envelope: Envelope) -> Envelope:
    return msgspec.structs.replace(envelope, deadline=time.monotonic() + SETTLE_TIMEOUT_S)


def what(envelope: Envelope) -> str:
    """Return how a log line names a job."""
    return f"{envelope.job or 'a job without a name'} {envelope.job_id} (queue {envelope.queue}, attempt {envelope.attempt})"


def at_debug(error: BaseException | None) -> BaseException | None:
    """Return what a log record takes as `exc_info`: one line else."""
    return error if logger.isEnabledFor(logging.DEBUG) else None


def _trimmed(error: BaseException) -> str:
    text = (
        "".join(traceback.format_exception(type(error), error, below_ours(error.__traceback__)))
        .encode("utf-8", "backslashreplace")
        .decode()
    )
    return text if len(text) <= _TRACEBACK_CHARS else "…" + text[-_TRACEBACK_CHARS:]
