"""Publishes the jobs of each schedule at its slots. An app needs exactly one scheduler process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone

from ..backoff import full_jitter
from ..errors import ConfigurationError, InvalidJob, MessageTooLarge, PublishError, PublishTimeout
from ..publishing.sender import Sender
from ..runtime import Runtime
from ..settings import redact
from ..waits import first_of
from .schedule import Schedule

logger = logging.getLogger("leveret.cron")

LONGEST_SLEEP_S = 30.0
"""The clock may be set at any time, so the scheduler reads it at least this often."""
PUBLISH_TIMEOUT_S = 5.0
SET_BACK_S = 60.0
"""A clock set back further than this was wrong before, so the next slot is computed again. After a smaller step, the scheduler
waits for the slot that it already has, so that no slot comes twice."""
LAST_SLOT_S = 86_400.0
"""The time left to a slot that no other slot follows. Such a slot is retried until it is published, each try at most this long."""
FINISH_S = PUBLISH_TIMEOUT_S + 1.0
"""How long a stop waits for publishes in progress."""


class Scheduler:
    """Publishes the enabled schedules of an app, each in its own task, so that no schedule waits for another.

    A slot's job has a deterministic id. A publish that is repeated after a restart or an unknown confirm has the same id:
    at-least-once. A slot that can't be published is retried until the schedule's next slot is due; while the broker blocks
    publishers, the slot is written at most twice. Slots that fall due while no scheduler runs are skipped.
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
        """Publish until `stop`; return when the publishes in progress have ended."""
        try:
            async with asyncio.TaskGroup() as group:
                for schedule in self._schedules:
                    group.create_task(self._follow(schedule))
        except BaseExceptionGroup as group:
            # a refused login or a queue that differs is one line, not a group of errors
            refused = group.subgroup(ConfigurationError)
            if refused is None:
                raise
            raise refused.exceptions[0] from None
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def stop(self) -> None:
        """Start no further slot and no further try."""
        self._stop.set()

    @property
    def emitting(self) -> int:
        """How many slots are being published."""
        return self._emitting

    async def _follow(self, schedule: Schedule) -> None:
        slot, since = schedule.next(self._now()), self._clock.now()  # there is no other slot between the two
        looked = self._clock.monotonic()
        while slot is not None:
            # the next slot follows from the expression, never from the time of the last publish, so slots don't drift
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
        """Return the next slot after the clock was set back, at most `unseen_s` ago: `slot` may be hours away, with slots before it."""
        now = self._now()
        following = schedule.next(now - timedelta(seconds=unseen_s)) or slot
        logger.warning(
            "schedule %s: the clock was set back to %s; the next slot is %s, not %s",
            schedule.name,
            now,
            following,
            slot,
        )
        return following

    def _not_missed(self, schedule: Schedule, following: datetime | None) -> datetime | None:
        """Return `following`, even if it is overdue; but if the slot after it is due too, return the next slot after now."""
        now = self._now()
        if following is None or following >= now:
            return following
        after = schedule.next(following)
        if after is None or after > now:
            return following
        later = schedule.next(now)
        logger.error(
            "schedule %s: missed the slots from %s to now; the next slot is %s", schedule.name, following, later
        )
        return later

    async def _stopped_within(self, delay_s: float) -> bool:
        """Wait `delay_s`, or until the stop; return whether the scheduler stops."""
        await first_of(self._clock.sleep(delay_s), self._stop.wait())
        return self._stop.is_set()

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.now(), timezone.utc)

    def _left_s(self, following: datetime | None) -> float:
        return LAST_SLOT_S if following is None else following.timestamp() - self._clock.now()

    async def _emit(self, schedule: Schedule, slot: datetime, following: datetime | None) -> None:
        try:
            # the user's code may block, so it runs in separate threads
            outgoing = await asyncio.get_running_loop().run_in_executor(
                self._threads, schedule.outgoing, self._app, slot
            )
        except Exception as error:
            logger.exception(
                "schedule %s: missed slot %s, the cron function raised: %r",
                schedule.name,
                slot,
                error,  # noqa: TRY401 - for logs without tracebacks
            )
            return
        if outgoing is None:
            return
        tries, timeout_s = 0, PUBLISH_TIMEOUT_S
        while True:
            try:
                receipt = await self._sender.publish(outgoing.job, outgoing.options, timeout_s)
            except ConfigurationError:
                raise
            except PublishError as error:
                if isinstance(error.__cause__, ConfigurationError):
                    raise error.__cause__ from None
                if isinstance(error, PublishTimeout) and error.maybe_published:
                    # the broker blocks publishers after the write; each further try would write a copy that runs when the block ends
                    timeout_s = max(PUBLISH_TIMEOUT_S, self._left_s(following))
                final = isinstance(error, (InvalidJob, MessageTooLarge))
                tries += 1
                wait_s = full_jitter(tries, base_s=0.5, cap_s=15.0, rng=self._runtime.rng)
                if final or self._left_s(following) <= wait_s:
                    logger.error(  # noqa: TRY400 - one line is enough
                        "schedule %s: missed slot %s, the job couldn't be published: %s",
                        schedule.name,
                        slot,
                        redact(str(error)),
                    )
                    return
                if tries == 1:
                    logger.warning(
                        "schedule %s: slot %s isn't published yet, retrying: %s",
                        schedule.name,
                        slot,
                        redact(str(error)),
                    )
                if self._stop.is_set() or await self._stopped_within(wait_s):
                    logger.error(  # noqa: TRY400
                        "schedule %s: missed slot %s, stopped before the job could be published: %s",
                        schedule.name,
                        slot,
                        redact(str(error)),
                    )
                    return
            except Exception as error:
                logger.exception(
                    "schedule %s: missed slot %s, publish middleware raised: %r",
                    schedule.name,
                    slot,
                    error,  # noqa: TRY401
                )
                return
            else:
                logger.info("schedule %s published %s", schedule.name, receipt.job_id)
                return
