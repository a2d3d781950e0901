"""Publishes each schedule's jobs at their slots. One process of it for now."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone

from ..backoff import full_jitter
from ..errors import ConfigurationError, InvalidJob, MessageTooLarge, PublishError, PublishTimeout
from ..options import Outgoing
from ..publishing.sender import Sender
from ..runtime import Runtime
from ..settings import redact
from .schedule import Schedule

logger = logging.getLogger("leveret.cron")

LONGEST_SLEEP_S = 30.0
"""Looked at the clock at least so often, since it may be set."""
PUBLISH_TIMEOUT_S = 5.0
SET_BACK_S = 60.0
"""A clock set back by more was wrong before: the next slot is looked for anew. By less, and it is waited for, so that none comes twice."""
LAST_SLOT_S = 86_400.0
"""What is left to a slot that no other follows: such a one is tried until it is published, a publish at most so long."""
FINISH_S = PUBLISH_TIMEOUT_S + 1.0
"""How long a stop waits for what is being published."""


class Scheduler:
    """Publishes the enabled schedules of an app, each in a task of its own, so that none waits for another.

    A slot's job has a deterministic id: published again after a restart or an unknown confirm it is the same job,
    at least once. A slot that can't be published is tried again until the schedule's next one is due; while the broker
    blocks publishers it is written twice at most. What fell due while no scheduler ran is skipped.
    """

    def __init__(self, app: str, schedules: Sequence[Schedule], sender: Sender, runtime: Runtime) -> None:
        self._app = app
        self._sender = sender
        self._runtime = runtime
        self._clock = runtime.clock
        self._schedules = schedules
        self._threads = ThreadPoolExecutor(max(1, len(self._schedules)), thread_name_prefix="leveret-cron")
        self._stop = asyncio.Event()
        self._emitting = 0

    async def run(self) -> None:
        """Publish until `stop`; return once what was being published is through."""
        try:
            async with asyncio.TaskGroup() as group:
                for schedule in self._schedules:
                    group.create_task(self._follow(schedule))
        except BaseExceptionGroup as group:
            refused = group.subgroup(
                ConfigurationError
            )  # a refused login, a queue that differs: one line, not a group of it
            if refused is None:
                raise
            raise refused.exceptions[0] from None
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def stop(self) -> None:
        """Begin no slot any more, and try none again."""
        self._stop.set()

    @property
    def emitting(self) -> int:
        """How many slots are being published now."""
        return self._emitting

    async def _follow(self, schedule: Schedule) -> None:
        slot, since = schedule.next(self._now()), self._clock.now()  # between the two there is no other slot
        looked = self._clock.monotonic()
        while slot is not None:
            # the next slot comes from the expression, never from when the last one was published: no drift
            while (left_s := slot.timestamp() - (now := self._clock.now())) > 0:
                if now < since - SET_BACK_S:
                    slot, since = self._after_set_back(schedule, slot, self._clock.monotonic() - looked), now
                    continue
                looked = self._clock.monotonic()
                if await self._stopped_within(min(left_s, LONGEST_SLEEP_S)):
                    return
            if self._stop.is_set():
                return
            following = schedule.next(slot)
            self._emitting += 1
            try:
                await self._emit(schedule, slot, following)
            finally:
                self._emitting -= 1
            since = max(slot.timestamp(), self._clock.now())
            slot = self._not_missed(schedule, following)
        logger.info("schedule %s has no further slot", schedule.name)
        await self._stop.wait()

    def _after_set_back(self, schedule: Schedule, slot: datetime, unseen_s: float) -> datetime:
        """Return what comes next by a clock that was ahead until `unseen_s` ago at most: `slot` may be hours away, and all before it missed."""
        now = self._now()
        following = schedule.next(now - timedelta(seconds=unseen_s)) or slot
        logger.warning(
            "schedule %s: the clock was set back to %s; its next slot is %s, not %s",
            schedule.name,
            now,
            following,
            slot,
        )
        return following

    def _not_missed(self, schedule: Schedule, following: datetime | None) -> datetime | None:
        """Return `following`, late though it may be, unless the slot after it is due as well: then what comes next."""
        now = self._now()
        if following is None or following >= now:
            return following
        after = schedule.next(following)
        if after is None or after > now:
            return following
        later = schedule.next(now)
        logger.error("schedule %s: the slots from %s to now are missed; next is %s", schedule.name, following, later)
        return later

    async def _stopped_within(self, delay_s: float) -> bool:
        """Wait `delay_s`, or less where it is to stop."""
        sleeping = asyncio.ensure_future(self._clock.sleep(delay_s))
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({sleeping, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            stopping.cancel()
        return self._stop.is_set()

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.now(), timezone.utc)

    def _left_s(self, following: datetime | None) -> float:
        return LAST_SLOT_S if following is None else following.timestamp() - self._clock.now()

    async def _emit(self, schedule: Schedule, slot: datetime, following: datetime | None) -> None:
        try:
            # a user's code: it may block, so it has threads of its own
            emitted = await asyncio.get_running_loop().run_in_executor(self._threads, schedule.job, slot)
        except Exception as error:
            logger.exception(
                "schedule %s: its function raised in slot %s; the slot is missed: %r",
                schedule.name,
                slot,
                error,  # noqa: TRY401 - the line without a traceback
            )
            return
        if emitted is None:
            return
        outgoing = emitted if isinstance(emitted, Outgoing) else Outgoing(emitted)
        options = outgoing.options.copy()
        if options.get("job_id") is None:
            options["job_id"] = schedule.slot_id(self._app, slot)
        tries, timeout_s = 0, PUBLISH_TIMEOUT_S
        while True:
            try:
                receipt = await self._sender.publish(outgoing.job, options, timeout_s)
            except ConfigurationError:
                raise
            except PublishError as error:
                if isinstance(error, PublishTimeout) and error.maybe_published:
                    # written to a broker that blocks publishers: so is each further try, and each copy runs once the alarm is over
                    timeout_s = max(PUBLISH_TIMEOUT_S, self._left_s(following))
                final = isinstance(error, (InvalidJob, MessageTooLarge))
                tries += 1
                wait_s = full_jitter(tries, base_s=0.5, cap_s=15.0, rng=self._runtime.rng)
                if final or self._left_s(following) <= wait_s:
                    logger.error(  # noqa: TRY400 - a line says it all
                        "schedule %s: slot %s is missed, it couldn't be published: %s",
                        schedule.name,
                        slot,
                        redact(str(error)),
                    )
                    return
                if tries == 1:
                    logger.warning(
                        "schedule %s: slot %s isn't published yet, trying again: %s",
                        schedule.name,
                        slot,
                        redact(str(error)),
                    )
                if self._stop.is_set() or await self._stopped_within(wait_s):
                    logger.error(  # noqa: TRY400
                        "schedule %s: slot %s is missed, stopped before it could be published: %s",
                        schedule.name,
                        slot,
                        redact(str(error)),
                    )
                    return
            except Exception as error:
                logger.exception(
                    "schedule %s: a publish layer raised in slot %s; the slot is missed: %r",
                    schedule.name,
                    slot,
                    error,  # noqa: TRY401
                )
                return
            else:
                logger.info("schedule %s published %s", schedule.name, receipt.job_id)
                return
