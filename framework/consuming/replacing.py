"""ending → published: a retry or a burial takes the place of its delivery. Its publish is repeated until the broker confirms."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from math import inf
from typing import TYPE_CHECKING

import msgspec

from ..backoff import full_jitter
from ..broker import Delivery, Subscription
from ..chain import fold_publish
from ..clock import moment_ms
from ..envelope import ALONE_FROM, Envelope, Receipt
from ..errors import InvalidJob, MessageTooLarge, PublishError
from ..layer import AnyLayer
from ..outcome import Bury, Ending, Snooze
from ..runtime import Runtime
from ..texts import named, said_by
from ..waits import first_of
from .burials import PATIENCE_S, Burials
from .following import entered, failure_of, following, waited, with_deadline
from .said import Run, at_debug, say_postponed, what

if TYPE_CHECKING:
    from .recording import Recording

logger = logging.getLogger("leveret.consumer")  # for readers of logs, the consumer settles

_BURIED_WITHIN_S = 4.0
"""The longest wait between two tries of a burial that stays in the worker."""
_POSTPONED_S = (10.0, 300.0)
"""The shortest and the longest wait, in the broker, of a job that is to be buried: each is as long as all before it together."""
_TELL_EVERY_S = 60.0
"""How often a queue's log says that its retries can't be published."""
_REFUSED = (InvalidJob, MessageTooLarge)
"""Errors that another try wouldn't change."""


class Replacing:
    """Publishes what takes the place of a delivery, which the broker acknowledges after the confirm.

    Args:
        publish_layers: The middleware round every publish, first is outermost.
        runtime: Clock, chance and settings.
        subscriptions: The queues of the deliveries, with their prefetch.
        recording: What a publish enters into the job store in its own transaction, if the broker can; None without a job store.
    """

    def __init__(
        self,
        publish_layers: Sequence[AnyLayer],
        runtime: Runtime,
        subscriptions: Sequence[Subscription],
        recording: Recording | None = None,
    ) -> None:
        self._recording = recording
        self._publish_layers = publish_layers
        self._runtime = runtime
        self._clock = runtime.clock
        self.unsettled = 0
        """The number of retries and burials that can't be published now; their deliveries stay unacknowledged."""
        self.cut = False
        """Whether the grace of a stop is over; nothing is then tried again."""
        self._burials = defaultdict[str, Burials](partial(Burials, 2))
        self._burials.update((each.queue.name, Burials(each.prefetch)) for each in subscriptions)
        self._suspects = defaultdict[str, Burials](partial(Burials, 1))
        """Those of jobs that were set aside: a worker holds one such job of a queue, so that none may stay."""
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

    async def again(self, run: Run, ending: Ending, envelope: Envelope, delay_s: float) -> Ending | None:
        """Publish `envelope` to its queue, due after `delay_s`; bury the job if another try wouldn't help.

        Returns the ending that this made true; None if the delivery's channel or lease was lost meanwhile. So does `bury`.
        """
        try:
            return ending if await self._delayed(run, ending, envelope, delay_s) else None
        except _REFUSED as refused:  # another try wouldn't help
            reason = f"the {envelope.cause} can't be published: {refused}"
            ran = msgspec.structs.replace(envelope, attempt=run.delivery.envelope.attempt)
            bury = Bury(reason)
            bury.__cause__ = refused
            return await self.bury(run, bury, entered(ran, failure_of(ran, refused, reason, self._clock.now())))

    async def _delayed(self, run: Run, ending: Ending | None, envelope: Envelope, delay_s: float) -> bool:
        """Publish `envelope` to its queue, due after `delay_s`, which makes `ending` true; return whether it is published.

        Raises what another try wouldn't change.
        """
        due_ms = moment_ms(self._clock.now() + delay_s) if delay_s else None
        envelope = msgspec.structs.replace(envelope, due_ms=due_ms)

        published = False

        async def publish() -> None:
            reached = False

            async def last(changed: Envelope) -> Receipt:
                nonlocal reached, published
                reached = True
                self._bring(run, ending)
                published = await run.delivery.again(changed)
                return Receipt(changed.job_id)

            await fold_publish(self._publish_layers, last)(with_deadline(envelope))
            if not reached:
                msg = "publishing middleware returned without awaiting proceed(envelope)"
                raise RuntimeError(msg)

        return await self._insist(run.delivery, publish, envelope) and published

    def _bring(self, run: Run, ending: Ending | None) -> None:
        if self._recording is not None and run.envelope.publish:
            self._recording.bring(run, ending)

    async def bury(self, run: Run, ending: Ending, envelope: Envelope) -> Ending | None:
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
                self._bring(run, ending)
                # Middleware may only add headers to a burial; the rest stays as it came.
                published = await delivery.bury(with_deadline(msgspec.structs.replace(buried, headers=changed.headers)))
                return Receipt(changed.job_id)

            try:
                await fold_publish(self._publish_layers, last)(with_deadline(buried))
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

        burials = (self._suspects if delivery.envelope.crashes >= ALONE_FROM else self._burials)[delivery.queue.name]
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

    async def _postponed(self, run: Run, ending: Ending, envelope: Envelope) -> Ending | None:
        """Let a job that is to be buried wait in the broker, with a mark, so that no worker runs it again."""
        since_ms, waited_s = waited(run.envelope.bury_since_ms, self._clock.now())
        shortest_s, longest_s = _POSTPONED_S
        waits_s = min(longest_s, max(shortest_s, waited_s))
        marked = following(envelope, cause="bury", bury_since_ms=since_ms)
        if not await self._delayed(run, None, marked, waits_s):
            return None
        if run.envelope.bury_since_ms is None:
            say_postponed(run, ending)
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
                        if burials is not None:
                            burials.refused += 1
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
                        if burials.refused == (tries > 0):  # RabbitMQ takes some while it refuses others
                            self._refuse(queue, "")
                    elif told:
                        logger.info("%s: the %s is published after %d tries", what(envelope), envelope.cause, tries + 1)
                    return True
        finally:
            if tries:
                self.unsettled -= 1
                if burials is not None:
                    burials.refused -= 1
        return False
