"""A log record for each run that ends well."""

from __future__ import annotations

import logging
from typing import ClassVar, Literal, final

from leveret.attempt import Attempt, elapsed_s
from leveret.attemptlog import duration, log_attempt, logger, when
from leveret.layer import Consume
from leveret.outcome import Done, Outcome, Snooze


@final
class Logs:
    """Logs each run that is done or snoozed, at INFO, to the logger `leveret.attempt`; never the payload.

    The worker itself logs every other ending there, with or without `Logs`: retries and burials with their traceback,
    expired jobs, and runs that were cut off. So each run has one record. The record has every value as a field, for a JSON
    formatter: `job`, `job_id`, `queue`, `attempt`, `correlation_id`, `redelivered`, `outcome`, `duration_s`, `delay_s` (of a
    retry or snooze), `reason` (of a burial) and `error` (class and text).
    """

    once: ClassVar[Literal[True]] = True

    def __repr__(self) -> str:
        return "Logs()"

    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        """Run the job, and log it if it ended well."""
        try:
            outcome = await proceed(attempt)
        except Snooze as said:
            _log_well(attempt, said)
            raise
        _log_well(attempt, outcome)
        return outcome


def _log_well(attempt: Attempt, outcome: Outcome) -> None:
    if not logger.isEnabledFor(logging.INFO):
        return
    took_s = elapsed_s(attempt)
    match outcome:
        case Done():
            log_attempt(logging.INFO, attempt, "done", took_s, f"done after {duration(took_s)}")
        case Snooze(delay_s):
            said = f"snoozed after {duration(took_s)}, again {when(delay_s)}"
            log_attempt(logging.INFO, attempt, "snoozed", took_s, said, delay_s=delay_s)
        case _:
            pass  # the worker logs the others, once they are true
