"""One structured log line per attempt."""

from __future__ import annotations

import asyncio
import logging
from typing import ClassVar, Literal, final

from leveret.attempt import Attempt
from leveret.clock import Clock, SystemClock
from leveret.layer import Consume
from leveret.outcome import Bury, Done, Outcome, Retry, Snooze
from leveret.runtime import Runtime
from leveret.texts import named, one_line

logger = logging.getLogger("leveret.attempt")


@final
class Logs:
    """Logs one structured line per attempt to the logger `leveret.attempt`; never the payload.

    The level is INFO for a run that is done or snoozed, ERROR for a burial or an exception, and WARNING for a retry, an
    expired job or a cancelled run. The record has every value as a field, for a JSON formatter: `job`, `job_id`, `queue`,
    `attempt`, `correlation_id`, `redelivered`, `outcome`, `duration_s`, `delay_s` (of a retry or snooze), `reason` (of a
    burial) and `error` (class and text). Outside `Retries`, `Logs` sees outcomes; inside `Retries`, exceptions.
    """

    once: ClassVar[Literal[True]] = True

    def __init__(self) -> None:
        self._clock: Clock = SystemClock()

    def __repr__(self) -> str:
        return "Logs()"

    def bind(self, runtime: Runtime) -> None:
        """Take the clock."""
        self._clock = runtime.clock

    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        """Run the job, and log how the run ended."""
        started = self._clock.monotonic()
        try:
            outcome = await proceed(attempt)
        except asyncio.CancelledError:
            self._say(logging.WARNING, attempt, started, "cancelled", None, None)
            raise
        except (Retry, Snooze, Bury) as said:
            self._say_outcome(attempt, started, said)
            raise
        except Exception as error:
            self._say(logging.ERROR, attempt, started, "failed", None, error)
            raise
        self._say_outcome(attempt, started, outcome)
        return outcome

    def _say_outcome(self, attempt: Attempt, started: float, outcome: Outcome) -> None:
        match outcome:
            case Bury():
                level, name = logging.ERROR, "buried"
            case Retry():
                level, name = logging.WARNING, "retry"
            case Snooze():
                level, name = logging.INFO, "snoozed"
            case Done():
                level, name = logging.INFO, "done"
            case _:
                level, name = logging.WARNING, "expired"
        self._say(
            level, attempt, started, name, outcome, outcome.__cause__ if isinstance(outcome, BaseException) else None
        )

    def _say(
        self,
        level: int,
        attempt: Attempt,
        started: float,
        name: str,
        outcome: Outcome | None,
        error: BaseException | None,
    ) -> None:
        if not logger.isEnabledFor(level):
            return
        duration_s = self._clock.monotonic() - started
        envelope = attempt.envelope
        fields: dict[str, object] = {
            "job": envelope.job,
            "job_id": envelope.job_id,
            "queue": envelope.queue,
            "attempt": envelope.attempt,
            "correlation_id": envelope.correlation_id,
            "redelivered": attempt.redelivered,
            "outcome": name,
            "duration_s": duration_s,
        }
        text = ""
        if isinstance(outcome, (Retry, Snooze)):
            fields["delay_s"] = outcome.delay_s
            if outcome.delay_s is not None:
                text = f", again in {_duration(outcome.delay_s)}"
        if error is not None:
            fields["error"] = named(error)
            text += f": {fields['error']}"
        if isinstance(outcome, Bury):
            fields["reason"] = one_line(outcome.reason)
            text = f": {fields['reason']}"
        logger.log(
            level,
            "job %s %s attempt %d: %s after %s%s",
            envelope.job,
            envelope.job_id,
            envelope.attempt,
            name,
            _duration(duration_s),
            text,
            extra=fields,
        )


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
